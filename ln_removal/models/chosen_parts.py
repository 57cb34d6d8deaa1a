"""The modules that a choice of [architecture] puts into a GPT-2 or a Pythia, and the initialisation that keeps the stream's size.

`norm_choice.py` puts them in their places when it builds a model. None of them replaces a forward method of transformers.

In the places of the norms, without looking at any statistic of the token:

    dyt     gamma * tanh(alpha x) + beta         (Zhu et al. 2025, arXiv 2503.10622)
    derf    gamma * erf(alpha x + s) + beta      (Chen et al. 2025, arXiv 2512.10938)

alpha and s are scalars, gamma and beta have the model's width. They begin as in the authors' GPT-2: alpha 1, s 0, gamma 1, beta 0.
The authors also multiply the embeddings with about sqrt(D); here the initialisation "unit" does that.

On the way back into the residual stream, a gain a branch, which is 1 / sqrt(2 n_layer) or begins there (He et al. 2024, arXiv
2405.19279, who use a fixed gain of order 1 / sqrt(depth); a learned scalar: SkipInit, De & Smith 2020, arXiv 2002.10444, which
begins at 0).

In front of the softmax, 1 / K in place of 1 / sqrt(K) (Yang et al. 2022, arXiv 2203.03466, definition 4.1), as a factor
1 / sqrt(K) on the queries. A norm keeps the size of what queries and keys are made of. Without one the stream grows in a training,
and the scores grow with its square.

Shape legend: B batch, T positions, D model width, H heads, K width of one head, L layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM_EPSILON = 1e-6
"""Of the RMSNorm of queries and keys, added to the mean square."""


class _ReLUByOutput(torch.autograd.Function):
    """max(x, 0) with the gradient g sign(max(x, 0)), which is that of torch.relu."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape."""
        out = torch.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of the output to that of the input."""
        (out,) = ctx.saved_tensors
        return gradients[0] * out.sign()


class ReLU(nn.Module):
    """max(x, 0), as nn.ReLU, whose compiled training step is faster on a CPU.

    The backward pass of torch.relu reads a mask of truth values. The compiled step writes it in the forward pass, one value after the
    other, although the output, which the next map keeps anyway, says the same. Compiled steps of a small model without norms
    take 0.81 of the time with this class (docs/LOG.md, seventh session).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return cast(Tensor, _ReLUByOutput.apply(x))  # type: ignore[no-untyped-call]


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


