"""Is the difference between two models more than chance? Both answered the same questions, or read the same tokens.

Pairing is what makes small differences visible: what is hard for one model is hard for the other, and that part of the
noise cancels. All draws are seeded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError

Array = npt.NDArray[Any]

RESAMPLES = 2000
CONFIDENCE = 0.95

_INDICES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its percentile bootstrap interval, in the figure's own unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AccuracyComparison:
    """Two models on the same questions, second minus first.

    Attributes:
        questions: asked of both.
        only_first, only_second: answered rightly by one of them alone.
        difference: of the accuracies, as a share, with its paired bootstrap interval.
        p_value: exact two-sided McNemar test that both are equally good.
    """

    questions: int
    only_first: int
    only_second: int
    difference: Interval
    p_value: float


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947, in its binomial form).

    Only questions on which the models disagree say anything. If both were equally good, either would be the right one
    with probability 1/2, so p = min(1, 2 P(X <= min(b, c))) with X ~ Binomial(b + c, 1/2).

    Args:
        only_first, only_second: b and c, questions that one model alone answered rightly.
    """
    assert only_first >= 0 and only_second >= 0, (only_first, only_second)
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    if not discordant:
        return 1.0
    # Whole numbers: exact, and no overflow where 2**discordant is beyond a float.
    tail = term = 1
    for k in range(1, fewer + 1):
        term = term * (discordant - k + 1) // k
        tail += term
    shift = max(0, tail.bit_length() - 64)  # a tail may be beyond a float, its logarithm is not
    log2 = math.log2(tail >> shift) + shift + 1 - discordant
    return min(1.0, 2.0**log2)


def compare_accuracies(
    first: Array, second: Array, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> AccuracyComparison:
    """Compare two models by which questions they answered rightly.

    Args:
        first, second: (N,) booleans, question by question.
        seed, resamples, confidence: of the bootstrap.

    Raises:
        UserError: they did not answer the same number of questions, or none.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise UserError(
            f"a paired comparison needs the same questions of both models; found {first.size} and {second.size} answers"
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


def bootstrap_means(
    sums: Array, counts: Array, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Percentile bootstrap intervals (Efron 1979) of several means over the same units, all from the same resamples.

    Units (documents, windows, questions) are drawn with replacement; a mean is the drawn sums over the drawn counts, so
    units weigh as much as they hold. A row of differences gives the interval of a paired difference.

    Args:
        sums: (K, N) sum of each of K quantities in each unit.
        counts: (N,) what each unit holds, such as tokens; positive.
        seed: of the draws.
        resamples: how many.
        confidence: share of the resampled means inside an interval.

    Returns:
        K intervals; with a single unit an interval is its value alone.
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
    with np.errstate(invalid="ignore"):  # a loss that is not finite makes an interval that is not
        lows, highs = np.percentile(means, [tail, 100 - tail], axis=1)
    values = sums.sum(axis=1) / counts.sum()
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, lows, highs, strict=True)]
