"""Cross-entropy of a linear map to the vocabulary that never holds all logits; optionally mixed with distillation.

The gradient is taken in the forward pass, chunk of positions by chunk, so nothing the size of the vocabulary is kept for
the backward pass or computed twice (the way of Liger, arXiv 2410.10989). With student logits z, teacher logits t, one-hot
targets y and share s,

    loss        = (1 - s) CE(y, softmax z) + s KL(softmax t || softmax z)
    d loss / dz = softmax z - (1 - s) y - s softmax t

The teacher can be heeded only as far as the student is behind it. In a sequence whose targets the student predicts worse by
the mean lag g, the share is then s min(1, max(0, g / whole_lag)). A student that catches up learns from the text, so it can get
ahead of its teacher; one that cannot keeps its teacher.

Shape legend: N positions, D model width, D' teacher's width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS_IN_A_CHUNK = {"cpu": 1024, "cuda": 8192}
"""Positions whose logits exist at a time. A CPU is fastest near its caches (measured: docs/performance.md); a GPU needs matrix
products of thousands of rows to be busy."""

VOCABULARY_MULTIPLE_ON_CUDA = 64
"""The vocabulary is padded to a multiple of this on a GPU: GPT-2's 50,257 would keep its matrix products off the fast kernels."""


class Head(NamedTuple):
    """What turns hidden states into logits: weight (V, D), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class LinearLoss(NamedTuple):
    """Scalars in float32, nats per token: `total` has the gradient; the other two are for logs.

    Without a teacher `total` is the cross-entropy and `divergence` 0.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    share: float | Tensor = 0.0,
    trained: Tensor | None = None,
    length: int | None = None,
    whole_lag: float = 0.0,
) -> LinearLoss:
    """Mean loss of predicting `targets` from `hidden @ head.weight.T + head.bias`, by the module's formula.

    Args:
        hidden: (N, D), after the final norm.
        head: the unembedding.
        targets: token ids (N,).
        teacher_hidden: (N, D') of the teacher for the same positions; None without distillation.
        teacher_head: the teacher's unembedding, of the same vocabulary; given together with `teacher_hidden`.
        share: s, in [0, 1]: how much of the loss is the Kullback-Leibler divergence from the teacher. As a scalar tensor
            it can change between the calls of a compiled graph.
        trained: (N,), true for the positions that the mean is over; the others have no gradient. None takes all.
        length: positions of a sequence, which divides N: the teacher is heeded as far as the student is behind it in a sequence.
            A chunk that does not hold a whole number of sequences counts as one. None heeds it everywhere.
        whole_lag: nats per token; how far behind the student has to be in a sequence for the whole share; above 0 with `length`.
    """
    assert (teacher_hidden is None) == (teacher_head is None), "a teacher has hidden states and a head"
    assert length is None or teacher_head is None or whole_lag > 0, whole_lag
    assert isinstance(share, Tensor) or 0 <= share <= 1, share
    device = hidden.device.type
    if hidden.is_cuda:
        head = pad_vocabulary(head, VOCABULARY_MULTIPLE_ON_CUDA)
        teacher_head = None if teacher_head is None else pad_vocabulary(teacher_head, VOCABULARY_MULTIPLE_ON_CUDA)
    if torch.is_autocast_enabled(device):
        # Once, and not in every chunk.
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), _cast(head, dtype)
        teacher_hidden = None if teacher_hidden is None else teacher_hidden.to(dtype)
        teacher_head = None if teacher_head is None else _cast(teacher_head, dtype)
    rows = POSITIONS_IN_A_CHUNK.get(device, POSITIONS_IN_A_CHUNK["cpu"])
    taught = (None, None, None) if teacher_head is None else (teacher_hidden, *teacher_head)
    with torch.autocast(device, enabled=False):
        sums: Tensor = _LinearCrossEntropy.apply(
            hidden, *head, targets, trained, *taught, share, length, whole_lag, rows
        )  # type: ignore[no-untyped-call]
    count = targets.numel() if trained is None else trained.sum().clamp(min=1)
    total, cross_entropy, divergence = (sums / count).unbind()
    return LinearLoss(total, cross_entropy.detach(), divergence.detach())


