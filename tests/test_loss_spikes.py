"""Loss spikes and the schedule that waits for their end: when one begins, what is put off, and for how long at most."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import LAYERS, FaultyObjective, Stop, TinyRun, tiny_spec

from ln_removal.config.recipe import ScheduleSpec
from ln_removal.norms.schedule import RemovalSchedule, expand
from ln_removal.training.checkpoint import checkpoints
from ln_removal.training.divergence import LEAST_WINDOW, SpikeDetector, WaitingSchedule
from ln_removal.training.loop import LOG_EVERY
from ln_removal.training.loss import StepLoss

STEPS = 140


def planned(taper: int = 0) -> RemovalSchedule:
    """The values' sites at steps 38 and 52, everything constant at step 74."""
    spec = ScheduleSpec(ln_2_start=24, ln_2_gap=3, qk_gap=4, v_gap=14, eot_after=6, first_after=2, taper=taper)
    return expand(spec, LAYERS, STEPS)


def noise(count: int, sigma: float = 0.05, seed: int = 0) -> list[float]:
    return list(3.0 + sigma * np.random.default_rng(seed).standard_normal(count))


def seen(losses: list[float]) -> list[tuple[int, str]]:
    spikes = SpikeDetector()
    return [(step, what) for step, loss in enumerate(losses) if (what := spikes.observe(loss))]


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("slope", [0.0, -0.01])
def test_noise_is_no_spike(sigma: float, slope: float) -> None:
    for seed in range(5):
        assert seen([loss + slope * step for step, loss in enumerate(noise(400, sigma, seed))]) == []


def test_a_spike_begins_with_the_second_high_loss_and_ends_with_the_third_low_one() -> None:
    losses = [*noise(40), 5.0, 5.0, 6.0, 4.0, *noise(20)]
    assert seen(losses) == [(41, "spike"), (46, "recovered")]
    assert seen([*noise(40), 5.0, *noise(10), 5.0, *noise(10)]) == [], "single steps are no spike"
    assert seen([*noise(40), 5.0, 5.0, *[3.4] * 20]) == [(41, "spike")], "half the least rise is not recovered"
    assert seen([*noise(40), math.nan, math.inf, *noise(3)]) == [(41, "spike"), (44, "recovered")]


def test_an_ordinary_bump_is_no_spike() -> None:
    assert seen([*noise(40, 0.01), *[3.3, 3.25, 3.2, 3.1] * 3, *noise(20, 0.01)]) == []


