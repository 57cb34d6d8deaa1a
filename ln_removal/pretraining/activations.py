"""The leaky ReLU of an MLP with a slope that is fixed, learned layer by layer, or learned once for the whole network.

    leaky(x) = max(x, 0) + slope * min(x, 0)

Jha & Reagen (2024, arXiv 2410.09637, section 3) train the slope, from 0.01, to see which activation a model without
LayerNorm asks for. GELU and ReLU are transformers' own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnableLeakyReLU(nn.Module):
    """Leaky ReLU whose negative slope is a parameter: a scalar of shape (), which optimizers here do not decay.

    Args:
        initial: the slope before training.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.slope = nn.Parameter(torch.tensor(float(initial)))

    def reset_parameters(self) -> None:
        """Back to the slope before training."""
        nn.init.constant_(self.slope, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the type of `x`, whatever that of the slope."""
        return torch.where(x > 0, x, x * self.slope.to(x.dtype))

    def extra_repr(self) -> str:
        """What printing a model shows of it."""
        return f"initial={self.initial}"


def learnable_slopes(model: nn.Module) -> dict[str, Tensor]:
    """The learnable slopes of a model by parameter name, each once: one for the network, one a layer, or none at all."""
    modules = {f"{name}.slope": module for name, module in model.named_modules()}
    return {name: module.slope for name, module in modules.items() if isinstance(module, LearnableLeakyReLU)}
