"""The precision of a forward pass and of a saved model.

During training the weights stay in float32, and matrix products run in the type named here. Outside of compiled code,
`fused_gelu` computes GPT-2's activation to the same precision in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

LOSS_SCALE: dict[Precision, float] = {"float32": 1.0, "bfloat16": 1.0, "float16": 4096.0}
"""What the loss is multiplied with before the backward pass, and the gradient divided by after it: float16 has nothing between
0 and 6e-8, and a mean over thousands of tokens has gradients there. Constant: an update skipped while a scale is searched
would count as one that diverges (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2)."""

BESIDE_WEIGHTS = 1 << 22
"""Bytes of a model's directory that are not weights, generously: the tokenizer of GPT-2 takes 3.6 MB."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass in `precision`."""
    narrow = precision != "float32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if narrow else torch.bfloat16, enabled=narrow)


@contextmanager
def fused_gelu(model: nn.Module) -> Iterator[None]:
    """Compute GPT-2's activation `gelu_new` in one kernel, and afterwards as before.

    transformers writes it as eight operations, each of which reads and writes the hidden layer of the MLP. Where nothing is
    compiled that is a sixth to a third of a forward pass on a CPU. The two differ by rounding.
    """
    from transformers.activations import GELUTanh, NewGELUActivation

    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is NewGELUActivation
    ]
    before = [getattr(module, name) for module, name in places]
    fused = GELUTanh()
    try:
        for module, name in places:
            setattr(module, name, fused)
        yield
    finally:
        for (module, name), own in zip(places, before, strict=True):
            setattr(module, name, own)


def export_bytes(model: PreTrainedModel, dtype: str = "float32") -> int:
    """What `save_model` is going to write, in bytes; at most a few megabytes too high."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return count * getattr(torch, dtype).itemsize + BESIDE_WEIGHTS
