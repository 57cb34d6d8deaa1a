"""The probe: measures attention, residual stream and gradients of a model while it trains, and leaves the training unchanged.

Shape legend: B sequences, T positions, D model width, H heads, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ln_removal.models.attention import head_entropy, record_attention
from ln_removal.models.families import blocks_of
from ln_removal.models.norm_choice import learnable_slopes
from ln_removal.models.precision import Precision, autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Figures = dict[str, Any]
"""Numbers and (nested) lists of numbers by name, as a row of metrics.jsonl holds them; NaN where there is none."""


class Probe:
    """Measures a model on a fixed batch, in some steps, between the backward pass and the update.

    It makes a forward pass of its own, in evaluation mode and without gradients. Afterwards weights, gradients, modes, running
    statistics, attention implementation, hooks, random states and the compiled step are as they were before.

    Args:
        tokens: the batch, (B, T) int64. Runs that are to be compared need the same batch.
        every: steps between two observations. The first and the last step of the run are always observed.
        steps: the length of the run.
        precision: of the forward pass. With the training's precision, what overflows there overflows here too.
    """

    def __init__(self, tokens: Tensor, *, every: int, steps: int, precision: Precision = "float32") -> None:
        assert tokens.ndim == 2 and tokens.numel() > 0, tokens.shape
        assert every >= 1 and steps >= 1, (every, steps)
        self.tokens, self.every, self.steps, self.precision = tokens, every, steps, precision

    def wants(self, step: int) -> bool:
        """Whether to observe step `step`, counted from 0."""
        return step % self.every == 0 or step == self.steps - 1

    def observe(self, model: PreTrainedModel) -> Figures:
        """Measure the model on the batch, and the gradients that its parameters hold.

        Returns:
            `queries`: T, from which the largest possible entropy follows.
            `entropy`: (L, H), mean over sequences and queries, nats; NaN where a head has a NaN among its probabilities.
            `nan_counts`: (L,), NaN among the B H T T entries of each layer's attention matrices.
            `attention_entries`: B H T T, the number of entries that `nan_counts` counts in.
            `nonfinite_residual`: (L + 1,), how many of the B T D entries of the residual stream are NaN or infinite, in front
                of each block and behind the last.
            `residual_norm`: (L + 1,), mean over positions of the stream's L2 norm, at the same places.
            `gradient_norm`: (L,), L2 norm of the gradient of each block's parameters, after the loop has clipped it; NaN where
                there is no gradient.
            `slopes`: the learnable slopes, from the first layer to the last, or the one of the whole network, or none.
        """
        self.tokens = self.tokens.to(model.device)
        stream: list[Tensor] = []
        with (
            torch.no_grad(),
            _evaluation_mode(model),
            _residual_stream(model, stream),
            record_attention(model, _entropy_and_nans) as heads,
            autocast(model.device, self.precision),
        ):
            model.base_model(input_ids=self.tokens, use_cache=False)
            gradients = torch.stack([_gradient_norm(block, model.device) for block in blocks_of(model)])
            slopes = [slope.float() for slope in learnable_slopes(model).values()]
        entropy = torch.stack([entropy for entropy, _ in heads])
        norms, faults = torch.stack(stream).unbind(1)
        sequences, queries = self.tokens.shape
        return {
            "queries": queries,
            "entropy": entropy.tolist(),
            "nan_counts": torch.stack([nans for _, nans in heads]).tolist(),
            "attention_entries": sequences * entropy.shape[1] * queries * queries,
            "nonfinite_residual": [int(count) for count in faults.tolist()],
            "residual_norm": norms.tolist(),
            "gradient_norm": gradients.tolist(),
            "slopes": torch.stack(slopes).tolist() if slopes else [],
        }


def _entropy_and_nans(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    return head_entropy(probabilities), probabilities.isnan().sum()


def _norm_and_faults(residual: Tensor) -> Tensor:
    """(2,) in float64: mean L2 norm over positions, and how many of the entries of (B, T, D) are not finite."""
    norm = residual.float().norm(dim=-1).mean().double()
    return torch.stack([norm, (~residual.isfinite()).sum().double()])


def _gradient_norm(block: nn.Module, device: torch.device) -> Tensor:
    """Scalar in float32; NaN when no parameter of the block has a gradient."""
    gradients = [parameter.grad.float() for parameter in block.parameters() if parameter.grad is not None]
    if not gradients:
        return torch.tensor(math.nan, device=device)
    return torch.stack(torch._foreach_norm(gradients)).norm()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards each into the mode that it had: they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _residual_stream(model: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    """Append `_norm_and_faults` of each block's input, and of the last block's output, to `kept` in every forward pass."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(_norm_and_faults(args[0]))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(_norm_and_faults(output[0] if isinstance(output, tuple) else output))

    blocks = blocks_of(model)
    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
