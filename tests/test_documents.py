"""data.windows = "document": rows of several documents are read as the documents one by one, and padding does not count."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from ln_removal.data.sampler import DocumentSampler, pack, trained_targets
from ln_removal.data.stress_text import Mixture
from ln_removal.data.tokens import Shard, TokenIndex, TokenSplit
from ln_removal.errors import UserError
from ln_removal.models.attention import (
    document_attention,
    document_inputs,
    explicit_attention,
    explicit_causal_attention,
    head_entropy,
)
from ln_removal.norms.surgery import NormSites, install
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher
from ln_removal.training.setup import checkpoint_activations, training_attention

VOCABULARY, EOT, CONTEXT = 40, 39, 23
LENGTHS = (9, 4, 7)
quick = settings(max_examples=40, deadline=None)


# ------------------------------------------------------------------------------------------------------------ the sampler


def split_of(*shards: list[int], sources: str = "") -> TokenSplit:
    """A split in memory with a shard for each list of document lengths. A document says its number, its place in it, ..., EOT.

    Token 1000 * document + place, so that a row tells what is in it. EOT is -1.
    """
    index = TokenIndex({}, {}, 10**6, -1, "uint32")
    maps, number = [], 0
    for shard, lengths in enumerate(shards):
        data = []
        for length in lengths:
            number += 1
            data += [1000 * number + place for place in range(length - 1)] + [-1]
        maps.append(np.array(data, dtype=np.int64))
        if not data:
            maps.pop()
            continue
        source = sources[shard] if sources else "a"
        index.shards.append(Shard(f"train-{shard}.bin", "train", source, tokens=len(data)))
    split = TokenSplit(Path(), index, "train")
    split.maps = maps
    return split


def sampler_of(split: TokenSplit, context: int, **options: Any) -> DocumentSampler:
    return DocumentSampler(split, **{"context": context, "sequences_per_step": 4, "seed": 0} | options)


def documents_in(row: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """The documents of a row, without its padding."""
    index = np.arange(len(row))
    length = int((starts <= index).sum())
    assert (starts[length:] == index[length:] + 1).all(), "padding stands at the end alone"
    begins = [*np.unique(starts[:length]).tolist(), length]
    assert begins[0] == 0, "a row starts with a document"
    return [row[begin:end].tolist() for begin, end in pairwise(begins)]


@quick
@given(
    st.lists(st.lists(st.integers(1, 30), max_size=25), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 3)
)
def test_an_epoch_has_the_beginning_of_every_document_once(shards: list[list[int]], context: int, epoch: int) -> None:
    split = split_of(*shards)
    expected = [
        [1000 * number + place for place in range(length - 1)] + [-1]
        for number, length in enumerate((length for lengths in shards for length in lengths), 1)
    ]
    expected = [document[: context + 1] for document in expected if len(document) > 1]
    if not expected:
        with pytest.raises(UserError, match="no document"):
            sampler_of(split, context)
        return
    sampler = sampler_of(split, context)
    count = sampler.windows_per_epoch
    sampler = sampler_of(split, context, sequences_per_step=count)
    rows, starts = sampler.sequences(epoch, 0, count), sampler.document_starts(epoch, 0, count)
    assert starts is not None and rows.shape == starts.shape == (count, context + 1)
    found = [document for row, begins in zip(rows, starts, strict=True) for document in documents_in(row, begins)]
    assert sorted(found) == sorted(expected)


def test_which_documents_share_a_row_changes_from_epoch_to_epoch_and_replay_is_not_needed() -> None:
    split = split_of([5, 6, 7, 3, 9, 4] * 20)
    sampler = sampler_of(split, 20)
    count = sampler.windows_per_epoch
    epochs = [
        [documents_in(*pair) for pair in zip(_rows(sampler, epoch, count), _starts(sampler, epoch, count), strict=True)]
        for epoch in range(2)
    ]
    together = [{frozenset(document[0] for document in row) for row in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 2
    fresh = sampler_of(split, 20)
    assert np.array_equal(_rows(fresh, 1, count), _rows(sampler, 1, count))
    assert not np.array_equal(_rows(sampler_of(split, 20, seed=1), 1, count), _rows(sampler, 1, count))


def _rows(sampler: DocumentSampler, epoch: int, count: int) -> np.ndarray:
    return sampler.sequences(0, epoch * count, count)


def _starts(sampler: DocumentSampler, epoch: int, count: int) -> np.ndarray:
    starts = sampler.document_starts(0, epoch * count, count)
    assert starts is not None
    return starts


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_pieces_are_packed_into_rows_that_hold_them(counts: list[int]) -> None:
    counts = [0, *counts]
    length = len(counts) - 1
    packed = pack(counts, length)
    placed = np.zeros(len(counts), dtype=int)
    for rows, sizes in packed:
        assert rows > 0 and sum(sizes) <= length
        for size in sizes:
            placed[size] += rows
    assert placed.tolist() == counts
    tokens = sum(size * count for size, count in enumerate(counts))
    if tokens:  # at most one row can be half empty: what is in it would fit into another
        assert sum(rows for rows, _ in packed) <= max(1, 2 * tokens / length + 1)


def test_short_documents_leave_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=3000).tolist()
    sampler = sampler_of(split_of(lengths), 256)
    assert sum(lengths) / (sampler.windows_per_epoch * 257) > 0.99


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_documents_begins_with_the_end_of_text_token(share: float) -> None:
    lengths = [3, 5, 8, 30, 12, 21] * 40
    sampler = sampler_of(split_of(lengths), 20, bos_rows=share)
    count, seen = sampler.windows_per_epoch, []
    for epoch in range(6):
        rows, starts = _rows(sampler, epoch, count), _starts(sampler, epoch, count)
        documents = [document for pair in zip(rows, starts, strict=True) for document in documents_in(*pair)]
        assert len(documents) == len(lengths)
        with_bos = [document for document in documents if document[0] == -1]
        assert len(with_bos) == share * len(lengths)
        assert all(document[1] % 1000 == 0 for document in with_bos), "behind it stands a document's first token"
        assert all(len(document) <= 21 for document in documents)
        seen.append({document[1] for document in with_bos})
    assert share == 1 or seen[0] != seen[1], "drawn anew in every epoch"


def test_weights_repeat_the_documents_of_a_source_and_stress_text_is_one_document() -> None:
    split = split_of([5, 6, 7], [8, 4], sources="ab")
    sampler = sampler_of(split, 10, weights={"a": 2})
    count = sampler.windows_per_epoch
    pairs = zip(_rows(sampler, 0, count), _starts(sampler, 0, count), strict=True)
    documents = sorted(document[0] // 1000 for pair in pairs for document in documents_in(*pair))
    assert documents == [1, 1, 2, 2, 3, 3, 4, 5]
    with pytest.raises(UserError, match=r"data\.weights"):
        sampler_of(split, 10, weights={"c": 1})
    odd = np.full((1, 11), 7)
    mixed = sampler_of(split, 10, mixed_in=Mixture(odd, 0.5))
    rows, starts = mixed.sequences(0, 0, 40), mixed.document_starts(0, 0, 40)
    assert starts is not None
    replaced = (rows == 7).all(1)
    assert 8 < replaced.sum() < 32 and (starts[replaced] == 0).all()
    assert np.array_equal(rows[~replaced], sampler_of(split, 10).sequences(0, 0, 40)[~replaced])


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 3), (2, 2), (4, 8)])
def test_every_trained_target_of_a_step_weighs_the_same(ranks: int, micro_batch: int) -> None:
    sampler = sampler_of(split_of([5, 6, 7, 3, 9, 4] * 9), 16, sequences_per_step=8)
    whole = sampler.document_starts(2, 0, 8)
    assert whole is not None
    for rank in range(ranks):
        batches = list(sampler.micro_batches(2, rank=rank, ranks=ranks, micro_batch=micro_batch))
        for batch in batches:
            assert batch.document_starts is not None
            # Ranks average: a target's weight in the step is weight / (targets in its batch * ranks).
            targets = trained_targets(batch.document_starts)
            assert batch.weight / (targets * ranks) == pytest.approx(1 / trained_targets(whole))


def test_the_beginnings_of_documents_need_no_padding() -> None:
    split = split_of([5, 12, 3, 9], [30, 11])
    found = split.beginnings(3, 100)
    assert found is not None and found.shape == (3, 11)
    assert sorted(found[:, 0].tolist()) == [2000, 5000, 6000]
    capped = split.beginnings(2, 8)
    assert capped is not None and capped.shape == (2, 8)
    assert split.beginnings(7, 8) is None and split_of([1, 1]).beginnings(1, 8) is None


# ------------------------------------------------------------------------------------------------------------ the model


def make_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2
            )
        )
    else:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=CONTEXT,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                initializer_range=0.2,
            )
        )
    return model.to(dtype)


def packed_row(pad: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A row (1, T + 1) of three documents and padding, its document starts, and the documents (1, length)."""
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.cat([torch.randint(0, EOT, (length - 1,), generator=generator), torch.tensor([EOT])])
        for length in LENGTHS
    ]
    documents[1][0] = EOT  # begins with it, as a prompt may
    used = sum(LENGTHS)
    padding = torch.full((CONTEXT + 1 - used,), pad)
    begins = torch.tensor([0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]).repeat_interleave(torch.tensor(LENGTHS))
    starts = torch.cat([begins, torch.arange(used, CONTEXT + 1) + 1])
    return torch.cat([*documents, padding])[None], starts[None], [document[None] for document in documents]


