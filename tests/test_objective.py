"""The training objective: cross-entropy, auxiliary losses and distillation on a GPT-2."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from torch import Tensor

from ln_removal.errors import UserError
from ln_removal.norms.surgery import install
from ln_removal.training import cross_entropy as linear
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher, outlier_loss, residual_std_loss
from ln_removal.training.setup import checkpoint_activations

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

EOT = 100


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


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_a_position_without_any_spread_has_a_finite_gradient(centred: bool) -> None:
    residual = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    residual[0, 1] = 0.0
    residual.requires_grad_()
    residual_std_loss(residual, torch.zeros(1, 3, dtype=torch.bool), centred=centred).backward()
    assert residual.grad is not None and residual.grad.isfinite().all()


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
    monkeypatch.setitem(linear.POSITIONS_IN_A_CHUNK, "cpu", 20)
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
    loss = Objective(tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.5))(token_ids)
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


@pytest.mark.parametrize("sites", ["ln_f", "all"])
def test_the_loss_towards_the_constants(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, sites: Literal["ln_f", "all"]
) -> None:
    installed = install(tiny_gpt2, eot_token_id=EOT)
    tiny_gpt2.train()
    tiny_gpt2(token_ids)
    installed.update_running(0.9)
    installed.set_mix("ln_2.0", 1.0)
    tiny_gpt2.eval()
    read: dict[str, Tensor] = {}
    readers = {"ln_f": tiny_gpt2.transformer.ln_f}
    for i, block in enumerate(tiny_gpt2.transformer.h):
        readers |= {f"ln_1.{i}": block.attn.c_attn, f"ln_2.{i}": block.ln_2}
    hooks = [
        reader.register_forward_pre_hook(lambda module, args, name=name: read.update({name: args[0].detach()}))
        for name, reader in readers.items()
    ]
    tiny_gpt2(token_ids[:, :-1])
    for hook in hooks:
        hook.remove()
    assert set(read) == set(installed.norms)
    plain = Objective(tiny_gpt2, eot_token_id=EOT).eval()(token_ids)
    found = Objective(tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.5, "constants", sites)).eval()(token_ids)
    watched = ["ln_f"] if sites == "ln_f" else list(installed.norms)
    parts = [
        (read[name].std(-1, correction=0) / installed.norms[name].running_std[0]).log().square() for name in watched
    ]
    expected = torch.stack([part.mean() for part in parts]).mean()
    assert found.total.item() == pytest.approx(plain.total.item() + 0.5 * expected.item(), rel=1e-4)
    found.total.backward()
    if sites == "all":
        early = Objective(tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.5, "constants", sites, early=3.0)).eval()
        expected = expected + 2 * parts[0].mean() / len(parts)  # the first of seven norms
        assert early(token_ids).total.item() == pytest.approx(plain.total.item() + 0.5 * expected.item(), rel=1e-4)


def test_the_loss_of_outlying_positions_is_their_own_mean() -> None:
    torch.manual_seed(0)
    stream = torch.randn(2, 50, 64, dtype=torch.float64)
    stream /= stream.std(-1, correction=0, keepdim=True)
    assert outlier_loss(stream, torch.tensor(1.0)) == 0
    stream[0, 3] *= 40
    stream[1, 7] /= 5
    for ratio in (1.5, 1.1):
        expected = ((math.log(40) - math.log(ratio)) ** 2 + (math.log(5) - math.log(ratio)) ** 2) / 2
        assert outlier_loss(stream, torch.tensor(1.0), ratio=ratio).item() == pytest.approx(expected, rel=1e-3)


def test_the_pull_on_outliers_is_added(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    installed = install(tiny_gpt2, eot_token_id=EOT)
    tiny_gpt2.train()
    tiny_gpt2(token_ids)
    installed.update_running(0.9)
    for norm in installed.norms.values():
        norm.running_std /= 3  # every position is outlying
    losses = {
        weight: Objective(
            tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.5, "constants", "all", outlier_weight=weight)
        )
        .eval()(token_ids)
        .total
        for weight in (0.0, 1.0, 2.0)
    }
    pull = losses[1.0] - losses[0.0]
    assert pull > 0.2  # about log(2) squared
    torch.testing.assert_close(losses[2.0] - losses[1.0], pull, rtol=1e-3, atol=1e-5)


def test_before_there_are_statistics_nothing_is_pulled_to_constants(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor
) -> None:
    sites = install(tiny_gpt2, eot_token_id=EOT)
    plain = Objective(tiny_gpt2, eot_token_id=EOT)
    pulled = Objective(tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.5, "constants", "all")).train()
    assert pulled(token_ids).total.item() == pytest.approx(plain(token_ids).total.item(), rel=1e-6)
    sites.update_running(0.9)
    assert pulled(token_ids).total > plain(token_ids).total + 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_that_ran_out_of_memory_leaves_nothing(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, checkpointing: bool
) -> None:
    teacher = as_teacher(copy.deepcopy(tiny_gpt2), "float32")
    sites = install(tiny_gpt2, eot_token_id=EOT)
    auxiliary = Auxiliary(0.1, "constants", sites="all")
    objective = Objective(
        tiny_gpt2, eot_token_id=EOT, auxiliary=auxiliary, distillation=Distillation(teacher, 0.5, 0.3)
    ).train()
    tiny_gpt2(token_ids)
    sites.update_running(0.9)
    for norm in sites.norms.values():
        norm.eval()
    expected = objective(token_ids).total
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in tiny_gpt2.named_parameters()}

    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    hook = tiny_gpt2.transformer.ln_f.register_forward_pre_hook(too_much)
    with pytest.raises(torch.OutOfMemoryError):
        objective(token_ids[:1])
    hook.remove()
    objective.zero_grad()
    if checkpointing:  # the hooks run once more in the backward pass
        checkpoint_activations(tiny_gpt2)
    found = objective(token_ids).total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    for name, parameter in tiny_gpt2.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_the_loss_towards_the_constants_needs_norms(tiny_gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(UserError, match="install"):
        Objective(tiny_gpt2, eot_token_id=EOT, auxiliary=Auxiliary(0.1, "constants"))


def test_a_model_taught_by_its_own_copy(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    teacher = as_teacher(copy.deepcopy(tiny_gpt2), "float32")
    plain = Objective(copy.deepcopy(tiny_gpt2), eot_token_id=EOT)(token_ids)
    sites = install(tiny_gpt2, eot_token_id=EOT)
    objective = Objective(tiny_gpt2, eot_token_id=EOT, distillation=Distillation(teacher, 0.4, 0.3)).train()
    loss = objective(token_ids)
    assert loss.total.item() == pytest.approx(plain.total.item(), rel=1e-5), "it is not behind its teacher yet"
    assert loss.cross_entropy.item() == pytest.approx(plain.cross_entropy.item(), rel=1e-5)
    sites.update_running(0.9)
    for site in sites.sites:
        sites.set_mix(site, 1.0)
    frozen = objective(token_ids)
    assert frozen.total != frozen.cross_entropy, "a frozen model is behind its teacher"
    frozen.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training and tiny_gpt2.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_of_another_shape_is_refused(tiny_gpt2: GPT2LMHeadModel) -> None:
    config = copy.deepcopy(tiny_gpt2.config)
    config.n_layer += 1
    with pytest.raises(UserError, match="n_layer"):
        Objective(tiny_gpt2, eot_token_id=EOT, distillation=Distillation(type(tiny_gpt2)(config), 0.5, 0.3))


def test_what_the_model_does_by_itself_is_not_part_of_the_loss(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    teacher = as_teacher(copy.deepcopy(tiny_gpt2), "float32")
    install(tiny_gpt2, eot_token_id=EOT)
    auxiliary = Auxiliary(0.1, sites="all")
    objective = Objective(
        tiny_gpt2, eot_token_id=EOT, auxiliary=auxiliary, distillation=Distillation(teacher, 0.5, 0.3)
    )
    expected = objective(token_ids).total
    for model in (tiny_gpt2, teacher):  # an evaluation, with batches of another shape
        model(token_ids[:1, :5])
    assert torch.equal(objective(token_ids).total, expected)
