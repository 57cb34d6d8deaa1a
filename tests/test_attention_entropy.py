"""Attention entropy: its limits, its gradient, the explicit attention beside the fused one, and the penalty on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import tiny_neox
from torch import Tensor, nn

from ln_removal.models.attention import (
    EntropyRegulariser,
    attention_entropy,
    explicit_attention,
    head_entropy,
    largest_entropy,
    largest_row_entropy,
    record_attention,
)
from ln_removal.models.families import attentions_of, blocks_of

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel


@pytest.fixture(params=["gpt2", "gpt2 with scores scaled by layer", "neox"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "neox":
        return tiny_neox()
    found = request.getfixturevalue("tiny_gpt2")
    if request.param != "gpt2":
        for layer, block in enumerate(found.transformer.h):
            block.attn.scaling /= layer + 1
    return found


def causal_uniform(queries: int) -> Tensor:
    """(1, 1, T, T): row i looks at its i + 1 keys alike."""
    ones = torch.ones(queries, queries).tril()
    return (ones / ones.sum(-1, keepdim=True))[None, None]


@pytest.mark.parametrize("keys", [1, 2, 7, 128, 1000])
def test_a_uniform_row_has_the_log_of_its_keys_and_a_one_hot_row_nothing(keys: int) -> None:
    uniform = torch.full((1, 1, 1, keys), 1 / keys)
    assert attention_entropy(uniform).item() == pytest.approx(math.log(keys), abs=1e-5)
    one_hot = torch.zeros(2, 3, 5, keys)
    one_hot[..., keys // 2] = 1.0
    assert torch.equal(attention_entropy(one_hot), torch.zeros(2, 3, 5))
    assert largest_row_entropy(keys) == math.log(keys)


@pytest.mark.parametrize("queries", [1, 2, 24, 128])
def test_the_largest_entropy_of_a_causal_head_is_that_of_uniform_rows(queries: int) -> None:
    found = head_entropy(causal_uniform(queries)).item()
    assert found == pytest.approx(largest_entropy(queries), rel=1e-5, abs=1e-6)
    assert largest_entropy(queries) <= largest_row_entropy(queries)
    assert largest_entropy(128) / largest_row_entropy(128) == pytest.approx(0.8, abs=0.005)  # what TOLERANCE says


def test_the_gradient_is_finite_and_right_with_masked_keys_and_with_probabilities_that_underflow() -> None:
    scores = torch.tensor([[[[0.3, -200.0, 1.0, -torch.inf]]]], requires_grad=True)
    attention_entropy(scores.softmax(-1)).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    # d H / d s_i = - p_i (log p_i + H), and nothing moves where p is 0
    p = scores.detach().double().softmax(-1)
    entropy = attention_entropy(p).double()[..., None]
    expected = torch.where(p > 1e-30, -p * (p.clamp(min=1e-300).log() + entropy), 0.0)
    torch.testing.assert_close(scores.grad.double(), expected, atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_entropy_lies_between_one_key_and_all_and_does_not_depend_on_their_order(
    scores: list[float], random: Any
) -> None:
    s = torch.tensor(scores)[None, None, None].requires_grad_()
    found = attention_entropy(s.softmax(-1))
    assert -1e-6 <= found.item() <= math.log(len(scores)) + 1e-5
    assert found.item() == pytest.approx(torch.special.entr(s.detach().double().softmax(-1)).sum().item(), abs=1e-5)
    found.sum().backward()
    assert s.grad is not None and s.grad.isfinite().all()
    shuffled = s.detach()[..., random.sample(range(len(scores)), len(scores))]
    assert attention_entropy(shuffled.softmax(-1)).item() == pytest.approx(found.item(), abs=1e-5)


def test_a_nan_stays_a_nan_in_its_own_row_alone() -> None:
    rows = causal_uniform(4).clone()
    rows[0, 0, 2, 1] = torch.nan
    assert attention_entropy(rows).isnan().flatten().tolist() == [False, False, True, False]


def test_explicit_attention_computes_what_the_fused_one_does(model: PreTrainedModel, token_ids: Tensor) -> None:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        fused = model(token_ids).logits
        with explicit_attention(model):
            explicit = model(token_ids).logits
        after = model(token_ids).logits
    assert (fused - explicit).abs().max() < 1e-5 * fused.abs().max()
    assert torch.equal(fused, after) and model.config._attn_implementation == "sdpa"


def test_recorded_probabilities_are_those_of_transformers_eager_attention(
    model: PreTrainedModel, token_ids: Tensor
) -> None:
    with torch.no_grad():
        with record_attention(model, lambda probabilities: probabilities) as recorded:
            model(token_ids)
        model.set_attn_implementation("eager")
        eager = model(token_ids, output_attentions=True).attentions
    assert len(recorded) == len(eager) == len(blocks_of(model))
    for ours, theirs in zip(recorded, eager, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
        assert not ours.triu(1).any()


def test_float64_stays_float64(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    """Probabilities, entropy and the output, equal to the eager attention of transformers to more than float32 can hold."""
    wide = tiny_gpt2.double()
    with record_attention(wide, lambda probabilities: probabilities) as found, torch.no_grad():
        logits = wide(token_ids).logits
    assert {one.dtype for one in found} == {head_entropy(found[0]).dtype} == {logits.dtype} == {torch.float64}
    wide.set_attn_implementation("eager")
    with torch.no_grad():
        expected = wide(token_ids, output_attentions=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-12)
    for one, other in zip(found, expected.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_the_hooks_and_the_attention_are_gone_after_recording_even_after_an_error(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor
) -> None:
    before = tiny_gpt2.config._attn_implementation
    too_long = token_ids.repeat(1, 2)  # more positions than the model has
    with pytest.raises(IndexError), record_attention(tiny_gpt2, head_entropy) as recorded:
        tiny_gpt2(too_long)
    assert tiny_gpt2.config._attn_implementation == before
    tiny_gpt2(token_ids)
    assert recorded == []
    assert not any(attention._forward_hooks for attention in attentions_of(tiny_gpt2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_probabilities_are_float32_and_near_those_of_float32(
    model: PreTrainedModel, token_ids: Tensor, dtype: torch.dtype
) -> None:
    with torch.no_grad(), record_attention(model, lambda probabilities: probabilities) as recorded:
        model(token_ids)
        with torch.autocast("cpu", dtype=dtype):
            model(token_ids)
    layers = len(blocks_of(model))
    for exact, rounded in zip(recorded[:layers], recorded[layers:], strict=True):
        assert rounded.dtype is torch.float32
        assert 0 < (exact - rounded).abs().max() < 0.2


def test_the_penalty_is_its_formula() -> None:
    regulariser = EntropyRegulariser(2, 2, tolerance=0.2)
    largest = math.log(10)
    shares = torch.tensor([[0.1, 0.5], [0.69, 0.95]])  # below, inside, just inside, above
    with torch.no_grad():
        regulariser.thresholds[3] = 0.6
    expected = ((0.1 - 0.5) ** 2 + (0.95 - 0.6) ** 2) * largest**2 / 4
    assert regulariser.penalty(shares * largest, 10).item() == pytest.approx(expected, rel=1e-5)
    uniform = causal_uniform(10).expand(3, 2, 10, 10)
    by_hand = (largest_entropy(10) - torch.tensor([0.5, 0.5, 0.5, 0.6]) * largest).abs()
    by_hand = torch.where(by_hand > 0.2 * largest, by_hand.square(), 0.0).mean()
    assert regulariser([uniform, uniform]).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_training_on_the_penalty_alone_brings_heads_and_thresholds_together(
    model: PreTrainedModel, token_ids: Tensor
) -> None:
    heads = model.config.num_attention_heads
    regulariser = EntropyRegulariser(len(blocks_of(model)), heads, tolerance=0.02)
    parameters: list[nn.Parameter] = [*model.parameters(), *regulariser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    penalties = []
    with record_attention(model, lambda probabilities: probabilities) as recorded:
        for _ in range(12):
            recorded.clear()
            model(token_ids)
            penalty = regulariser(recorded)
            optimizer.zero_grad()
            penalty.backward()
            assert all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
            optimizer.step()
            penalties.append(penalty.item())
    assert penalties[-1] < 0.5 * penalties[0]
    assert (regulariser.thresholds != 0.5).any()