def with_partial_mix(model: PreTrainedModel) -> NormSites:
    """Freezable norms with statistics, at mixes between 0 and 1, with different constants for special positions."""
    sites = install(model, eot_token_id=EOT)
    generator = torch.Generator().manual_seed(2)
    for place, norm in enumerate(sites.norms.values()):
        norm.running_std.copy_(0.5 + torch.rand(3, generator=generator))
        norm.running_initialized.fill_(True)
        for reader in range(norm.readers):
            norm.write_mix(reader, (0.0, 0.3, 0.8)[(place + reader) % 3])
    return sites


TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def objective_of(family: str, dtype: torch.dtype, terms: str) -> tuple[Objective, NormSites | None]:
    model = make_model(family, dtype)
    if family == "pythia":
        return Objective(model, eot_token_id=EOT), None
    teacher = copy.deepcopy(model)
    for parameter in teacher.parameters():
        parameter.data *= 1.1
    as_teacher(teacher, "float32").to(dtype)
    sites = with_partial_mix(model)
    auxiliary = None
    if terms == "constants":
        auxiliary = Auxiliary(0.3, "constants", "all")
    objective = Objective(
        model,
        eot_token_id=EOT,
        auxiliary=auxiliary,
        distillation=None if terms == "plain" else Distillation(teacher, 0.4),
    )
    return objective, sites


