"""Attention that training gives a model in place of its own, and attention entropy: measured, recorded, penalised.

Documents that share a row do not see one another: `document_inputs` makes what a model needs for that, once for a forward
pass, and `fused_causal_attention` and `explicit_causal_attention` heed it.

    E(l, h) = mean over batch and queries of - sum over keys of p log p                                          (nats)

Without LayerNorm the heads of early layers tend to the largest possible entropy ("entropic overload": they look everywhere
alike), those of late layers to 0 (Jha and Reagen, arXiv 2410.09637). Fused kernels never hold the probabilities, so a model
uses `explicit_causal_attention` while its entropy is measured.

Shape legend: B batch, H heads, T queries, S keys, K width of a head, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ln_removal.models.blocked_attention import blocked_attention
from ln_removal.models.families import attentions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R = TypeVar("R")

EXPLICIT_ATTENTION = "ln_removal_explicit"
FUSED_ATTENTION = "ln_removal_fused"

NARROWEST_FLEX_HEAD = 16
"""Width of a head below which flex_attention has no kernel on CUDA."""

OVERLOAD_SHARE = 0.9
"""A head whose entropy is above this share of the largest possible is in the overload band."""

INITIAL_THRESHOLD = 0.5
"""Thresholds start halfway between a head that looks at one key and one that looks at all, so that neither is preferred."""

TOLERANCE = 0.2
"""gamma: with thresholds of 0.5, heads between 0.3 and 0.7 of log T are not penalised; a uniform causal head has 0.8 (T = 128)."""


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of every row, - sum over keys of p log p, with 0 log 0 = 0.

    A NaN among a row's probabilities makes its entropy NaN. The gradient is finite also where a probability is 0 (as all
    masked keys are), where that of p log p is not.

    Args:
        probabilities: rows that sum to 1, (B, H, T, S), any floating-point type.

    Returns:
        (B, H, T) in float32, or in float64 for float64, in nats, from 0 (one key) to log S (all keys alike).
    """
    p = probabilities.to(_wide(probabilities.dtype))
    # Below the smallest normal number the logarithm is cut off, with no gradient through it: 0 * log(tiny) is 0.
    return (p * -p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores and entropies are computed: float64 stays, everything else becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def head_entropy(probabilities: Tensor, observed: Tensor | None = None) -> Tensor:
    """Mean entropy of each head over batch and queries, or over those that `observed` (B, T) names.

    (B, H, T, S) to (H,), float32 or float64, nats.
    """
    entropy = attention_entropy(probabilities)
    if observed is None:
        return entropy.mean((0, 2))
    return torch.where(observed[:, None], entropy, 0.0).sum((0, 2)) / observed.sum().clamp(min=1)


def largest_row_entropy(keys: int) -> float:
    """log(keys) in nats: the entropy of a row that gives all of its keys the same probability.

    The papers call log T the largest entropy of a head. A causal head reaches it only in its last row; `largest_entropy` is
    what its mean over the queries can reach.
    """
    assert keys >= 1, keys
    return math.log(keys)


def largest_entropy(queries: int) -> float:
    """log(T!) / T in nats: mean entropy of a causal head all of whose rows are uniform (row i, from 0, has i + 1 keys)."""
    assert queries >= 1, queries
    return math.lgamma(queries + 1) / queries


def explicit_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Causal attention that keeps its probabilities: an attention function for transformers' AttentionInterface.

    Scores and softmax are computed in float32 even when the model has less, as fused kernels do, and in float64 when it has
    that; queries, keys, values and the output have the model's type. For batches without a cache.

    Args:
        query, key, value: (B, H, T, K); keys and values may have fewer heads, each for as many of the queries' heads.
        attention_mask: None; which keys a query sees follows from their positions.
        scaling: of the scores, 1 / sqrt(K) by default.
        document_mask: of `document_inputs`, for rows that hold several documents.

    Returns:
        The heads' outputs (B, T, H, K) in the values' type, and the probabilities (B, H, T, S) in float32 or float64.
    """
    assert attention_mask is None, "explicit attention is causal by position; it takes no mask"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = _for_each_query_head(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        wide = _wide(query.dtype)
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scaling
        queries = torch.arange(scores.shape[-2], device=scores.device)
        keys = torch.arange(scores.shape[-1], device=scores.device)
        hidden = keys > queries[:, None] if document_mask is None else ~document_mask
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        weights = nn.functional.dropout(probabilities, dropout, training=module.training)
        output = weights.to(value.dtype) @ value
    return output.transpose(1, 2), probabilities


def document_inputs(model: PreTrainedModel, document_starts: Tensor) -> dict[str, Any]:
    """What `model` reads rows of several documents with, as keyword arguments of its body.

    transformers passes those that it does not know on to the attention function. Nothing here waits for the device.

    Args:
        model: has `fused_attention` or `explicit_attention`.
        document_starts: (B, T + 1), as in `sampler.Batch`: of the inputs and of the last target.

    Returns:
        position_ids: (B, T), counted from each document's start; 0 for padding.
        document_mask: which keys a query sees: those before it in its document, and itself. Padding sees itself alone. A
            boolean tensor (B, 1, T, T); on CUDA a BlockMask, which only knows blocks of 128 by 128.
        observed: (B, T), true where input and target lie in the same document: what is trained, and what norms gather
            statistics of. False for padding, and for an end-of-text token, behind which another document begins.
    """
    starts = document_starts[:, :-1].contiguous()  # a kernel reads it
    rows, length = starts.shape
    index = torch.arange(length, device=starts.device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[row, query] == starts[row, key]) & (query >= key)

    config = model.config
    own = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide_enough = own >= NARROWEST_FLEX_HEAD
    mask: Tensor | BlockMask
    if starts.is_cuda and wide_enough and config._attn_implementation != EXPLICIT_ATTENTION:
        mask = create_block_mask(sees, rows, None, length, length, device=starts.device)
    else:
        mask = ((starts[:, :, None] == starts[:, None, :]) & (index[:, None] >= index))[:, None]
    return {
        "position_ids": (index - starts).clamp(min=0),
        "document_mask": mask,
        "observed": document_starts[:, 1:] == starts,
    }


def fused_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_mask: Tensor | BlockMask | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention that never holds all probabilities: an attention function for transformers' AttentionInterface.

    With a BlockMask it is flex_attention, in a compiled bfloat16 step on a CPU `blocked_attention`, else PyTorch's
    scaled_dot_product_attention.

    Args:
        query, key, value: (B, H, T, K); keys and values may have fewer heads, each for as many of the queries' heads.
        attention_mask: not looked at.
        scaling: of the scores, 1 / sqrt(K) by default.
        document_mask: of `document_inputs`, for rows that hold several documents.

    Returns:
        The heads' outputs (B, T, H, K), and None in place of probabilities.
    """
    if isinstance(document_mask, BlockMask):
        # Outside a compiled step flex_attention has to be compiled by itself, or it would hold all scores; a CPU, for tests, may.
        kernel = compile_friendly_flex_attention if query.is_cuda else flex_attention
        # Autocast does not reach it.
        query, key = query.to(value.dtype), key.to(value.dtype)
        key, value = _for_each_query_head(query, key, value)
        heads = kernel(query, key, value, block_mask=document_mask, scale=scaling)
        assert isinstance(heads, Tensor)
        return heads.transpose(1, 2).contiguous(), None
    if value.device.type == "cpu" and value.dtype == torch.bfloat16 and dropout == 0 and torch.compiler.is_compiling():
        key, value = _for_each_query_head(query, key, value)
        heads = blocked_attention(query.to(value.dtype), key.to(value.dtype), value, scaling, document_mask)
        return heads.transpose(1, 2), None
    output: Tensor = sdpa_attention_forward(module, query, key, value, document_mask, dropout, scaling)[0]
    return output, None


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, K) for H heads of queries, where several of these share one (B, H / n, T, K)."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def fused_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Give `model` the fastest attention, for batches without padding or whose documents are marked; afterwards what it had.

    Without this, transformers looks for packed sequences in the position ids of each batch. In eager mode that waits for the
    device, and in a compiled step it makes a (B, T, T) mask, which flash attention does not accept.
    """
    return attention_without_mask(model, FUSED_ATTENTION, fused_causal_attention)


def explicit_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Give `model` attention whose modules return their probabilities, and afterwards what it had."""
    return attention_without_mask(model, EXPLICIT_ATTENTION, explicit_causal_attention)


