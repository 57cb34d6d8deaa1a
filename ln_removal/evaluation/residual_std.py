"""How large the residual stream is, layer by layer: what LayerNorm divided by before, and nothing does after.

Shape legend: B batch, T positions, D width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ln_removal.architectures import blocks_of, final_norm_of, mlp_norm_of
from ln_removal.evaluation.data_scores import ResidualStd
from ln_removal.evaluation.loss import BATCH_TOKENS, scoring
from ln_removal.precision import Precision

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenSplit

MAX_TOKENS = 16_384
"""Read at most: a mean over positions needs no more."""


def residual_std(
    model: Any,
    split: TokenSplit,
    *,
    context: int,
    eot_token_id: int,
    max_tokens: int = MAX_TOKENS,
    precision: Precision = "float32",
) -> ResidualStd | None:
    """Mean over positions of the residual stream's standard deviation over its width, in front of every reader.

    Works on GPT-2 and GPT-NeoX with norms, with freezable norms and with identities in their places, where the model is.

    Args:
        model: of one of these.
        split: held-out tokens. context: tokens in a window. max_tokens: read about this many at most.
        eot_token_id: left out of the means over ordinary positions, as position 0 is.

    Returns:
        None for a split without a whole window, or without an ordinary position.
    """
    batch = max(1, BATCH_TOKENS["cpu"] // context)
    device = next(model.parameters()).device
    places = [place for block in blocks_of(model) for place in (block, mlp_norm_of(block))] + [final_norm_of(model)]
    found: list[Tensor] = []  # (B, T) for each place, in the order of the forward pass
    hooks = [
        place.register_forward_pre_hook(lambda _, args, kwargs: found.append(_std(args, kwargs)), with_kwargs=True)
        for place in places
    ]
    sums = torch.zeros(2, len(places), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    try:
        with scoring(model, device, precision):
            for window in split.windows(context, limit_tokens=max_tokens, batch=batch):
                ids = torch.from_numpy(window).to(device)
                found.clear()
                model.base_model(input_ids=ids, use_cache=False)
                stds = torch.stack(found).to("cpu", torch.float64)  # (places, B, T)
                first = torch.zeros(ids.shape, dtype=torch.bool)
                first[:, 0] = True
                ordinary = ~first & (ids.cpu() != eot_token_id)
                for row, members in enumerate((ordinary, first)):
                    sums[row] += stds[:, members].sum(dim=1)
                    counts[row] += members.sum()
                tokens += ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    if not counts.all():
        return None
    ordinary_means, first_means = (sums / counts[:, None]).tolist()
    return ResidualStd(
        ordinary_pre=tuple(ordinary_means[0::2]),
        ordinary_mid=tuple(ordinary_means[1::2]),
        first_pre=tuple(first_means[0::2]),
        first_mid=tuple(first_means[1::2]),
        tokens=tokens,
    )


def _std(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """(B, T) of the residual stream (B, T, D) that a module was given."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.std(dim=-1, correction=0)
