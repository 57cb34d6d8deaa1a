"""The training objective: chunked cross-entropy, the residual-std loss, and both together on a GPT-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ln_removal import objective as objective_module
from ln_removal.objective import Objective, chunked_cross_entropy, residual_std_loss
from ln_removal.surgery import install

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

EOT = 100
WIDTH, VOCABULARY = 7, 11


def head(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (rows, WIDTH), unembedding (VOCABULARY, WIDTH), logit bias (VOCABULARY,), targets (rows,)."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (rows,), generator=generator)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 12, 13])
def test_chunked_cross_entropy_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int, with_bias: bool) -> None:
    monkeypatch.setattr(objective_module, "LOGITS_IN_A_CHUNK", 4 * VOCABULARY + 3)  # four rows a chunk
    hidden, weight, bias, targets = head(rows)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    expected = F.cross_entropy(F.linear(hidden, weight, bias if with_bias else None), targets)
    found = chunked_cross_entropy(hidden, weight, targets, bias if with_bias else None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(
        torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "LOGITS_IN_A_CHUNK", 1)
    hidden, weight, bias, targets = head(3)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, bias), expected)


def largest_saved(rows: int) -> int:
    """Elements of the largest tensor that the forward pass keeps for the backward pass."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden, weight, bias, targets = head(rows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, targets, bias).backward()
    return max(sizes)


def test_the_logits_of_a_large_batch_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 40
    assert largest_saved(rows) >= rows * VOCABULARY, "in one chunk they are"
    monkeypatch.setattr(objective_module, "LOGITS_IN_A_CHUNK", 4 * VOCABULARY)
    assert largest_saved(rows) <= max(rows * WIDTH, WIDTH * VOCABULARY)


def test_cross_entropy_is_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = head(9)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    for chunk in (4 * VOCABULARY, 1 << 24):
        monkeypatch.setattr(objective_module, "LOGITS_IN_A_CHUNK", chunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = chunked_cross_entropy(hidden, weight, targets, bias)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def plain_residual_std_loss(residual: Tensor, special: Tensor) -> float:
    """The same, position by position in Python."""
    stds: dict[tuple[int, int], float] = {}
    for b in range(residual.shape[0]):
        for t in range(residual.shape[1]):
            row = residual[b, t].tolist()
            mean = sum(row) / len(row)
            stds[b, t] = (sum((x - mean) ** 2 for x in row) / len(row)) ** 0.5
    ordinary = [std for (b, t), std in stds.items() if not special[b, t]]
    target = sum(ordinary) / len(ordinary)
    return sum((std - target) ** 2 for std in stds.values()) / len(stds)


def residual_and_special() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    residual = 3 * torch.randn(3, 6, 8, generator=generator) + 1
    residual[:, 0] *= 20
    special = torch.zeros(3, 6, dtype=torch.bool)
    special[:, 0] = True
    special[1, 4] = True
    return residual, special


def test_residual_std_loss_is_its_definition() -> None:
    residual, special = residual_and_special()
    expected = plain_residual_std_loss(residual, special)
    assert residual_std_loss(residual, special).item() == pytest.approx(expected, rel=1e-5)
    assert residual_std_loss(residual.bfloat16(), special).dtype == torch.float32


def test_the_target_has_no_gradient() -> None:
    residual, special = residual_and_special()
    residual.requires_grad_()
    stds = residual.std(dim=-1, correction=0)
    target = stds[~special].mean().item()
    (expected,) = torch.autograd.grad((stds - target).square().mean(), residual)
    (found,) = torch.autograd.grad(residual_std_loss(residual, special), residual)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    stds = residual.std(dim=-1, correction=0)
    (through,) = torch.autograd.grad((stds - stds[~special].mean()).square().mean(), residual)
    assert (found - through).abs().max() > 1e-3, "the test must be able to tell"


def test_only_special_positions_leave_the_loss_finite() -> None:
    residual, special = residual_and_special()
    assert residual_std_loss(residual, torch.ones_like(special)).isfinite()


@pytest.mark.parametrize("installed", [False, True])
def test_the_objective_is_hugging_faces_loss(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    expected = tiny_gpt2(token_ids, labels=token_ids).loss
    expected.backward()
    gradient = tiny_gpt2.transformer.wte.weight.grad.clone()
    tiny_gpt2.zero_grad()
    if installed:
        install(tiny_gpt2, eot_token_id=EOT)
    monkeypatch.setattr(objective_module, "LOGITS_IN_A_CHUNK", 20 * 101)
    loss = Objective(tiny_gpt2, eot_token_id=EOT)(token_ids)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.cross_entropy, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not loss.cross_entropy.requires_grad
    loss.total.backward()
    torch.testing.assert_close(tiny_gpt2.transformer.wte.weight.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("installed", [False, True])
def test_the_auxiliary_loss_reads_what_ln_f_reads(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, installed: bool
) -> None:
    if installed:
        install(tiny_gpt2, eot_token_id=EOT)
    inputs = token_ids[:, :-1]
    residuals: list[Tensor] = []
    hook = tiny_gpt2.transformer.ln_f.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
    tiny_gpt2(inputs)
    hook.remove()
    special = inputs == EOT
    special[:, 0] = True
    assert special.sum() > len(special) and (inputs[:, 0] == EOT).any()
    auxiliary = plain_residual_std_loss(residuals[0].detach(), special)
    plain = Objective(tiny_gpt2, eot_token_id=EOT)(token_ids)
    loss = Objective(tiny_gpt2, eot_token_id=EOT, auxiliary_weight=0.5)(token_ids)
    assert loss.cross_entropy.item() == pytest.approx(plain.cross_entropy.item(), rel=1e-6)
    assert loss.total.item() == pytest.approx(plain.total.item() + 0.5 * auxiliary, rel=1e-5)


def test_training_has_no_dropout(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2)).train()
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0.1
    assert model(token_ids, labels=token_ids).loss != model(token_ids, labels=token_ids).loss
    objective = Objective(model, eot_token_id=None).train()
    assert torch.equal(objective(token_ids).total, objective(token_ids).total)
    assert model.config.resid_pdrop == 0.1, "the configuration is the model's own"