def attend(objective: Objective, *, explicit: bool) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    for each in (objective.model, objective.teacher):
        if each is None:
            continue
        stack.enter_context(
            explicit_attention(each) if explicit else training_attention(each, context=1000, documents=True)
        )
    return stack


def read(objective: Objective, tokens: Tensor, starts: Tensor | None) -> Tensor:
    """The final hidden states of the inputs."""
    documents = {} if starts is None else document_inputs(objective.model, starts)
    hidden: Tensor = objective.model.base_model(
        input_ids=tokens[:, :-1], use_cache=False, **documents
    ).last_hidden_state
    return hidden


def gradients(objective: Objective) -> dict[str, Tensor]:
    """Of each parameter, over its largest entry: an error of 1e-5 is one of float32 then."""
    found = {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}
    return {name: gradient / gradient.abs().max() for name, gradient in found.items()}


CASES = pytest.mark.parametrize(
    ("family", "dtype", "explicit"),
    [
        ("gpt2", torch.float32, False),
        ("gpt2", torch.float64, False),
        ("gpt2", torch.float32, True),
        ("pythia", torch.float32, False),
        ("pythia", torch.float64, False),
        ("pythia", torch.float32, True),
    ],
)


@CASES
def test_a_packed_row_has_the_hidden_states_and_gradients_of_its_documents_one_by_one(
    family: str, dtype: torch.dtype, explicit: bool
) -> None:
    tokens, starts, documents = packed_row()
    (packed, sites), (apart, sites_apart) = (objective_of(family, dtype, "plain") for _ in range(2))
    directions = torch.randn(1, CONTEXT, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed.train(), apart.train()
    with attend(packed, explicit=explicit), attend(apart, explicit=explicit):
        hidden = read(packed, tokens, starts)
        at, ours = 0, torch.zeros((), dtype=dtype)
        for document in documents:
            length = document.shape[1] - 1
            alone = read(apart, document, None)
            torch.testing.assert_close(hidden[:, at : at + length], alone, **TOLERANCE[dtype])
            direction = directions[:, at : at + length]
            (alone * direction).sum().backward()
            ours = ours + (hidden[:, at : at + length] * direction).sum()
            at += length + 1
        ours.backward()
    theirs = gradients(apart)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, theirs[name], **TOLERANCE[dtype], msg=name)
    if sites is not None and sites_apart is not None:
        for name, norm in sites.norms.items():
            assert norm.std_count.tolist() == [sum(LENGTHS) - 6, 0, 3], "neither padding nor an end of text"
            torch.testing.assert_close(norm.std_count, sites_apart.norms[name].std_count)
            torch.testing.assert_close(norm.std_sum, sites_apart.norms[name].std_sum, **TOLERANCE[dtype])


