"""Linear maps that have the biases of ReLU's Revival: queries and keys have one, values and the other projections none.

Jha & Reagen (2024, arXiv 2410.09637) train every arm, with and without LayerNorm, with this pattern.

Shape legend: D model width, H heads, K width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class QueryKeyBiasConv1D(Conv1D):
    """GPT-2's c_attn, (D) to (3 D) in the order queries, keys, values, with a bias of (2 D) for the first two."""

    def __init__(self, width: int) -> None:
        super().__init__(3 * width, width)
        self.bias = nn.Parameter(torch.zeros(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3 D)."""
        bias = F.pad(self.bias, (0, self.nx))
        return torch.addmm(bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class BiaslessConv1D(Conv1D):
    """Conv1D, `inputs` to `outputs`, without a bias."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)
        del self.bias
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return torch.mm(x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class QueryKeyBiasLinear(nn.Linear):
    """GPT-NeoX's query_key_value, (D) to (3 D) in the order head by head: queries, keys, values, with a bias of (2 H K)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.heads = heads
        self.bias = nn.Parameter(torch.zeros(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3 D)."""
        by_head = self.bias.view(self.heads, -1)
        return F.linear(x, self.weight, F.pad(by_head, (0, by_head.shape[1] // 2)).flatten())
