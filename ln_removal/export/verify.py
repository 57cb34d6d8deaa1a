"""Check a folded model before it is written: same logits, no norm left, nothing that reads a token's own statistics.

Shapes: B batch, T positions, D model width, V vocabulary, N sampled positions.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.families import family_of
from ln_removal.norms.freezable import FreezableNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest accepted relative error, of logits and of the affine check, in float32."""

EXACT = 1e-8
"""Largest accepted relative error of the logits in float64."""

AFFINE_POSITIONS = 256
"""N, at how many positions each reader is checked."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, FreezableNorm)


class ExportError(UserError):
    """The folded model does not compute what the frozen one does, or still has a norm."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_export` measured.

    Attributes:
        max_relative_error: largest absolute difference of the logits over the largest absolute logit.
        no_norm_modules: whether the module tree is free of norms; always true, since a norm raises.
        affine_error: largest relative deviation of any reader from an affine map of the residual stream.
    """

    max_relative_error: float
    no_norm_modules: bool
    affine_error: float


def verify_export(
    frozen_model: PreTrainedModel, folded: PreTrainedModel, input_ids: Tensor, *, seed: int = 0
) -> VerifyReport:
    """Check a folded model against the frozen model that it was folded from.

    Both are run in evaluation mode, in the dtype of their weights (give float32 ones) and without autocast or reduced
    matrix precision, one sequence at a time; their training mode is put back afterwards.

    Args:
        frozen_model: with freezable norms, all frozen.
        folded: the model to be written.
        input_ids: (B, T) held-out text, not more than n_positions long.
        seed: of the random combinations in the affine check.

    Raises:
        ExportError: a norm is left in `folded`, its logits differ by more than TOLERANCE relative to the largest logit
            for another reason than float32 rounding in a model with huge activations (decided in float64; a warning is
            logged then), or what a reader gets is not an affine function of the residual stream.
    """
    if left := norm_modules(folded):
        raise ExportError(
            f"the folded model still has {len(left)} norm module(s), the first {left[0]}; "
            "fold it with ln_removal.fold and build it with from_folded"
        )
    with _exact_evaluation(frozen_model, folded):
        error = _logits_error(frozen_model, folded, input_ids)
        if not error <= TOLERANCE:  # not <=: a NaN has to fail
            _blame_rounding_or_raise(frozen_model, folded, input_ids, error)
        affine, reader = _affine_error(folded, input_ids, seed)
        if not affine <= TOLERANCE:  # again in float64, where rounding cannot be what shows
            affine, reader = _affine_error(copy.deepcopy(folded).double(), input_ids, seed)
    if not affine <= TOLERANCE:
        raise ExportError(
            f"{reader} does not get an affine function of the residual stream (relative deviation {affine:.2e}, more "
            f"than {TOLERANCE:.0e}), so something in the folded model still normalises; do not publish it as LN-free"
        )
    return VerifyReport(max_relative_error=error, no_norm_modules=True, affine_error=affine)


def readers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By name, each norm slot with the linear map that reads it."""
    family, layers = family_of(model.config), model.config.num_hidden_layers
    norms = family.norms(layers)
    return {
        path: (model.get_submodule(norms[norm]), model.get_submodule(path))
        for path, norm in family.readers(layers).items()
    }


def _blame_rounding_or_raise(frozen: PreTrainedModel, folded: PreTrainedModel, input_ids: Tensor, error: float) -> None:
    """Decide in float64 whether a difference in float32 is a wrong fold or only rounding.

    A model whose activations are thousands of times its constants magnifies float32 rounding beyond TOLERANCE in the
    frozen model just as in the folded one. Then the fold is right when, done and run in float64, it agrees with the
    frozen model, and when the folded weights are those of that fold.
    """
    from ln_removal.models.norm_free import from_folded
    from ln_removal.norms.surgery import fold

    wide = copy.deepcopy(frozen).double()
    try:
        expected = fold(wide)
    except UserError as reason:  # not frozen: then the logits could not agree
        raise ExportError(
            f"the folded model's logits differ from the other model's by {error:.2e} relative, more than {TOLERANCE:.0e}: {reason}"
        ) from reason
    exact = _logits_error(wide, from_folded(wide.config, expected), input_ids)
    found = folded.state_dict()
    same_weights = set(found) == set(expected) and all(
        torch.allclose(found[name].double().cpu(), value.cpu(), rtol=1e-5, atol=1e-6 * float(value.abs().max()))
        for name, value in expected.items()
    )
    own = _logits_error(wide, frozen, input_ids)
    if not (exact <= EXACT and same_weights and math.isfinite(error)):
        raise ExportError(
            f"the folded model's logits differ from the frozen model's by {error:.2e} relative, more than {TOLERANCE:.0e}, "
            f"and by {exact:.2e} in float64; check that both models come from the same training state"
        )
    logger.warning(
        "the folded model is exact in float64 (%.0e), but in float32 its logits differ from the frozen model's by %.1e "
        "relative; the frozen model is itself %.1e off its float64 values: its activations are huge, so train it longer",
        exact,
        error,
        own,
    )


