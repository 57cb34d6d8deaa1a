"""The learning rate over a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.config.recipe import TrainingSpec, load_recipe
from ln_removal.training.optimizers import distillation_at, learning_rate_at


def spec(**changes: object) -> TrainingSpec:
    values: dict[str, object] = {
        "steps": 100,
        "tokens_per_step": 1024,
        "learning_rate": 1e-3,
        "minimum_learning_rate": 1e-4,
        "warmup_steps": 10,
    }
    return TrainingSpec.model_validate(values | changes)


@st.composite
def specs(draw: st.DrawFn) -> TrainingSpec:
    steps = draw(st.integers(1, 300))
    end = draw(st.none() | st.integers(1, 400))
    fraction = draw(st.floats(0.05, 1.0))
    length = steps if end is None else end
    decay = draw(st.sampled_from(["cosine", "linear", "trapezoid"]))
    latest = length - round(fraction * length) if decay == "trapezoid" else min(steps, length)
    return spec(
        steps=steps,
        decay_steps=end,
        decay=decay,
        decay_fraction=fraction,
        warmup_steps=draw(st.integers(0, min(steps, latest))),
        minimum_learning_rate=draw(st.floats(0.0, 1e-3)),
    )


@given(specs())
@settings(deadline=None)
def test_rises_to_the_peak_then_falls_to_the_minimum(drawn: TrainingSpec) -> None:
    rates = [learning_rate_at(step, drawn) for step in range(450)]
    warm = drawn.warmup_steps
    tolerance = 1e-12
    assert all(0 < rate <= drawn.learning_rate + tolerance for rate in rates[:warm])
    assert all(later > earlier for earlier, later in pairwise(rates[:warm]))
    after = rates[warm:]
    assert all(later <= earlier + tolerance for earlier, later in pairwise(after))
    assert all(drawn.minimum_learning_rate - tolerance <= rate <= drawn.learning_rate + tolerance for rate in after)
    assert rates[-1] == drawn.minimum_learning_rate
    if warm:
        assert rates[warm - 1] == pytest.approx(drawn.learning_rate)


@given(specs())
@settings(deadline=None)
def test_no_jump_larger_than_the_curve_allows(drawn: TrainingSpec) -> None:
    end = drawn.steps if drawn.decay_steps is None else drawn.decay_steps
    start = end - round(drawn.decay_fraction * end) if drawn.decay == "trapezoid" else drawn.warmup_steps
    span = drawn.learning_rate - drawn.minimum_learning_rate
    steepest = span * (math.pi / 2 if drawn.decay == "cosine" else 1.0) / max(1, end - start)
    rates = [learning_rate_at(step, drawn) for step in range(drawn.warmup_steps, end)]
    assert all(earlier - later <= steepest + 1e-12 for earlier, later in pairwise(rates))


def test_cosine_values() -> None:
    flat = spec(warmup_steps=0)
    assert learning_rate_at(0, flat) == pytest.approx(1e-3)
    assert learning_rate_at(25, flat) == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate_at(50, flat) == pytest.approx(5.5e-4)
    assert learning_rate_at(100, flat) == 1e-4


def test_trapezoid_is_flat_then_linear_over_the_last_share() -> None:
    flat = spec(decay="trapezoid", decay_fraction=0.4)
    assert {learning_rate_at(step, flat) for step in range(10, 61)} == {1e-3}
    assert learning_rate_at(80, flat) == pytest.approx(5.5e-4)
    assert learning_rate_at(100, flat) == 1e-4


def test_a_decay_longer_than_the_run_ends_above_the_minimum() -> None:
    training = load_recipe("gpt2-apollo").training
    assert (training.steps, training.decay_steps) == (1200, 2000)
    progress = (1199 - 100) / (2000 - 100)
    expected = 6e-5 + 5.4e-4 * (1 + math.cos(math.pi * progress)) / 2
    assert learning_rate_at(1199, training) == pytest.approx(expected)
    assert expected > 2e-4


def test_a_run_of_one_step_learns() -> None:
    assert learning_rate_at(0, spec(steps=1, warmup_steps=0, minimum_learning_rate=0.0)) == 1e-3


def test_the_teachers_share_goes_from_one_value_to_the_other() -> None:
    def shares(**given: float) -> list[float]:
        spec = TrainingSpec(steps=5, tokens_per_step=8, learning_rate=1e-3, **given)
        return [distillation_at(step, spec) for step in range(5)]

    assert shares(distillation=1.0, distillation_end=0.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert shares(distillation=0.5) == [0.5] * 5
    assert shares() == [0.0] * 5