def pad_vocabulary(head: Head, multiple: int) -> Head:
    """Add entries that are never predicted (logit bias minus infinity) until V is a multiple of `multiple`.

    Returns:
        The head of the larger vocabulary; the given one when there is nothing to add.
    """
    weight, bias = head
    missing = -weight.shape[0] % multiple
    if missing == 0:
        return head
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    return Head(F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=float("-inf")))


def _cast(head: Head, dtype: torch.dtype) -> Head:
    return Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))


def _only(kept: Tensor | None, values: Tensor) -> Tensor:
    """`values` (rows, ...) with 0 in the rows that are not kept; kept (rows, 1)."""
    return values if kept is None else torch.where(kept, values, 0.0)


def _heed(behind: Tensor, kept: Tensor | None, length: int, whole_lag: float) -> Tensor:
    """How far to heed the teacher in each sequence of `length` positions, from 0 to 1; (rows, 1).

    Args:
        behind: the student's loss minus the teacher's, (rows, 1); 0 where not kept.
        kept: (rows, 1), the positions that the mean is over; None takes all.
    """
    rows = len(behind)
    span = length if rows % length == 0 else rows
    count = span if kept is None else kept.view(-1, span).sum(dim=1, keepdim=True).clamp(min=1)
    lag = behind.view(-1, span).sum(dim=1, keepdim=True) / count
    return (lag / whole_lag).clamp(0, 1).expand(-1, span).reshape(rows, 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sums over positions of (loss, cross-entropy, divergence), with the loss's gradient taken along in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        trained: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        share: float | Tensor,
        length: int | None,
        whole_lag: float,
        rows: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        cross_entropy = hidden.new_zeros((), dtype=torch.float32)
        divergence = hidden.new_zeros((), dtype=torch.float32)
        slopes_hidden: list[Tensor] = []
        # Sums over chunks: in float32, whatever the products are in.
        slope_weight = torch.zeros_like(weight, dtype=torch.float32)
        slope_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        words = torch.arange(weight.shape[0], device=weight.device)
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows].unsqueeze(1)
            logits = F.linear(part, weight, bias).float()
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            kept = None if trained is None else trained[start : start + rows].unsqueeze(1)
            loss = _only(kept, normaliser - logits.gather(1, target))
            cross_entropy += loss.sum()
            slope = torch.exp(logits - normaliser)
            one_hot = (words == target).float()
            if teacher_hidden is None or teacher_weight is None:
                slope = slope - one_hot
                total += loss.sum()
            else:
                taught = F.linear(teacher_hidden[start : start + rows], teacher_weight, teacher_bias).float()
                log_taught = taught - taught.logsumexp(dim=1, keepdim=True)
                probable = log_taught.exp()
                # A padded entry has probability 0 in both, and 0 (-inf + inf) is not 0.
                surplus = torch.where(probable > 0, probable * (log_taught - (logits - normaliser)), 0.0)
                apart = _only(kept, surplus.sum(dim=1, keepdim=True))
                divergence += apart.sum()
                heeded = share
                if length is not None:
                    behind = loss + _only(kept, log_taught.gather(1, target))
                    heeded = share * _heed(behind, kept, length, whole_lag)
                total += ((1 - heeded) * loss + heeded * apart).sum()
                slope = slope - (1 - heeded) * one_hot - heeded * probable
            slope = _only(kept, slope)
            slope_bias += slope.sum(dim=0)
            slope = slope.to(weight.dtype)
            slopes_hidden.append(slope @ weight)
            slope_weight += slope.T @ part
        ctx.save_for_backward(torch.cat(slopes_hidden), slope_weight, None if bias is None else slope_bias)
        ctx.dtype = weight.dtype
        return torch.stack((total, cross_entropy, divergence))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        # Only the first of the three sums is differentiated: the caller detaches the others.
        slope = slopes[0][0]
        hidden, weight, bias = ctx.saved_tensors
        return (
            (hidden * slope).to(hidden.dtype),
            (weight * slope).to(ctx.dtype),
            None if bias is None else (bias * slope).to(ctx.dtype),
            *(None,) * 9,
        )
