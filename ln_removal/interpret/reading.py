"""How a part of the residual stream is read: through a LayerNorm whose scale is that of the whole stream, or as it is.

With the scale sigma of the whole stream x taken as given, a LayerNorm is linear in x, so what it hands on is a sum over the
parts of x:

    LN(x) = sum over parts c of (c - mean c) / sigma(x) * gamma  +  beta

Its gamma and its subtraction of the mean can then be folded into the weights that read x; only 1 / sigma is left.

Shape legend: D model width, L layers, H heads, K width of a head, V vocabulary, and leading dimensions of any shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import FactoredMatrix
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class FoldedWeights:
    """The weights with which heads and the unembedding read the residual stream, in float64.

    Attributes:
        W_Q, W_K, W_V: (L, H, D, K), with the gamma and the mean subtraction of the norm in front.
        W_O: (L, H, K, D).
        W_E: (V, D).
        W_U: (D, V), the same of the final norm, minus its mean over the vocabulary.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    W_E: Tensor
    W_U: Tensor

    @property
    def OV(self) -> FactoredMatrix:
        """(L, H, D, D)."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """(L, H, D, D), queries to the left."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))


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


def folded_weights(bridge: TransformerBridge) -> FoldedWeights:
    """The weights of a model as the residual stream sees them; of an LN-free model they are the model's own.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, weights not processed.
    """
    import torch

    with torch.no_grad():
        layers = [_folded_heads(block) for block in bridge.blocks]
        queries, keys, values = (torch.stack(stacked) for stacked in zip(*layers, strict=True))
        unembedding = _folded(bridge.ln_final, bridge.W_U)
        return FoldedWeights(
            queries,
            keys,
            values,
            bridge.W_O.detach().double(),
            bridge.W_E.detach().double(),
            unembedding - unembedding.mean(dim=1, keepdim=True),
        )


def _folded(slot: Any, weight: Tensor) -> Tensor:
    """A weight (D, out) with the gamma and the mean subtraction of the norm in front of it, in float64."""
    from ln_removal.norms.surgery import fold_affine

    norm = own_norm(slot)
    if norm is None:
        return weight.detach().double()
    return fold_affine(weight, None, norm.weight, norm.bias, weight.new_ones(()))[0]


def _folded_heads(block: Any) -> list[Tensor]:
    """W_Q, W_K and W_V (H, D, K) of a block."""
    import torch

    weights = (block.attn.W_Q, block.attn.W_K, block.attn.W_V)
    return [torch.stack([_folded(block.ln1, head) for head in one]) for one in weights]
