"""Statistics of a model's predictions on a split, token by token, and of its residual stream, layer by layer.

One pass over the tokens keeps four numbers of each token: loss, entropy, top-1 probability and whether the top-1 token was
right. Calibration, loss by position and the worst windows follow from them. The standard deviation of the residual stream
is what LayerNorm divides by (and its root mean square what RMSNorm does); an LN-free model divides by a constant in its place.

Shape legend: B batch, T positions, D width, L layers, V vocabulary, M scored tokens, N windows, m positions of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ln_removal.data.documents import plan_documents
from ln_removal.data.sampler import Window
from ln_removal.evaluation.loss import (
    BATCH_TOKENS,
    LossResult,
    padded,
    score_windows,
    scoring,
    summarise,
    windows_to_score,
)
from ln_removal.evaluation.results import Calibration, PositionLoss, ResidualStd
from ln_removal.models.families import blocks_of, final_norm_of, known_family, mlp_norms_of
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from ln_removal.config.recipe import WindowKind
    from ln_removal.data.tokens import TokenSplit

Array = npt.NDArray[Any]

CALIBRATION_BINS = 15
MAX_TOKENS = 16_384
"""Tokens that `residual_std` reads at most. A mean over positions needs no more."""


@dataclass(frozen=True)
class TokenStatistics:
    """Four numbers of every scored token, window after window.

    Attributes:
        windows: the N windows that were scored.
        loss: (M,) negative log-probability of the token, nats.
        entropy: (M,) of the predicted distribution, nats.
        confidence: (M,) probability of the likeliest token.
        right: (M,) whether the likeliest token was the right one.
    """

    windows: Sequence[Window]
    loss: Array
    entropy: Array
    confidence: Array
    right: Array

    def summary(self, split: TokenSplit) -> LossResult:
        """Mean, percentiles and bits per byte of the losses; `split` is the one that was scored."""
        return summarise(self.loss, [window.scored for window in self.windows], tokens=split.tokens, size=split.bytes)

    def calibration(self) -> Calibration:
        """Expected calibration error of the top-1 prediction, mean top-1 probability, top-1 accuracy and mean entropy."""
        return Calibration(
            expected_calibration_error=expected_calibration_error(self.confidence, self.right),
            top_1_accuracy=float(self.right.mean(dtype=np.float64)),
            confidence=float(self.confidence.mean(dtype=np.float64)),
            entropy=float(self.entropy.mean(dtype=np.float64)),
        )

    def window_slices(self) -> Iterator[tuple[Window, slice]]:
        """Each window with the slice of its tokens in `loss` and the other arrays."""
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
    windows: WindowKind = "stream",
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> TokenStatistics:
    """Score a split once and keep four numbers of every scored token.

    Args:
        stride: tokens between the beginnings of two windows. With a stride below the context, every token but those at the
            beginning of a shard has at least context - stride tokens before it. None: the context, windows do not overlap.
        model, split, context, windows, max_tokens, device, precision, progress: as in `loss.cross_entropy`.

    Raises:
        UserError: as `loss.windows_to_score`.
    """
    plan = windows_to_score(model, split, context=context, windows=windows, max_tokens=max_tokens, stride=stride)
    loss, entropy, confidence, right = score_windows(
        model, split, plan, _four_numbers, device=device, precision=precision, progress=progress
    )
    return TokenStatistics(plan, loss, entropy, confidence, right > 0)


def _four_numbers(logits: Tensor, targets: Tensor) -> Tensor:
    """(4, m): loss, entropy, top-1 probability and whether the top-1 token was right, of logits (m, V) and targets (m,).

    The logits are overwritten.
    """
    highest, top = logits.max(dim=-1)
    below = logits.sub_(highest[:, None])  # <= 0; few passes over the logits, and one more array of their size
    of_target = below.gather(-1, targets[:, None]).squeeze(-1)
    # A probability of 0 adds nothing to the entropy, but 0 * log(0) would be NaN.
    weights = below.clamp_(min=torch.finfo(below.dtype).min).exp()
    total = weights.sum(dim=-1)
    entropy = total.log() - torch.linalg.vecdot(weights, below) / total
    return torch.stack([total.log() - of_target, entropy, 1 / total, (top == targets).to(logits.dtype)])


def expected_calibration_error(confidence: Array, right: Array, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance between confidence and accuracy over equal bins of the confidence, weighted by tokens (Guo et al. 2017).

    Args:
        confidence: (M,) between 0 and 1.
        right: (M,) booleans.
    """
    # The error of a model whose logits are not finite is not finite; it is no exception.
    bin_of = np.clip((np.nan_to_num(confidence) * bins).astype(np.int64), 0, bins - 1)
    surplus = confidence.astype(np.float64) - right
    return float(np.abs(np.bincount(bin_of, weights=surplus, minlength=bins)).sum() / len(confidence))


