"""Cross-entropy on a token split against a plain window-by-window computation."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ln_removal.data.sampler import plan_windows
from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, TokenSplit, write_index
from ln_removal.errors import UserError
from ln_removal.evaluation import loss as loss_module
from ln_removal.evaluation.loss import cross_entropy, summarise

VOCABULARY = 101  # of the tiny_gpt2 fixture
CONTEXT = 16
BYTES = 340


def make_split(directory: Path, lengths: list[int], *, size: int = BYTES) -> TokenSplit:
    random = np.random.default_rng(0)
    index = TokenIndex(
        corpus={"name": "test"},
        tokenizer={"name": "t", "sha256": ""},
        vocab_size=VOCABULARY,
        eot_token_id=100,
        dtype="uint16",
    )
    for number, length in enumerate(lengths):
        file = f"validation-{number}.bin"
        random.integers(0, VOCABULARY, length).astype(np.uint16).tofile(directory / file)
        share = size if number == 0 else 0
        index.shards.append(Shard(file, "validation", "test", tokens=length, documents=1, bytes=share))
    write_index(directory, index)
    return TokenDataset.open(directory).split("validation")


def plain_losses(model: nn.Module, split: TokenSplit) -> tuple[list[float], list[float]]:
    """Per-token losses and per-window means in float64, one window at a time, from the whole logits."""
    model = copy.deepcopy(model).double().eval()
    losses: list[float] = []
    means: list[float] = []
    for shard in range(len(split.shards)):
        tokens = torch.from_numpy(split.read(shard, 0, split.shards[shard].tokens))
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            with torch.no_grad():
                log_probs = model(window[None, :-1]).logits[0].log_softmax(-1)
            here = [-float(log_probs[t, window[t + 1]]) for t in range(len(window) - 1)]
            losses += here
            means.append(sum(here) / len(here))
    return losses, means


def test_equals_a_plain_computation(tiny_gpt2: nn.Module, tmp_path: Path) -> None:
    split = make_split(tmp_path, [50, 33])
    losses, _ = plain_losses(tiny_gpt2, split)
    result = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    assert result.tokens == len(losses) == 49 + 32
    assert result.windows == 4 + 2
    assert result.cross_entropy == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.median == pytest.approx(np.median(losses), abs=1e-4)
    assert result.percentile_95 == pytest.approx(np.percentile(losses, 95), abs=1e-4)
    assert result.percentile_99_9 == pytest.approx(np.percentile(losses, 99.9), abs=1e-4)
    assert result.bits_per_byte == pytest.approx(np.mean(losses) / math.log(2) * 83 / BYTES, rel=1e-5)


def test_float64_model_is_scored_in_float64(tiny_gpt2: nn.Module, tmp_path: Path) -> None:
    split = make_split(tmp_path, [65])
    losses, _ = plain_losses(tiny_gpt2, split)
    assert cross_entropy(tiny_gpt2.double(), split, context=CONTEXT).cross_entropy == pytest.approx(
        np.mean(losses), abs=1e-12
    )


def test_standard_error_is_over_windows(tiny_gpt2: nn.Module, tmp_path: Path) -> None:
    split = make_split(tmp_path, [1 + 6 * CONTEXT])
    _, means = plain_losses(tiny_gpt2, split)
    result = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    assert result.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(6), rel=1e-4)


def test_one_window_has_no_standard_error_and_unknown_bytes_give_no_bits(tiny_gpt2: nn.Module, tmp_path: Path) -> None:
    result = cross_entropy(tiny_gpt2, make_split(tmp_path, [9], size=0), context=CONTEXT)
    assert (result.windows, result.tokens) == (1, 8)
    assert result.standard_error is None
    assert result.bits_per_byte is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_chunks_change_nothing(
    tiny_gpt2: GPT2LMHeadModel, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(tmp_path, [150, 33])
    whole = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", 1)
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    seen: list[int] = []
    tiny_gpt2.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    result = cross_entropy(tiny_gpt2, split, context=CONTEXT, batch_size=batch_size)
    assert max(seen) == 5, "the logits of more than one chunk existed at once"
    assert sum(seen) == result.tokens
    assert result.cross_entropy == pytest.approx(whole.cross_entropy, abs=1e-6)
    assert result.percentile_99_9 == pytest.approx(whole.percentile_99_9, abs=1e-5)


def test_scoring_computes_gelu_in_one_kernel_and_leaves_the_model_as_it_was(tiny_gpt2: GPT2LMHeadModel) -> None:
    ids = torch.arange(12)[None]
    before = {name: id(module) for name, module in tiny_gpt2.named_modules()}
    plain = tiny_gpt2.double()
    with torch.no_grad():
        log_probs = plain.eval()(ids[:, :-1]).logits[0].log_softmax(-1)
    plain.train()
    with loss_module.scoring(plain, torch.device("cpu"), "float32"):
        losses = loss_module.position_losses(plain, ids[:, :-1], ids[0, 1:])
        assert not any("NewGELU" in type(module).__name__ for module in plain.modules())
    assert losses.tolist() == pytest.approx((-log_probs.gather(1, ids[0, 1:, None])[:, 0]).tolist(), abs=1e-12)
    assert {name: id(module) for name, module in plain.named_modules()} == before
    assert all(module.training for module in plain.modules())


def test_memory_error_halves_the_batch(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    split = make_split(tmp_path, [200])
    expected = cross_entropy(tiny_gpt2, split, context=CONTEXT).cross_entropy
    sizes: list[int] = []

    def small_memory(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")

    tiny_gpt2.transformer.register_forward_pre_hook(small_memory, with_kwargs=True)
    result = cross_entropy(tiny_gpt2, split, context=CONTEXT, batch_size=8)
    assert max(sizes) == 8
    assert result.cross_entropy == pytest.approx(expected, abs=1e-6)


def test_freezable_norms_and_other_models(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    from ln_removal.norms.surgery import install

    class Bare(nn.Module):
        """A language model that does not show its body."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, **inputs: Tensor) -> object:
            return self.inner(**inputs)

    split = make_split(tmp_path, [80])
    expected = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    assert cross_entropy(Bare(tiny_gpt2), split, context=CONTEXT).cross_entropy == pytest.approx(
        expected.cross_entropy, abs=1e-6
    )
    install(tiny_gpt2, eot_token_id=100)
    tiny_gpt2.train()
    before = {name: value.clone() for name, value in tiny_gpt2.named_buffers()}
    result = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    assert result.cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-5)
    assert tiny_gpt2.training, "the model's mode was not restored"
    changed = [name for name, value in tiny_gpt2.named_buffers() if not torch.equal(value, before[name])]
    assert not changed, "evaluation moved running statistics"


