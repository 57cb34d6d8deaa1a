"""Training with low-rank changes of the matrices (LoRA, Hu et al. 2021, arXiv 2106.09685), for models that do not fit otherwise.

    W = W_0 + B A        W_0 (out, in) fixed, A (r, in), B (out, r), B = 0 at first

W_0 and the embeddings need no gradients and no moments of the optimizer; norms and biases are trained in full. The change is a
parametrisation of PyTorch's: modules that read their own `weight`, such as the projections that own a norm, need not know of it.
`merge` makes ordinary matrices again, before norms are folded or a model is saved.

Shapes: r rank; a matrix (out, in), or (in, out) in a Conv1D, where A and B change their roles.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ln_removal.models.families import blocks_of, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRankChange(nn.Module):
    """Adds `up @ down` to a matrix.

    Args:
        weight: the matrix (rows, columns), looked at for its shape, type and device.
        rank: r.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns).normal_(std=1 / math.sqrt(columns)))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, columns) to the same."""
        return torch.addmm(weight, self.up, self.down)


def adapt(model: PreTrainedModel, rank: int) -> None:
    """Fix the matrices inside the blocks, each with a trained change of rank `rank`, and the embeddings; in place.

    The model computes the same at first. It may have freezable norms.
    """
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.requires_grad_(False)
    for module in _maps(model):
        weight = module.get_parameter("weight")
        parametrize.register_parametrization(module, "weight", LowRankChange(weight.detach(), rank))


def merge(model: PreTrainedModel) -> None:
    """Undo `adapt`, keeping what was learned: the matrices become ordinary parameters again. A model without changes stays as it is."""
    for module in _maps(model):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for parameter in model.parameters():
        parameter.requires_grad_()


def _maps(model: PreTrainedModel) -> list[nn.Module]:
    """The linear maps inside the blocks."""
    family = family_of(model.config)
    return [
        block.get_submodule(path) for block in blocks_of(model) for path in (*family.qkv, *family.mlp, *family.others)
    ]
