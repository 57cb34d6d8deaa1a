"""How a part of the residual stream is read: through a LayerNorm whose scale is that of the whole stream, or as it is.

With the scale sigma of the whole stream x taken as given, a LayerNorm is linear in x, so what it hands on is a sum over the
parts of x:

    LN(x) = sum over parts c of (c - mean c) / sigma(x) * gamma  +  beta

Shape legend: D model width, and leading dimensions of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def own_norm(slot: Any) -> Any:
    """The LayerNorm in one of a bridge's slots `blocks[i].ln1`, `blocks[i].ln2` and `ln_final`; None where there is none."""
    from torch import nn

    inside = slot.original_component
    return inside if isinstance(inside, nn.LayerNorm) else None


def as_read(slot: Any, part: Tensor, whole: Tensor) -> Tensor:
    """What is read of a part of the residual stream, without the norm's bias.

    Args:
        slot: of a bridge; the stream is read as it is where there is no norm.
        part: (..., D).
        whole: the stream that decides the scale, (..., D), of a shape that `part` broadcasts to.
    """
    norm = own_norm(slot)
    if norm is None:
        return part
    sigma = (whole.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    read: Tensor = (part - part.mean(dim=-1, keepdim=True)) / sigma * norm.weight
    return read


def bias_read(slot: Any, like: Tensor) -> Tensor:
    """(D,) what is read besides the parts of the stream: the norm's bias, or zeros; of the dtype and device of `like`."""
    norm = own_norm(slot)
    return like.new_zeros(like.shape[-1]) if norm is None else norm.bias.detach()
