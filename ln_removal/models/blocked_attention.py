"""Causal attention in blocks of queries, for compiled training on a CPU in bfloat16.

PyTorch's fused attention for CPUs takes two fifths of a training step, most of it in the backward pass. Here the scores of a
block of queries are one matrix product, which runs at the speed of the CPU's bfloat16 unit, and the compiler fuses what lies
between two products. Blocks leave out most keys that a query does not see.

    s = q k^T / sqrt(K),  w = exp(s - max s),  t = sum_keys w,  o = w v / t
    dv = w^T (g / t),  ds = w (g v^T - sum_width(g o)) / t,  dq = ds k / sqrt(K),  dk = ds^T q / sqrt(K)

The weights w are kept for the backward pass: in bfloat16 1.1 to 2 T^2 bytes for each sequence, head and layer, fewer with more blocks.

Shape legend: B batch, H heads, N = B * H, T positions, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NARROWEST_BLOCK = 256
"""Queries in a block. Less work is wasted on keys that a query does not see if it is small, and products are faster if it is large."""

MOST_BLOCKS = 8
"""Each block is compiled by itself, so a long context has larger blocks, not more."""


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention of every query to the keys up to its own position.

    Products are in the type of the arguments, the softmax is in float32.

    Args:
        query, key, value: (B, H, T, K).
        scaling: of the scores, 1 / sqrt(K) by default.
        mask: (B, 1, T, T), true where a query sees a key, for rows that hold several documents; causal. Every query sees a key.

    Returns:
        (B, H, T, K).
    """
    shape = query.shape
    scaling = shape[-1] ** -0.5 if scaling is None else scaling
    flat = (each.reshape(-1, *shape[2:]) for each in (query, key, value))
    heads: Tensor = _BlockedAttention.apply(*flat, scaling, mask)  # type: ignore[no-untyped-call]
    return heads.view(shape)


def _blocks(length: int) -> list[slice]:
    size = max(NARROWEST_BLOCK, -(-length // MOST_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _hide(scores: Tensor, mask: Tensor | None, queries: slice) -> Tensor:
    """Scores (N, queries, keys) with minus infinity where a query does not see a key."""
    if mask is None:
        # int32 is compared faster than int64.
        keys = torch.arange(queries.stop, dtype=torch.int32, device=scores.device)
        return scores.masked_fill(keys > keys[queries, None], -torch.inf)
    seen = mask[:, :, queries, : queries.stop]
    by_row = scores.view(len(mask), -1, *scores.shape[1:])
    return by_row.masked_fill(~seen, -torch.inf).view_as(scores)


class _BlockedAttention(torch.autograd.Function):
    """`blocked_attention` of (N, T, K)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        outputs, weights, totals = [], [], []
        for rows in _blocks(query.shape[1]):
            scores = (query[:, rows] @ key[:, : rows.stop].transpose(1, 2)).float() * scaling
            scores = _hide(scores, mask, rows)
            weight = torch.exp(scores - scores.amax(-1, keepdim=True)).to(value.dtype)
            total = weight.float().sum(-1, keepdim=True)
            # Divided after the product: K numbers in a row, not T.
            outputs.append(((weight @ value[:, : rows.stop]).float() / total).to(value.dtype))
            weights.append(weight)
            totals.append(total)
        output, total = torch.cat(outputs, 1), torch.cat(totals, 1)
        ctx.save_for_backward(query, key, value, output, total, *weights)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        query, key, value, output, total, *weights = ctx.saved_tensors
        slope = slopes[0].contiguous()
        common = (slope.float() * output.float()).sum(-1, keepdim=True)
        by_total = (slope.float() / total).to(value.dtype)
        slope_query = []
        slope_key = torch.zeros_like(key, dtype=torch.float32)
        slope_value = torch.zeros_like(value, dtype=torch.float32)
        for rows, weight in zip(_blocks(query.shape[1]), weights, strict=True):
            towards = (slope[:, rows] @ value[:, : rows.stop].transpose(1, 2)).float()
            inner = weight.float() * (towards - common[:, rows]) * (ctx.scaling / total[:, rows])
            inner = inner.to(query.dtype)
            slope_query.append(inner @ key[:, : rows.stop])
            slope_key[:, : rows.stop] += inner.transpose(1, 2) @ query[:, rows]
            slope_value[:, : rows.stop] += weight.transpose(1, 2) @ by_total[:, rows]
        return torch.cat(slope_query, 1), slope_key.to(key.dtype), slope_value.to(value.dtype), None, None