@contextmanager
def attention_without_mask(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Give `model` an attention function that is causal by itself, and afterwards what it had.

    transformers makes no mask for an attention that has no entry in its mask interface.

    Args:
        name: under which transformers is to know it.
        function: as transformers' AttentionInterface wants it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def record_attention(model: PreTrainedModel, keep: Callable[[Tensor], R]) -> Iterator[list[R]]:
    """Run `model` with explicit attention and gather `keep(probabilities)` of each layer, first to last.

    The forward pass keeps its gradients, if it has any. `keep` gets (B, H, T, S); when it returns something smaller,
    such as entropies, one layer's probabilities are freed before the next layer's are computed.

    Yields:
        The list that a forward pass fills with L entries; a second pass appends L more.
    """
    kept: list[R] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        probabilities = output[1]
        assert probabilities is not None, f"{type(module).__name__} did not return its attention probabilities"
        kept.append(keep(probabilities))

    with ExitStack() as stack:
        stack.enter_context(explicit_attention(model))
        for attention in attentions_of(model):
            stack.callback(attention.register_forward_hook(hook).remove)
        yield kept


class EntropyRegulariser(nn.Module):
    """Penalty on heads whose entropy is far from a threshold of their own, which is learned.

        D(l, h) = E(l, h) - theta(l, h) log T
        penalty = mean over layers and heads of D^2 where |D| > gamma log T, else 0                            (nats^2)

    (Jha and Reagen, arXiv 2501.03489; AERO, arXiv 2410.13060.) It is added to the cross-entropy with a weight lambda, 1e-5 in
    their code. A penalised head moves towards its threshold, and its threshold towards the head.

    Args:
        layers, heads: of the model.
        tolerance: gamma, a share of log T.
    """

    def __init__(self, layers: int, heads: int, *, tolerance: float = TOLERANCE) -> None:
        super().__init__()
        assert layers >= 1 and heads >= 1 and tolerance >= 0, (layers, heads, tolerance)
        self.layers, self.heads, self.tolerance = layers, heads, tolerance
        # A flat vector: optimizers here decay parameters of two dimensions and more, and a threshold should not decay.
        self.thresholds = nn.Parameter(torch.full((layers * heads,), INITIAL_THRESHOLD))

    def forward(self, probabilities: Sequence[Tensor], observed: Tensor | None = None) -> Tensor:
        """The penalty of one forward pass.

        Args:
            probabilities: L tensors (B, H, T, S) with S = T.
            observed: (B, T), the queries that count; None counts all.

        Returns:
            Scalar in float32, in squared nats. NaN where an entropy is.
        """
        return self.penalty(
            torch.stack([head_entropy(layer, observed) for layer in probabilities]), probabilities[0].shape[-1]
        )

    def penalty(self, entropy: Tensor, keys: int) -> Tensor:
        """The same from the heads' entropies (L, H), for callers that recorded `head_entropy` and not the probabilities."""
        assert entropy.shape == (self.layers, self.heads), entropy.shape
        largest = largest_row_entropy(keys)
        deviation = entropy - self.thresholds.view(self.layers, self.heads) * largest
        tolerated = deviation.abs() <= self.tolerance * largest  # false for NaN, which then shows in the loss
        return torch.where(tolerated, 0.0, deviation.square()).mean()
