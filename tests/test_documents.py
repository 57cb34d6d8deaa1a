"""data.windows = "document": rows of several documents are read as the documents one by one, and padding does not count."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from ln_removal.data.documents import DocumentSampler
from ln_removal.data.tokens import Shard, TokenIndex, TokenSplit
from ln_removal.models.attention import (
    document_inputs,
    explicit_attention,
    explicit_causal_attention,
    fused_causal_attention,
    head_entropy,
)
from ln_removal.models.blocked_attention import blocked_attention
from ln_removal.norms.surgery import NormSites, install
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher
from ln_removal.training.setup import checkpoint_activations, training_attention

VOCABULARY, EOT, CONTEXT = 40, 39, 23
LENGTHS = (9, 4, 7)


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
        parameter.data *= 0.5  # surer of nothing, so it is better on random text and is heeded
    as_teacher(teacher, "float32").to(dtype)
    sites = with_partial_mix(model)
    auxiliary = None
    if terms == "constants":
        auxiliary = Auxiliary(0.3, "constants", "all")
    objective = Objective(
        model,
        eot_token_id=EOT,
        auxiliary=auxiliary,
        distillation=None if terms == "plain" else Distillation(teacher, 0.4, 0.3),
    )
    return objective, sites


def attend(objective: Objective, *, explicit: bool) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    for each in (objective.model, objective.teacher):
        if each is None:
            continue
        stack.enter_context(explicit_attention(each) if explicit else training_attention(each, context=1000))
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
            model, eot_token_id=EOT, auxiliary=auxiliary, distillation=Distillation(teacher, 0.4, 0.3)
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


def blocked_causal_attention(module: torch.nn.Module, *qkv: Any, scaling: float, document_mask: Tensor) -> Any:
    """`blocked_attention` with the parameters of an attention function."""
    return (blocked_attention(*qkv[:3], scaling, document_mask).transpose(1, 2),)


def test_all_attentions_compute_what_explicit_attention_does(flex_on_cpu: None) -> None:
    """With the masks of a CPU and of a GPU (here with PyTorch's reference implementation), over several blocks and a part of one."""
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
        (fused_causal_attention, mask),
        (fused_causal_attention, blocks),
        (blocked_causal_attention, mask),
    ):
        q, k, v = (torch.randn(2, 2, length, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
        for tensor in (q, k, v):
            tensor.requires_grad_()
        output = function(module, q, k, v, None, scaling=0.3, document_mask=given_mask)[0]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        (output * weights).sum().backward()
        results.append((output, q.grad, k.grad, v.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["of positions", "of pairs", "of pairs, added"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_users_own_forward_pass_is_not_observed(side: str, kind: str) -> None:
    model = make_model("gpt2", torch.float32)
    sites = with_partial_mix(model)
    ids = torch.randint(0, EOT, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    padded = slice(0, 5) if side == "left" else slice(7, 12)
    mask[1, padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    sees = mask.bool()[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    given = {"of positions": mask, "of pairs": sees, "of pairs, added": added}[kind]
    model.eval()  # no dropout
    for norm in sites.norms.values():
        norm.train()
    model(input_ids=ids, attention_mask=given, position_ids=positions)
    counts = {tuple(norm.std_count.tolist()) for norm in sites.norms.values()}
    assert counts == {(17.0, 0.0, 2.0)}
    found = {name: norm.std_sum.clone() for name, norm in sites.norms.items()}
    for norm in sites.norms.values():
        norm.std_sum.zero_()
    for row, kept in zip(ids, mask.bool(), strict=True):  # the same documents without padding
        model(input_ids=row[kept][None])
    for name, norm in sites.norms.items():
        torch.testing.assert_close(norm.std_sum, found[name])


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_of_documents_add_up_to_the_step(micro_batch: int) -> None:
    """Their rows hold different numbers of targets."""
    random = np.random.default_rng(0)
    index = TokenIndex({}, {}, VOCABULARY, EOT, "uint16", [Shard("train-0.bin", "train", "a", tokens=600)])
    split = TokenSplit(Path(), index, "train")
    tokens = random.integers(0, EOT, 600)
    tokens[np.cumsum(random.integers(2, 60, 20))[:10]] = EOT
    split.maps = [tokens]
    sampler = DocumentSampler(split, context=CONTEXT, sequences_per_step=7, seed=0, bos_rows=0.3)
    found = []
    for size in (7, micro_batch):
        objective, _ = objective_of("gpt2", torch.float32, "plain")
        total = torch.zeros(())
        with attend(objective, explicit=False):
            for batch in sampler.micro_batches(0, micro_batch=size):
                assert batch.document_starts is not None
                loss = objective(torch.from_numpy(batch.tokens), torch.from_numpy(batch.document_starts)).total
                (loss * batch.weight).backward()
                total += loss.detach() * batch.weight
        found.append((total, gradients(objective)))
    torch.testing.assert_close(found[1], found[0], **TOLERANCE[torch.float32])