def by_position(statistics: TokenStatistics) -> tuple[PositionLoss, ...]:
    """Mean loss by the position that predicts, in the bins of `position_edges`."""
    longest = max(window.count for window in statistics.windows)
    sums, counts = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    for window, place in statistics.window_slices():
        sums[window.skip : window.count] += statistics.loss[place]
        counts[window.skip : window.count] += 1
    edges = position_edges(longest)
    if len(edges) > 2 and 2 * (longest - edges[-1]) < edges[-1] - edges[-2]:
        edges.pop()  # the mean over a short last bin would be noisy
    found = []
    for first, end in zip(edges, [*edges[1:], longest], strict=True):
        if tokens := int(counts[first:end].sum()):
            loss = float(sums[first:end].sum() / tokens)
            found.append(PositionLoss(first=first, last=end - 1, loss=loss, tokens=tokens))
    return tuple(found)


def position_edges(length: int) -> list[int]:
    """First positions of the bins below `length`: 0, 1, 2, 3, 5, 7, 10, 15, 22, ..., the powers of sqrt(2) less one."""
    edges = {round(2 ** (half / 2)) - 1 for half in range(2 * max(1, length).bit_length() + 2)}
    return sorted(edge for edge in edges if edge < length)


def residual_std(
    model: Any,
    split: TokenSplit,
    *,
    context: int,
    eot_token_id: int,
    windows: WindowKind = "stream",
    max_tokens: int = MAX_TOKENS,
    precision: Precision = "float32",
) -> ResidualStd | None:
    """Standard deviation of the residual stream over its width, at the input of every block, between attention and MLP, and
    at the input of the final norm; mean over positions. Of a model whose norms are RMSNorms, the root mean square.

    Args:
        model: a language model with norms, with freezable norms, or with identities in place of its norms.
        context: tokens in a window.
        eot_token_id: such tokens, and position 0, are no ordinary positions.
        windows: whole windows of the stream, or documents.
        max_tokens: read about this many at most.

    Returns:
        None for a model of no known family, and for a split without a whole window or without an ordinary position.
    """
    family = known_family(model.config)
    if family is None:
        return None
    device = next(model.parameters()).device
    places = _places(model)
    found: list[Tensor] = []  # (B, T) for each place, in the order of the forward pass
    hooks = [
        place.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(_std(args, kwargs, centred=family.centred)), with_kwargs=True
        )
        for place in places
    ]
    sums = torch.zeros(2, len(places), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    try:
        with scoring(model, device, precision):
            for ids, text in _texts(split, context, max_tokens, windows):
                found.clear()
                model.base_model(input_ids=ids.to(device), use_cache=False)
                stds = torch.stack(found).to("cpu", torch.float64)  # (places, B, T)
                first = torch.zeros(ids.shape, dtype=torch.bool)
                first[:, 0] = True
                ordinary = ~first & (ids != eot_token_id) & text
                for row, members in enumerate((ordinary, first)):
                    sums[row] += stds[:, members].sum(dim=1)
                    counts[row] += members.sum()
                tokens += int(text.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return _as_result(sums, counts, tokens) if counts.all() else None


def _as_result(sums: Tensor, counts: Tensor, tokens: int) -> ResidualStd:
    """From sums (2, places) and counts (2,) of ordinary positions and of position 0."""
    ordinary_means, first_means = (sums / counts[:, None]).tolist()
    return ResidualStd(
        ordinary_pre=tuple(ordinary_means[0::2]),
        ordinary_mid=tuple(ordinary_means[1::2]),
        first_pre=tuple(first_means[0::2]),
        first_mid=tuple(first_means[1::2]),
        tokens=tokens,
    )


def _places(model: Any) -> list[nn.Module]:
    """The blocks, the norm between attention and MLP of each, and the final norm, in the order of the forward pass."""
    inside = zip(blocks_of(model), mlp_norms_of(model), strict=True)
    return [*itertools.chain.from_iterable(inside), final_norm_of(model)]


def _texts(split: TokenSplit, context: int, max_tokens: int, windows: WindowKind) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of token ids (B, T), and which of them are text and no padding."""
    batch = max(1, BATCH_TOKENS["cpu"] // context)
    if windows == "stream":
        for rows in split.windows(context, limit_tokens=max_tokens, batch=batch):
            yield torch.from_numpy(rows), torch.ones(rows.shape, dtype=torch.bool)
        return
    documents = plan_documents(split, context, max_tokens)
    for start in range(0, len(documents), batch):
        tokens, text = padded(split, documents[start : start + batch])
        yield tokens[:, :-1], text


def _std(args: tuple[Any, ...], kwargs: dict[str, Any], *, centred: bool) -> Tensor:
    """(B, T) standard deviation over the width, or root mean square, of the residual stream (B, T, D) that a module was called with."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.std(dim=-1, correction=0) if centred else wide.square().mean(dim=-1).sqrt()
