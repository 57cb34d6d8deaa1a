"""The schedule that waits for the loss: order and gaps whatever the losses, waiting when it should, and resuming."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.adaptive_schedule import AdaptiveSchedule
from ln_removal.errors import UserError
from ln_removal.recipe import AdaptiveSpec, ScheduleSpec
from ln_removal.schedule import RemovalSchedule, expand

LAYERS, STEPS = 3, 120


def planned(gap: int = 2, taper: int = 1) -> RemovalSchedule:
    spec = ScheduleSpec(
        ln_2_start=3, ln_2_gap=gap, qk_gap=gap, v_gap=gap, eot_after=2, first_after=2, taper=taper, special_taper=taper
    )
    return expand(spec, LAYERS, STEPS)


def adaptive(
    *, tolerance: float = 0.1, smoothing: float = 0.0, largest_gap: int = 9, recovery: int = 20
) -> AdaptiveSchedule:
    spec = AdaptiveSpec(tolerance=tolerance, smoothing=smoothing, largest_gap=largest_gap, recovery=recovery)
    return AdaptiveSchedule(planned(), spec)


def follow(schedule: AdaptiveSchedule, losses: list[float], first: int = 0) -> list[str]:
    """Run the schedule as the loop does; what changed in each step."""
    changed = []
    for step, loss in enumerate(losses, start=first):
        changed.append(str(schedule.changes(step)))
        schedule.observe(step, loss)
    return changed


def test_a_loss_that_does_not_rise_keeps_the_plan() -> None:
    schedule = adaptive()
    follow(schedule, [3.0] * STEPS)
    assert schedule.pace.delay == 0
    assert schedule.current.events == planned().events


def test_it_waits_until_the_loss_has_recovered() -> None:
    schedule = adaptive(tolerance=0.1)
    first, second = planned().events[:2]
    losses = [3.0] * first.step + [4.0] * 5 + [3.05] * (STEPS - first.step - 5)
    follow(schedule, losses)
    begun = [event.step for event in schedule.current.events]
    assert begun[0] == first.step
    # High in steps first .. first + 4, seen to be low after step first + 5, so the next begins in first + 6.
    assert begun[1] == first.step + 6 > second.step
    assert begun[2:4] == [begun[1] + 2, begun[1] + 4], "after that the gaps are the planned ones"


def test_it_does_not_wait_longer_than_the_largest_gap() -> None:
    schedule = adaptive(largest_gap=5, recovery=0)
    losses = [3.0] * 3 + [9.0 + step for step in range(STEPS - 3)]
    follow(schedule, losses)
    begun = [event.step for event in schedule.current.events]
    assert begun[1] - begun[0] == 5


def test_the_recovery_is_never_cut_short() -> None:
    schedule = adaptive(largest_gap=1000, recovery=60)
    follow(schedule, [3.0] * 3 + [9.0 + step for step in range(STEPS - 3)])
    assert schedule.complete_at <= STEPS - 1 - 60
    assert schedule.complete_at == STEPS - 1 - 60, "all of the slack is used"
    assert schedule.latest_complete_at == STEPS - 1 - 60


def test_an_infinite_loss_is_forgotten() -> None:
    for smoothing in (0.0, 0.9):
        schedule, undisturbed = adaptive(smoothing=smoothing), adaptive(smoothing=smoothing)
        losses = [3.0] * 3 + [4.0] * 4 + [3.0] * (STEPS - 7)
        follow(undisturbed, losses)
        follow(schedule, [math.inf, *losses[1:5], math.inf, *losses[6:]])
        assert schedule.pace.smoothed == pytest.approx(3.0, abs=0.01)
        assert schedule.complete_at <= undisturbed.complete_at + 1
        assert json.loads(json.dumps(schedule.state(), allow_nan=False)) == schedule.state()


def test_a_recovery_that_the_plan_itself_cuts_short_is_refused() -> None:
    spec = ScheduleSpec(
        ln_2_start=3,
        ln_2_gap=2,
        qk_gap=2,
        v_gap=2,
        eot_after=2,
        first_after=2,
        adaptive=AdaptiveSpec(largest_gap=9, recovery=STEPS - 20),
    )
    with pytest.raises(UserError, match=r"adaptive\.recovery is 100, but .* constant at step 25 of 120.* less than 94"):
        expand(spec, LAYERS, STEPS)
    spec = spec.model_copy(update={"adaptive": AdaptiveSpec(largest_gap=9, recovery=93)})
    assert expand(spec, LAYERS, STEPS).complete_at == 25


loss_lists = st.lists(st.floats(0, 20) | st.sampled_from([math.nan, math.inf]), min_size=STEPS, max_size=STEPS)


@settings(deadline=None, max_examples=60)
@given(loss_lists, st.floats(0, 2), st.floats(0, 0.95), st.integers(1, 30), st.integers(0, 60))
def test_whatever_the_losses(
    losses: list[float], tolerance: float, smoothing: float, largest_gap: int, recovery: int
) -> None:
    schedule = adaptive(tolerance=tolerance, smoothing=smoothing, largest_gap=largest_gap, recovery=recovery)
    plan = planned()
    mixes = {event.site: 0.0 for event in plan.events}
    for step, loss in enumerate(losses):
        for change in schedule.changes(step):
            assert change.value >= mixes[change.site], "a mix never falls"
            mixes[change.site] = change.value
        schedule.observe(step, loss)
    assert set(mixes.values()) == {1.0}
    schedule.current.validate()
    found = schedule.current.events
    assert [event.site for event in found] == [event.site for event in plan.events]
    assert schedule.complete_at <= schedule.latest_complete_at
    for (before, after), (was, then) in zip(pairwise(found), pairwise(plan.events), strict=True):
        gap, smallest = after.step - before.step, then.step - was.step
        assert smallest <= gap <= max(smallest, largest_gap)


@settings(deadline=None, max_examples=30)
@given(loss_lists, st.integers(0, STEPS - 1))
def test_resuming_changes_nothing(losses: list[float], stop: int) -> None:
    whole, before, after = adaptive(smoothing=0.5), adaptive(smoothing=0.5), adaptive(smoothing=0.5)
    expected = follow(whole, losses)
    changed = follow(before, losses[:stop])
    after.restore(json.loads(json.dumps(before.state())), stop)
    changed += follow(after, losses[stop:], first=stop)
    assert changed == expected
    assert after.current == whole.current


def test_stages_follow_what_really_happens() -> None:
    schedule = adaptive(largest_gap=50)
    first = planned().events[0].step
    follow(schedule, [3.0] * first + [9.0] * 20)
    assert schedule.stage(first + 10) == f"ln_2 1/{LAYERS}"
    assert schedule.begins_of_kinds()[0] == first


@pytest.mark.parametrize("layers", ["first to last", "last to first"])
def test_the_order_of_layers(layers: str) -> None:
    spec = ScheduleSpec.model_validate(
        {"ln_2_start": 3, "ln_2_gap": 2, "qk_gap": 1, "v_gap": 1, "eot_after": 0, "first_after": 0, "layers": layers}
    )
    found = [event.site for event in expand(spec, LAYERS, STEPS).events if event.site.startswith("ln_2")]
    up = ["ln_2.0", "ln_2.1", "ln_2.2"]
    assert found == (up if layers == "first to last" else up[::-1])