def test_windows_cover_every_target_once() -> None:
    windows = plan_windows([50, 1, 33, 0, 2], 16)
    targets = [(w.shard, w.start + 1 + i) for w in windows for i in range(w.count)]
    assert targets == [(s, t) for s, tokens in enumerate([50, 1, 33, 0, 2]) for t in range(1, tokens)]


def test_limited_windows_are_whole_spread_and_within_the_limit() -> None:
    windows = plan_windows([1000, 1000], 16, 160)
    assert len(windows) == 10 and all(w.count == 16 for w in windows)
    assert [w.shard for w in windows] == [0] * 5 + [1] * 5
    starts = [w.shard * 1000 + w.start for w in windows]
    assert max(b - a for a, b in itertools.pairwise(starts)) < 2 * 2000 / 10
    assert len(plan_windows([1000], 16, 3)) == 1
    assert plan_windows([1000], 16, 10_000) == plan_windows([1000], 16)


def test_uneven_windows_weigh_by_their_tokens() -> None:
    losses = np.array([1.0, 1.0, 1.0, 5.0])
    result = summarise(losses, [3, 1], tokens=5, size=10)
    assert result.cross_entropy == 2.0
    assert result.standard_error == pytest.approx(math.sqrt(2 * ((3 / 4 * 1) ** 2 + (1 / 4 * 3) ** 2)))


@pytest.mark.parametrize(
    ("lengths", "context", "message"), [([1, 1], 16, "too few"), ([50], 33, "at most 32"), ([50], 0, "at least 1")]
)
def test_user_errors(tiny_gpt2: nn.Module, tmp_path: Path, lengths: list[int], context: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cross_entropy(tiny_gpt2, make_split(tmp_path, lengths), context=context)