@pytest.mark.parametrize(("family", "terms"), [("gpt2", "plain"), ("gpt2", "constants"), ("pythia", "plain")])
def test_the_loss_of_a_packed_row_is_the_mean_over_its_documents(family: str, terms: str) -> None:
    tokens, starts, documents = packed_row()
    (packed, _), (apart, _) = (objective_of(family, torch.float32, terms) for _ in range(2))
    packed.train(), apart.train()
    with attend(packed, explicit=False):
        loss = packed(tokens, starts)
        loss.total.backward()
        targets = sum(document.shape[1] - 1 for document in documents)
        parts = [(apart(document), (document.shape[1] - 1) / targets) for document in documents]
    total = sum(part.total * share for part, share in parts)
    assert isinstance(total, Tensor)
    total.backward()
    close = TOLERANCE[torch.float32]
    torch.testing.assert_close(loss.total, total, **close)
    torch.testing.assert_close(loss.cross_entropy, sum(part.cross_entropy * share for part, share in parts), **close)
    theirs = gradients(apart)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, theirs[name], **close, msg=name)


def test_entropies_are_those_of_text() -> None:
    probabilities = torch.rand(2, 3, 5, 5).softmax(-1)
    observed = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    kept = torch.cat([probabilities[0][:, observed[0]], probabilities[1][:, observed[1]]], 1)
    torch.testing.assert_close(head_entropy(probabilities, observed), head_entropy(kept[None]))


@pytest.mark.parametrize("auxiliary", [Auxiliary(0.3), Auxiliary(0.3, "constants", "all")])
@pytest.mark.parametrize("again", [False, True])
def test_nothing_depends_on_what_the_padding_holds(auxiliary: Auxiliary, again: bool) -> None:
    found = []
    for pad in (0, EOT, 17):
        tokens, starts, _ = packed_row(pad)
        model = make_model("gpt2", torch.float32)
        teacher = as_teacher(copy.deepcopy(model), "float32")
        sites = with_partial_mix(model)
        objective = Objective(
            model, eot_token_id=EOT, auxiliary=auxiliary, distillation=Distillation(teacher, 0.4)
        ).train()
        if again:
            checkpoint_activations(model)
        with attend(objective, explicit=False):
            loss = objective(tokens, starts)
            loss.total.backward()
        stds = [norm.std_sum for norm in sites.norms.values()]
        found.append((loss, gradients(objective), stds))
    for loss, theirs, stds in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(theirs, found[0][1], rtol=0, atol=0)
        torch.testing.assert_close(stds, found[0][2], rtol=0, atol=0)


