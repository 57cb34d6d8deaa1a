"""What a model says of every token of a split, and how large its residual stream is, layer by layer.

One pass over the data gives four figures a token, from which calibration, loss by position and the worst windows follow; the
logits are dropped chunk by chunk. The size of the residual stream is what LayerNorm divided by before, and nothing does after.

Shape legend: B batch, T positions, D width, L layers, V vocabulary, M scored tokens, N windows, m positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ln_removal.data.sampler import Window
from ln_removal.evaluation.loss import BATCH_TOKENS, LossResult, score_windows, scoring, summarise, windows_to_score
from ln_removal.evaluation.results import Calibration, PositionLoss, ResidualStd
from ln_removal.models.layout import blocks_of, final_norm_of, mlp_norm_of
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenSplit

Array = npt.NDArray[Any]

CALIBRATION_BINS = 15
MAX_TOKENS = 16_384
"""Read at most: a mean over positions needs no more."""


@dataclass(frozen=True)
class TokenStatistics:
    """Figures of every scored token, window after window.

    Attributes:
        windows: N, what was read.
        loss: (M,) negative log-probability of the token, nats. entropy: (M,) of the prediction, nats.
        confidence: (M,) probability of the likeliest token. right: (M,) whether that was the token.
    """

    windows: Sequence[Window]
    loss: Array
    entropy: Array
    confidence: Array
    right: Array

    def summary(self, split: TokenSplit) -> LossResult:
        """Mean, spread and bits per byte; `split` is the one that was read."""
        return summarise(self.loss, [window.scored for window in self.windows], tokens=split.tokens, size=split.bytes)

    def calibration(self) -> Calibration:
        """Expected calibration error of the top-1 prediction, and the means that it compares."""
        return Calibration(
            expected_calibration_error=expected_calibration_error(self.confidence, self.right),
            top_1_accuracy=float(self.right.mean(dtype=np.float64)),
            confidence=float(self.confidence.mean(dtype=np.float64)),
            entropy=float(self.entropy.mean(dtype=np.float64)),
        )

    def window_slices(self) -> Iterator[tuple[Window, slice]]:
        """Each window with its place in the figures."""
        start = 0
        for window in self.windows:
            yield window, slice(start, start + window.scored)
            start += window.scored

    def window_sums(self) -> Array:
        """(N,) summed loss of each window, nats."""
        starts = np.concatenate([[0], np.cumsum([window.scored for window in self.windows])[:-1]])
        sums: Array = np.add.reduceat(self.loss.astype(np.float64), starts)
        return sums


def token_statistics(
    model: nn.Module,
    split: TokenSplit,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> TokenStatistics:
    """Read a split once and keep four figures of every scored token.

    Args:
        stride: tokens between the beginnings of two windows; below the context, every token but those at the beginning of a
            shard has at least context - stride tokens before it. None: the context, windows side by side.
        model, split, context, max_tokens, device, precision, progress: as in `loss.cross_entropy`.

    Raises:
        UserError: as `loss.windows_to_score`.
    """
    windows = windows_to_score(model, split, context=context, max_tokens=max_tokens, stride=stride)
    loss, entropy, confidence, right = score_windows(
        model, split, windows, _figures, device=device, precision=precision, progress=progress
    )
    return TokenStatistics(windows, loss, entropy, confidence, right > 0)


def _figures(logits: Tensor, targets: Tensor) -> Tensor:
    """(4, m): loss, entropy, top-1 probability and whether it was right, of logits (m, V) and targets (m,)."""
    log_probs = logits.log_softmax(dim=-1)
    loss = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
    highest, top = log_probs.max(dim=-1)
    # A probability of 0 adds nothing, but its logarithm is minus infinity: 0 * -inf would be NaN.
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return torch.stack([loss, entropy, highest.exp(), (top == targets).to(loss.dtype)])


def expected_calibration_error(confidence: Array, right: Array, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance of confidence and accuracy over equal bins of the confidence, weighted by tokens (Guo et al. 2017).

    Args:
        confidence: (M,) in [0, 1]. right: (M,) booleans.
    """
    # A model whose logits are not finite gets an error that is not one either, not an exception.
    bin_of = np.clip((np.nan_to_num(confidence) * bins).astype(np.int64), 0, bins - 1)
    surplus = confidence.astype(np.float64) - right
    return float(np.abs(np.bincount(bin_of, weights=surplus, minlength=bins)).sum() / len(confidence))


def by_position(statistics: TokenStatistics) -> tuple[PositionLoss, ...]:
    """Mean loss by the position of the input that predicts, in bins that widen by half octaves."""
    longest = max(window.count for window in statistics.windows)
    sums, counts = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    for window, place in statistics.window_slices():
        sums[window.skip : window.count] += statistics.loss[place]
        counts[window.skip : window.count] += 1
    edges = position_edges(longest)
    if len(edges) > 2 and 2 * (longest - edges[-1]) < edges[-1] - edges[-2]:
        edges.pop()  # a short last bin would be noise beside its neighbour
    found = []
    for first, end in zip(edges, [*edges[1:], longest], strict=True):
        if tokens := int(counts[first:end].sum()):
            loss = float(sums[first:end].sum() / tokens)
            found.append(PositionLoss(first=first, last=end - 1, loss=loss, tokens=tokens))
    return tuple(found)


def position_edges(length: int) -> list[int]:
    """First positions of the bins below `length`: 0, 1, 2, 3, 5, 7, 10, 15, 22, ..., one less than powers of sqrt(2)."""
    edges = {round(2 ** (half / 2)) - 1 for half in range(2 * max(1, length).bit_length() + 2)}
    return sorted(edge for edge in edges if edge < length)


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
