"""How sure the difference between two models is: the paired bootstrap and McNemar's exact test.

Both models answered the same questions or read the same tokens. What is hard for one model is hard for the other, so this
part of the noise cancels in the differences, and small differences become visible. All draws are seeded.

Shape legend: M scored tokens, N units (documents, windows or questions), K quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.data.sampler import Window
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenSplit

Array = npt.NDArray[Any]

RESAMPLES = 2000
CONFIDENCE = 0.95

FEW_DOCUMENTS = 20
"""With fewer documents than this, windows are drawn: a bootstrap over a handful of documents says little."""

_INDICES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its percentile bootstrap interval, in the unit of the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Units:
    """What a bootstrap over tokens draws: documents, or windows where there are few documents.

    Attributes:
        name: "documents" or "windows".
        of_token: (M,) the unit of every scored token, counted from 0.
        counts: (N,) scored tokens in each unit.
    """

    name: str
    of_token: Array
    counts: Array

    def sums(self, losses: Array) -> Array:
        """(N,) summed loss of each unit, nats, of (M,) losses."""
        return np.bincount(self.of_token, weights=losses, minlength=len(self.counts))


def units_of(windows: Sequence[Window], split: TokenSplit, *, eot_token_id: int) -> Units:
    """Group the scored tokens of `windows` by document, or by window where there are fewer than FEW_DOCUMENTS.

    The end-of-text token belongs to the document that it ends.
    """
    ends = [np.flatnonzero(shard == eot_token_id) for shard in split.maps]
    first = np.cumsum([0, *(len(places) + 1 for places in ends)])
    documents = np.concatenate(
        [
            first[window.shard]
            + np.searchsorted(ends[window.shard], window.start + 1 + np.arange(window.skip, window.count))
            for window in windows
        ]
    )
    _, of_token, counts = np.unique(documents, return_inverse=True, return_counts=True)
    if len(counts) >= FEW_DOCUMENTS:
        return Units("documents", of_token.ravel(), counts)
    sizes = np.array([window.scored for window in windows])
    return Units("windows", np.repeat(np.arange(len(sizes)), sizes), sizes)


def bootstrap_means(
    sums: Array, counts: Array, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Percentile bootstrap intervals (Efron 1979) of several means over the same units.

    Units are drawn with replacement, and the same draws serve all K quantities. A mean is the sum over the drawn units
    divided by what they hold, so a unit weighs as much as it holds. The interval of a paired difference is that of a row
    of differences.

    Args:
        sums: (K, N) sum of each quantity in each unit.
        counts: (N,) what each unit holds, such as tokens; all positive.
        confidence: share of the resampled means inside an interval.

    Returns:
        K intervals. With a single unit, both ends of an interval are the value itself.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    assert sums.ndim == 2 and sums.shape[1] == counts.size and (counts > 0).all(), (sums.shape, counts.shape)
    random = np.random.default_rng(seed)
    units = counts.size
    means = np.empty((len(sums), resamples))
    for start in range(0, resamples, some := max(1, _INDICES_AT_ONCE // units)):
        stop = min(resamples, start + some)
        drawn = random.integers(units, size=(stop - start, units))
        total = counts[drawn].sum(axis=1)
        for row, values in zip(means, sums, strict=True):
            row[start:stop] = values[drawn].sum(axis=1) / total
    tail = 100 * (1 - confidence) / 2
    with np.errstate(invalid="ignore"):  # losses that are not finite make an interval that is not finite
        lows, highs = np.percentile(means, [tail, 100 - tail], axis=1)
    values = sums.sum(axis=1) / counts.sum()
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, lows, highs, strict=True)]


@dataclass(frozen=True, slots=True)
class AccuracyComparison:
    """Two models on the same questions, second minus first.

    Attributes:
        only_first, only_second: questions that one of the models alone answered rightly.
        difference: of the two accuracies (shares between 0 and 1), with its paired bootstrap interval.
        p_value: of the exact two-sided McNemar test that both models are equally good.
    """

    questions: int
    only_first: int
    only_second: int
    difference: Interval
    p_value: float


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947, in its binomial form).

    Only the questions on which the models disagree carry information. If both models were equally good, either of them
    would be the right one with probability 1/2. This is the two-sided binomial test of `only_first` successes in
    `only_first + only_second` trials; without any trial the p-value is 1.
    """
    from scipy.stats import binomtest  # takes more than a second to import

    assert only_first >= 0 and only_second >= 0, (only_first, only_second)
    discordant = only_first + only_second
    return float(binomtest(min(only_first, only_second), discordant).pvalue) if discordant else 1.0


def compare_accuracies(
    first: Array, second: Array, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> AccuracyComparison:
    """Compare two models by which questions they answered rightly: (N,) booleans of each, question by question.

    Raises:
        UserError: they did not answer the same number of questions, or none.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise UserError(
            f"a paired comparison needs the same questions of both models; found answers to {first.size} and to {second.size}; "
            "score both models on the same questions"
        )
    (difference,) = bootstrap_means(
        (second.astype(np.int64) - first.astype(np.int64))[None],
        np.ones(first.size),
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return AccuracyComparison(first.size, only_first, only_second, difference, mcnemar_p_value(only_first, only_second))
