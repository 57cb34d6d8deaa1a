"""McNemar's test and the paired bootstrap, against exact sums, direct resampling and known cases."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import bootstrap_means, compare_accuracies, mcnemar_p_value
from ln_removal.evaluation.hellaswag import ChoiceResult, QuestionScore, compare_choices


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (1, 3, 0.6249999999999999),
        (7, 19, 0.028959274291992163),
        (12, 40, 0.00012753878385574088),
        (45, 60, 0.1715646971542415),
        (130, 171, 0.020980661693762417),
        (812, 901, 0.03345633846311565),
        (1400, 1600, 0.00027856396103923475),
    ],
)
def test_mcnemar_is_what_version_0_1_computed(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(p_value, rel=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_sum(b: int, c: int) -> None:
    expected = min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    assert mcnemar_p_value(b, c) == pytest.approx(expected, rel=1e-12)
    assert mcnemar_p_value(b, c) == mcnemar_p_value(c, b)


def test_mcnemar_known_values_and_extremes() -> None:
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(5, 5) == 1.0
    assert mcnemar_p_value(0, 10) == pytest.approx(2 / 1024)
    exact = Fraction(sum(math.comb(3000, k) for k in range(1401)), 2**2999)  # beyond the range of a float in parts
    assert mcnemar_p_value(1400, 1600) == pytest.approx(float(exact), rel=1e-9)
    assert 0 <= mcnemar_p_value(0, 5000) < 1e-300


def test_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(3)
    values = random.normal(2.0, 1.5, 400)
    (found,) = bootstrap_means(values[None], np.ones(400), resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_pairing_removes_what_is_common() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(3.0, 2.0, 200)  # what is hard for both
    first, second = hard + random.normal(0, 0.05, 200), hard + 0.03 + random.normal(0, 0.05, 200)
    alone, _, paired = bootstrap_means(np.stack([first, second, second - first]), np.ones(200))
    assert paired.low > 0, "the difference is clear"
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


def test_units_weigh_as_much_as_they_hold() -> None:
    (found,) = bootstrap_means(np.array([[10.0, 1.0]]), np.array([10, 1]))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    (found,) = bootstrap_means(np.array([[30.0, 1.0]]), np.array([10, 1]))
    assert found.value == pytest.approx(31 / 11) and (found.low, found.high) == (1.0, 3.0)


def test_seeded_and_independent_of_how_the_draws_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    from ln_removal.evaluation import bootstrap

    sums = np.random.default_rng(1).normal(size=(2, 50))
    first = bootstrap_means(sums, np.ones(50), seed=5)
    assert bootstrap_means(sums, np.ones(50), seed=5) == first
    assert bootstrap_means(sums, np.ones(50), seed=6) != first
    monkeypatch.setattr(bootstrap, "_INDICES_AT_ONCE", 170)
    assert bootstrap_means(sums, np.ones(50), seed=5) == first


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_accuracies_by_question(answers: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(column) for column in zip(*answers, strict=True))
    found = compare_accuracies(first, second, resamples=200)
    assert found.difference.value == pytest.approx(second.mean() - first.mean())
    assert found.only_second - found.only_first == second.sum() - first.sum()
    assert -1 <= found.difference.low <= found.difference.high <= 1
    swapped = compare_accuracies(second, first, resamples=200)
    assert swapped.p_value == found.p_value and swapped.difference.value == -found.difference.value


def test_the_mcnemar_test_rejects_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        first, second = random.random((2, 150)) < 0.6  # equally good models
        rejected += mcnemar_p_value(int((first & ~second).sum()), int((second & ~first).sum())) < 0.05
    assert rejected / 300 < 0.08


def test_what_cannot_be_compared() -> None:
    def answered(inds: list[int], protocol: str = "code") -> ChoiceResult:
        scores = tuple(QuestionScore(ind, 0, 0, 1, (0.0,) * 4, (0.0,) * 4) for ind in inds)
        return ChoiceResult(protocol, len(inds), 1.0, None, 0.0, None, scores)  # type: ignore[arg-type]

    found = compare_choices(answered([1, 2]), answered([1, 2]))
    assert found["acc"]["difference"] == 0 and found["acc_norm"]["p_value"] == 1.0
    for other in (answered([1, 3]), answered([1]), answered([1, 2], "nanogpt")):
        with pytest.raises(UserError, match="questions"):
            compare_choices(answered([1, 2]), other)
    with pytest.raises(UserError, match="questions"):
        compare_accuracies(np.array([True]), np.array([True, False]))