class JointConv1D(Conv1D):
    """GPT-2's c_attn, (D) to (3 D) in the order queries, keys, values, with a choice of its biases and of the size of queries.

    Args:
        width: D.
        value_bias: whether values have a bias too; without one the bias has (2 D) entries.
        query_scale: what the queries are multiplied with, their bias too.
    """

    def __init__(self, width: int, *, value_bias: bool, query_scale: float) -> None:
        super().__init__(3 * width, width)
        self.bias = nn.Parameter(torch.zeros((3 if value_bias else 2) * width))
        self.query_scale = query_scale

    @property
    def gain(self) -> Tensor:
        """(3 D): what each output is multiplied with."""
        return torch.cat((self.weight.new_full((self.nx,), self.query_scale), self.weight.new_ones(2 * self.nx)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3 D)."""
        weight, bias = self.weight, F.pad(self.bias, (0, self.nf - len(self.bias)))
        if self.query_scale != 1:
            gain = self.gain
            weight, bias = weight * gain, bias * gain
        return torch.addmm(bias, x.view(-1, self.nx), weight).view(*x.shape[:-1], self.nf)


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


class GainedConv1D(Conv1D):
    """A projection into the residual stream, `inputs` to `outputs`, whose output is multiplied with a gain.

    Args:
        bias: whether it has one, which the gain multiplies too.
        initial: the gain, before training if it is learned.
        learned: whether the gain is a parameter, a scalar of shape (), which optimizers here do not decay.
    """

    def __init__(self, outputs: int, inputs: int, *, bias: bool, initial: float, learned: bool) -> None:
        super().__init__(outputs, inputs)
        if not bias:
            del self.bias
            self.register_parameter("bias", None)
        self.initial = initial
        self.learned = nn.Parameter(torch.tensor(float(initial))) if learned else None

    @property
    def gain(self) -> Tensor | float:
        """The gain as it is now."""
        return self.initial if self.learned is None else self.learned

    def reset_parameters(self) -> None:
        """Back to the gain before training."""
        if self.learned is not None:
            nn.init.constant_(self.learned, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        # The weights are smaller than the outputs of a batch.
        rows, weight = x.view(-1, self.nx), self.weight * self.gain
        out = torch.mm(rows, weight) if self.bias is None else torch.addmm(self.bias * self.gain, rows, weight)
        return out.view(*x.shape[:-1], self.nf)


class QueryKeyNorm(nn.Module):
    """RMSNorm of the queries and of the keys of every head, with a weight (K,) for queries and one for keys that all heads share.

        q / sqrt(mean(q^2) + eps) * weight           over the K entries of a head's query, and the same for its key

    It is a norm: it divides by a statistic of the token. Henry et al. 2020 (arXiv 2010.04245); the OP block (arXiv 2405.19279)
    keeps it where it drops the norms of the stream.

    Args:
        heads: H.
        head_width: K.
        query_scale: what the normed queries are multiplied with.
    """

    def __init__(self, heads: int, head_width: int, *, query_scale: float) -> None:
        super().__init__()
        self.heads, self.query_scale = heads, query_scale
        self.query = nn.Parameter(torch.ones(head_width))
        self.key = nn.Parameter(torch.ones(head_width))

    def forward(self, joint: Tensor) -> Tensor:
        """Queries, keys and values side by side, (..., 3 H K), to the same with normed queries and keys, in the same type."""
        queries, keys, values = joint.chunk(3, dim=-1)
        return torch.cat(
            (self._normed(queries, self.query * self.query_scale), self._normed(keys, self.key), values), dim=-1
        )

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.unflatten(-1, (self.heads, -1)).to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)
        return (wide * scale * weight).flatten(-2).to(x.dtype)


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha x) + beta, in the place of a norm.

    Args:
        width: D.
        alpha: before training.
    """

    def __init__(self, width: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.weight * self._bounded(x) + self.bias

    def _bounded(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x)


class DynamicErf(DynamicTanh):
    """gamma * erf(alpha x + s) + beta, in the place of a norm.

    Args:
        width: D.
        alpha: before training.
    """

    def __init__(self, width: int, alpha: float = 1.0) -> None:
        super().__init__(width, alpha)
        self.shift = nn.Parameter(torch.zeros(()))

    def _bounded(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x + self.shift)


class Scale(nn.Module):
    """Multiplies with a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor

    def extra_repr(self) -> str:
        """What printing a model shows of it."""
        return f"{self.factor:g}"


def in_the_norms_place(kind: str, width: int) -> nn.Module | None:
    """What stands where a norm was: an identity for "none", or DyT or Derf; None where the LayerNorm stays."""
    if kind == "dyt":
        return DynamicTanh(width)
    if kind == "derf":
        return DynamicErf(width)
    assert kind in ("layernorm", "none"), kind
    return nn.Identity() if kind == "none" else None


def query_scale(attention_scale: str, head_width: int) -> float:
    """What queries are multiplied with, so that the scores, which attention divides by sqrt(K), are divided by what is chosen."""
    assert attention_scale in ("1/sqrt(k)", "1/k"), attention_scale
    return 1 / math.sqrt(head_width) if attention_scale == "1/k" else 1.0


def branch_gain(n_layer: int) -> float:
    """1 / sqrt(2 L): with it, 2 L independent branches of size 1 add as much to the stream as the embeddings do."""
    return 1 / math.sqrt(2 * n_layer)


def embedding_scale(initializer_range: float) -> float:
    """What the sum of a token's and a position's embedding is multiplied with, so that its root mean square begins at 1."""
    return 1 / (math.sqrt(2) * initializer_range)


@torch.no_grad()
def keep_the_streams_size(model: PreTrainedModel) -> None:
    """Rescale the freshly drawn matrices of a GPT-2 of norm_choice.py for the initialisation "unit".

    Every map then gives outputs of root mean square 1 for inputs of root mean square 1, and the 2 L branches together add as
    much to the stream as the embeddings:

        queries, keys, values, attention's projection, c_fc      std  1 / sqrt(D)
        the MLP's projection                                     std  1 / sqrt(E[a(z)^2] n_inner), a the activation, z normal
        both projections into the stream, without a gain         divided by sqrt(2 L)

    (He et al. 2015, arXiv 1502.01852; the depth scaling is that of GPT-2.) The embeddings keep their small standard deviation and
    are multiplied with `embedding_scale` in the forward pass. So an optimizer whose steps have one size moves them as fast,
    relative to the stream, as it does in a model with LayerNorm, and a tied unembedding begins with small logits.
    """
    config: Any = model.config
    drawn = config.initializer_range
    inner = config.n_inner or 4 * config.n_embd
    deviations = {
        "attn.c_attn": config.n_embd**-0.5,
        "attn.c_proj": config.n_embd**-0.5,
        "mlp.c_fc": config.n_embd**-0.5,
        "mlp.c_proj": (_mean_square(config) * inner) ** -0.5,
    }
    for block in model.base_model.h:
        for path, deviation in deviations.items():
            module = block.get_submodule(path)
            matrix = (module[0] if isinstance(module, nn.Sequential) else module).get_parameter("weight")
            before = drawn
            if path.endswith("c_proj") and config.residual_gain == "none":
                deviation *= branch_gain(config.n_layer)
                before *= branch_gain(config.n_layer) if config.biases == "all" else 1
            matrix.mul_(deviation / before)


def _mean_square(config: Any) -> float:
    """E[a(z)^2] of the activation for a standard normal z."""
    if config.activation == "gelu":
        return 0.4252
    slope = 0.0 if config.activation == "relu" else config.negative_slope
    return (1 + slope**2) / 2