def logits_error(reference: PreTrainedModel, candidate: PreTrainedModel, input_ids: Tensor) -> float:
    """Largest absolute difference of two models' logits over the largest absolute logit of the reference.

    For any two forms of a model, such as a frozen one and its stock export. Evaluation mode, as in `verify_export`.

    Args:
        reference, candidate: models over the same vocabulary.
        input_ids: (B, T) tokens.
    """
    with _exact_evaluation(reference, candidate):
        return _logits_error(reference, candidate, input_ids)


@torch.no_grad()
def position_errors(reference: PreTrainedModel, candidate: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, T) as `logits_error`, but for each position by itself, relative to its own largest logit.

    Args:
        reference, candidate: models over the same vocabulary.
        input_ids: (B, T) tokens.
    """
    rows: list[Tensor] = []
    with _exact_evaluation(reference, candidate):
        for row in input_ids.split(1):  # one at a time: (1, T, V) is large enough
            expected = _wide(reference(row.to(reference.device), use_cache=False).logits)
            found = _wide(candidate(row.to(candidate.device), use_cache=False).logits).to(expected.device)
            rows.append((found - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1))
    return torch.cat(rows)


def norm_modules(model: nn.Module) -> list[str]:
    """Paths, with type, of all modules that are a norm by their class or by its name, without those that the family keeps."""
    config = getattr(model, "config", None)
    kept = [] if config is None else family_of(config).kept_norms(config.num_hidden_layers)
    return [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if (isinstance(module, _NORMS) or type(module).__name__.lower().endswith(("norm", "normalization")))
        and path not in kept
    ]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits_error(reference: PreTrainedModel, candidate: PreTrainedModel, input_ids: Tensor) -> float:
    difference, size = 0.0, 0.0
    for row in input_ids.split(1):  # one at a time: (1, T, V) is large enough
        expected = _wide(reference(row.to(reference.device), use_cache=False).logits)
        found = _wide(candidate(row.to(candidate.device), use_cache=False).logits).to(expected.device)
        worst, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        difference = worst if not worst <= difference else difference  # keeps a NaN
        size = max(size, largest)
    return difference / size if size else difference


def _affine_error(model: PreTrainedModel, input_ids: Tensor, seed: int) -> tuple[float, str]:
    """The largest deviation over all readers, and the reader that shows it.

    A reader f (norm slot and the map behind it) is affine if f(a x + (1 - a) z) = a f(x) + (1 - a) f(z) for any
    residual streams x, z and any number a. LayerNorm fails by far: it maps x and 2x to the same.
    """
    read_by = readers(model)
    streams = _residual_streams(model, {name: slot for name, (slot, _) in read_by.items()}, input_ids)
    generator = torch.Generator().manual_seed(seed)
    worst, where = 0.0, next(iter(read_by))
    for name, (slot, behind) in read_by.items():
        x = streams[name]  # (N, D)
        n = x.shape[0]
        # Shifting a random order by one pairs each position with another one.
        order = torch.randperm(n, generator=generator)
        z = torch.empty_like(x)
        z[order] = x[order.roll(1)]
        # From -0.5 to 1.5, beyond the segment between x and z.
        a = (2 * torch.rand(n, 1, generator=generator) - 0.5).to(x)

        def f(residual: Tensor, slot: nn.Module = slot, behind: nn.Module = behind) -> Tensor:
            output: Tensor = behind(slot(residual.unsqueeze(0)))
            return output.squeeze(0)

        at_x, at_z, between = f(x), f(z), f(a * x + (1 - a) * z)
        deviation = (between - a * at_x - (1 - a) * at_z).abs().amax(dim=1)
        # Relative to each position's own outputs, lest one huge position hide all others.
        scale = torch.stack((at_x, at_z, between)).abs().amax(dim=(0, 2)).clamp(min=torch.finfo(x.dtype).tiny)
        error = (deviation / scale).max().item()
        if not error <= worst:  # also for NaN, which then stays
            worst, where = error, name
            if error != error:
                break
    return worst, where


def _residual_streams(model: PreTrainedModel, slots: dict[str, nn.Module], input_ids: Tensor) -> dict[str, Tensor]:
    """What enters each norm slot, (N, D), at N positions spread over the text, position 0 of each sequence included."""
    rows = input_ids[: max(1, AFFINE_POSITIONS // 8)].to(model.device)
    captured: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, slot in slots.items():

            def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                captured[name] = args[0].detach()

            stack.enter_context(_removed_afterwards(slot.register_forward_pre_hook(keep)))
        model.base_model(rows, use_cache=False)
    columns = max(2, AFFINE_POSITIONS // rows.shape[0])
    chosen = torch.linspace(0, rows.shape[1] - 1, min(columns, rows.shape[1])).long().to(model.device)
    return {name: stream[:, chosen].reshape(-1, stream.shape[-1]) for name, stream in captured.items()}


@contextmanager
def _removed_afterwards(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _exact_evaluation(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, full matrix precision; all put back afterwards."""
    undo: list[Callable[[], object]] = []
    precision = torch.get_float32_matmul_precision()
    try:
        for model in models:
            undo.append(lambda model=model, training=model.training: model.train(training))  # type: ignore[misc]
            model.eval()
        # TensorFloat-32 is off by 1e-3, which a training run may want but a verdict at 1e-4 cannot use.
        torch.set_float32_matmul_precision("highest")
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device in {model.device.type for model in models}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for put_back in undo:
            put_back()
