"""What a training step minimises: next-token cross-entropy without materialised logits, and the residual-std loss.

Shape legend: B batch, T positions, D model width, V vocabulary, N = B * T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_IN_A_CHUNK = 1 << 24
"""Logits held at a time (64 MiB in float32): the vocabulary times the positions of one chunk."""


def _chunk_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T + bias`, in nats per token, holding the logits of one chunk at a time.

    Each chunk's logits are computed again in the backward pass, so memory stays at one chunk whatever the batch. A batch
    that fits into one chunk is not recomputed.

    Args:
        hidden: (N, D), after the final norm.
        weight: unembedding (V, D).
        targets: token ids (N,).
        bias: logit bias (V,), or None.

    Returns:
        Scalar in float32.
    """
    rows = max(1, LOGITS_IN_A_CHUNK // weight.shape[0])
    if hidden.shape[0] <= rows:
        return _chunk_loss(hidden, weight, bias, targets) / targets.numel()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        total = total + checkpoint(_chunk_loss, hidden[part], weight, bias, targets[part], use_reentrant=False)
    return total / targets.numel()


def residual_std_loss(residual: Tensor, special: Tensor) -> Tensor:
    """Mean over all positions of (std - target)^2: pulls the special positions' residual std to that of the ordinary ones.

    The target is the mean std over positions that are neither position 0 nor end-of-text, without a gradient
    (Baroni et al. 2025, arXiv 2507.02559, the auxiliary loss at ln_f).

    Args:
        residual: what ln_f reads, (B, T, D).
        special: true at position 0 and at end-of-text tokens, (B, T).

    Returns:
        Scalar in float32, in squared units of the residual stream.
    """
    std = residual.float().std(dim=-1, correction=0)
    ordinary = (~special).to(std.dtype)
    target = (std.detach() * ordinary).sum() / ordinary.sum().clamp(min=1.0)
    return (std - target).square().mean()


class StepLoss(NamedTuple):
    """`total` is what the backward pass starts from; `cross_entropy` is what is logged. Scalars in float32."""

    total: Tensor
    cross_entropy: Tensor


class Objective(nn.Module):
    """A causal language model of GPT-2's layout together with its loss: what the optimizer steps and DDP wraps.

    It switches the model's dropout off: a step is then a pure function of weights and batch, so a resumed run goes on as
    if it had never stopped, and removal and control differ in their norms alone.

    Args:
        model: has `transformer` (token ids to final hidden states) and `lm_head`.
        eot_token_id: end-of-text, a special position for the residual-std loss; None when the model has none.
        auxiliary_weight: weight of `residual_std_loss` at ln_f; 0 leaves it out.
    """

    def __init__(self, model: PreTrainedModel, *, eot_token_id: int | None, auxiliary_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.eot_token_id = eot_token_id
        self.auxiliary_weight = auxiliary_weight
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._residual: Tensor | None = None
        if auxiliary_weight > 0:
            final_norm: nn.Module = model.transformer.ln_f
            final_norm.register_forward_pre_hook(self._keep_residual)

    def _keep_residual(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._residual = args[0]

    def forward(self, tokens: Tensor) -> StepLoss:
        """Loss of predicting tokens[:, 1:] from tokens[:, :-1].

        Args:
            tokens: (B, T + 1).
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
        head = self.model.lm_head
        cross_entropy = chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), head.weight, targets.reshape(-1), getattr(head, "bias", None)
        )
        if self.auxiliary_weight == 0:
            return StepLoss(cross_entropy, cross_entropy.detach())
        assert self._residual is not None, "ln_f ran in the forward pass above"
        special = torch.zeros_like(inputs, dtype=torch.bool)
        special[:, 0] = True
        if self.eot_token_id is not None:
            special |= inputs == self.eot_token_id
        auxiliary = residual_std_loss(self._residual, special)
        self._residual = None
        return StepLoss(cross_entropy + self.auxiliary_weight * auxiliary, cross_entropy.detach())