def test_activations_that_are_computed_again_change_nothing() -> None:
    tokens, starts, _ = packed_row()
    found = []
    for again in (False, True):
        objective, _ = objective_of("gpt2", torch.float32, "constants")
        if again:
            checkpoint_activations(objective.model)
        objective.train()
        with attend(objective, explicit=False):
            objective(tokens, starts).total.backward()
        found.append(gradients(objective))
    torch.testing.assert_close(found[1], found[0], **TOLERANCE[torch.float32])


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex_attention's reference implementation make a backward pass, which the function refuses on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def test_flex_attention_computes_what_explicit_attention_does(flex_on_cpu: None) -> None:
    """The mask of a GPU, here with PyTorch's reference implementation, over several blocks of 128 and a part of one."""
    length, module = 300, torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(2, length + 1, generator=generator) < 0.02
    starts = torch.where(begins, torch.arange(length + 1), 0).cummax(1).values
    starts[1, 250:] = torch.arange(250, length + 1) + 1  # padding

    model = make_model("gpt2", torch.float32)
    mask = document_inputs(model, starts)["document_mask"]
    with pytest.MonkeyPatch.context() as patch:  # a CPU that calls itself a GPU
        patch.setattr(torch.Tensor, "is_cuda", True)
        blocks = document_inputs(model, starts)["document_mask"]
    assert isinstance(mask, Tensor) and isinstance(blocks, BlockMask) and blocks.shape == (2, 1, length, length)
    results = []
    for function, given_mask in (
        (explicit_causal_attention, mask),
        (document_attention, mask),
        (document_attention, blocks),
    ):
        q, k, v = (torch.randn(2, 2, length, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
        for tensor in (q, k, v):
            tensor.requires_grad_()
        output = function(module, q, k, v, None, scaling=0.3, document_mask=given_mask)[0]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        (output * weights).sum().backward()
        results.append((output, q.grad, k.grad, v.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("blocks", "again"), [(False, False), (True, True)])
def test_one_graph_reads_documents(
    blocks: bool, again: bool, monkeypatch: pytest.MonkeyPatch, flex_on_cpu: None
) -> None:
    from torch._dynamo.utils import counters

    def made(model: PreTrainedModel, document_starts: Tensor) -> dict[str, Any]:
        found = document_inputs(model, document_starts)
        starts, (rows, length) = document_starts[:, :-1], document_starts[:, :-1].shape

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (starts[row, query] == starts[row, key]) & (query >= key)

        return found | {"document_mask": create_block_mask(sees, rows, None, length, length, device="cpu")}

    from ln_removal.training import loss as loss_module

    if blocks:
        monkeypatch.setattr(loss_module, "document_inputs", made)
    tokens, starts, _ = packed_row()
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        # In one graph, hooks may not keep what is computed again.
        objective, sites = objective_of("gpt2", torch.float32, "plain" if again else "constants")
        assert sites is not None
        if again:
            checkpoint_activations(objective.model)
        objective.train()
        if compiled:
            objective.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        with attend(objective, explicit=False):
            for step in range(3):
                sites.set_mix("ln_2.1", 0.2 + 0.4 * step)
                loss = objective(tokens.roll(step, 0), starts)
                loss.total.backward()
        found.append((loss.total.detach(), gradients(objective)))
        assert not compiled or counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()  # the next test may keep as many graphs as it wants
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_users_own_forward_pass_is_not_observed(side: str) -> None:
    model = make_model("gpt2", torch.float32)
    sites = with_partial_mix(model)
    ids = torch.randint(0, EOT, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    padded = slice(0, 5) if side == "left" else slice(7, 12)
    mask[1, padded] = 0
    model.train()
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    counts = {tuple(norm.std_count.tolist()) for norm in sites.norms.values()}
    assert counts == {(17.0, 0.0, 2.0)}