def test_it_needs_a_few_losses_to_know_what_is_usual() -> None:
    assert seen([3.0] * (LEAST_WINDOW // 2 - 1) + [9.0] * 20) == []
    assert seen([3.0] * LEAST_WINDOW + [9.0] * 10) == [(LEAST_WINDOW + 1, "spike")]


def follow(
    schedule: WaitingSchedule, losses: list[float], first: int = 0, reads: frozenset[int] = frozenset()
) -> list[str]:
    """Run the schedule as the loop does: losses read when it logs, and after the steps in `reads`; what changed."""
    changed: list[str] = []
    unread: list[float] = []
    for step, loss in enumerate(losses, start=first):
        changed.append(str(schedule.changes(step)))
        unread.append(loss)
        if (step + 1) % LOG_EVERY == 0 or step + 1 in reads:
            for value in unread:
                schedule.observe(value)
            unread = []
        if (step + 1) % LOG_EVERY == 0:
            schedule.decide(step + 1 + LOG_EVERY)
    for value in unread:  # what a checkpoint does
        schedule.observe(value)
    return changed


def begins(schedule: RemovalSchedule) -> dict[str, int]:
    return {event.site: event.step for event in schedule.events}


def test_without_a_spike_it_is_the_plan() -> None:
    schedule = WaitingSchedule(planned())
    assert follow(schedule, noise(STEPS)) == [str(planned().changes(step)) for step in range(STEPS)]
    assert schedule.current == planned()


def test_what_has_not_begun_waits_until_the_loss_has_recovered() -> None:
    schedule = WaitingSchedule(planned())
    losses = noise(STEPS)
    losses[39:55] = [6.0] * 16  # after the first of the values' sites
    follow(schedule, losses)
    plan, found = begins(planned()), begins(schedule.current)
    late = {site for site in plan if found[site] != plan[site]}
    assert late == {"ln_1_v.1", "ln_f", "eot", "first"}
    # Seen at step 50, still there then and not at 60: the next may begin there, 8 steps late, and so does what follows.
    assert {found[site] - plan[site] for site in late} == {8}
    assert schedule.stage(plan["ln_1_v.1"]) == f"ln_1_v 1/{LAYERS}", "the stage is that of what really happened"


def test_waiting_takes_half_of_the_recovery_at_most() -> None:
    schedule = WaitingSchedule(planned())
    follow(schedule, [*noise(40), *[50.0] * (STEPS - 40)])
    recovery = STEPS - 1 - planned().complete_at
    assert schedule.complete_at == schedule.latest_complete_at == planned().complete_at + recovery // 2


loss_lists = st.lists(
    st.floats(0, 20) | st.floats(2.9, 3.1) | st.sampled_from([3.0, 50.0, math.nan, math.inf]),
    min_size=STEPS,
    max_size=STEPS,
)
bursts = st.builds(
    lambda calm, at, length, height: [
        height if start <= step < start + length else calm[step % len(calm)] for step in range(STEPS) for start in [at]
    ],
    st.lists(st.floats(2.9, 3.1), min_size=7, max_size=30),
    st.integers(10, STEPS),
    st.integers(1, 60),
    st.sampled_from([4.0, 9.0, 1e6, math.inf, math.nan]),
)


@settings(deadline=None, max_examples=80)
@given(loss_lists | bursts, st.integers(0, 4))
def test_whatever_the_losses(losses: list[float], taper: int) -> None:
    plan = planned(taper)
    schedule = WaitingSchedule(plan)
    mixes = {event.site: 0.0 for event in plan.events}
    for step, loss in enumerate(losses):
        for change in schedule.changes(step):
            assert change.value >= mixes[change.site], "a mix never falls"
            mixes[change.site] = change.value
        schedule.observe(loss)
        if (step + 1) % LOG_EVERY == 0:
            schedule.decide(step + 1 + LOG_EVERY)
    assert set(mixes.values()) == {1.0}, "everything is frozen in the end"
    schedule.current.validate()
    assert schedule.complete_at <= schedule.latest_complete_at
    found = schedule.current.events
    assert [event.site for event in found] == [event.site for event in plan.events], "the order is kept"
    for event, meant in zip(found, plan.events, strict=True):
        assert event.step >= meant.step, "never earlier than planned"
    for (before, after), (was, then) in zip(pairwise(found), pairwise(plan.events), strict=True):
        assert after.step - before.step >= then.step - was.step


@settings(deadline=None, max_examples=60)
@given(loss_lists | bursts, st.integers(0, STEPS - 1))
def test_resuming_from_anywhere_changes_nothing(losses: list[float], stop: int) -> None:
    # A run that is stopped saves wherever it is, so its losses are read there too.
    whole, before, after = WaitingSchedule(planned()), WaitingSchedule(planned()), WaitingSchedule(planned())
    expected = follow(whole, losses)
    changed = follow(before, losses[:stop])
    after.restore(json.loads(json.dumps(before.state())), stop)
    changed += follow(after, losses[stop:], first=stop, reads=frozenset({stop + 3, stop + 17}))
    assert changed == expected
    assert after.current == whole.current


@pytest.mark.parametrize("step", [0, 25, 38, 39, 60, STEPS])
def test_a_checkpoint_that_knows_nothing_of_waiting_goes_on_as_planned(step: int) -> None:
    schedule = WaitingSchedule(planned())
    schedule.restore(None, step)
    changed = [str(schedule.changes(number)) for number in range(step, STEPS)]
    assert changed == [str(planned().changes(number)) for number in range(step, STEPS)]


class SpikingObjective(FaultyObjective):
    """Reports losses that are too high from step 39 to step 54. What is trained does not change."""

    def forward(self, tokens: torch.Tensor) -> StepLoss:
        rise = 3.0 if 39 <= self.calls < 55 else 0.0
        loss = super().forward(tokens)
        return StepLoss(loss.total, loss.cross_entropy + rise)


def spiking(directory: Path, *, seed: int = 0) -> TinyRun:
    spec = tiny_spec(steps=STEPS, checkpoint_every=50)
    return TinyRun(directory, spec=spec, on_spike="wait", planned=planned(), objective=SpikingObjective, seed=seed)


def test_a_spike_slows_the_schedule_down(tmp_path: Path) -> None:
    run = spiking(tmp_path / "whole")
    run.train()
    schedule = run.schedule
    assert isinstance(schedule, WaitingSchedule) and run.sites is not None
    assert run.sites.all_frozen() and run.sites.special_dropped()
    assert planned().complete_at < schedule.complete_at <= schedule.latest_complete_at
    incidents = run.metrics("incident")
    first = incidents[0]
    assert first["incident"] == "spike" and first["loss"] > first["usual_loss"] + 0.5
    waits = [row for row in incidents if row["incident"] == "waiting"]
    assert waits[0]["site"] == "ln_1_v.1" and waits[-1]["delay"] == schedule.progress.delay
    happened = {}
    for row in run.metrics("event"):
        happened.setdefault(row["site"], row["step"])
    assert happened == begins(schedule.current)
    stopped = spiking(tmp_path / "stopped")
    stopped.objective.stop_at = 55  # type: ignore[assignment]
    with pytest.raises(Stop):
        stopped.train()
    _, newest = checkpoints(stopped.state)[-1]
    assert json.loads((newest / "trainer.json").read_text())["schedule"]["spikes"]["spiking"]
    resumed = spiking(tmp_path / "stopped", seed=1)
    resumed.objective.calls = 50  # type: ignore[assignment]
    resumed.train(resume=True)
    assert resumed.metrics("event") == run.metrics("event") and resumed.metrics("incident") == incidents
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name
