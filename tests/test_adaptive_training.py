"""A removal whose schedule waits for the loss: the loop tells it every loss, and an interrupted run waits in the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import STEPS, FaultyObjective, Stop, TinyRun, tiny_schedule, tiny_spec

from ln_removal.adaptive_schedule import AdaptiveSchedule
from ln_removal.recipe import AdaptiveSpec
from ln_removal.training.state import checkpoints

IMPATIENT = AdaptiveSpec(tolerance=100.0, largest_gap=1, recovery=0)
NEVER_SATISFIED = AdaptiveSpec(tolerance=0.0, smoothing=0.0, largest_gap=3, recovery=1)


def events(run: TinyRun) -> list[tuple[int, str, float]]:
    return [(row["step"], row["site"], row["value"]) for row in run.metrics("event")]


def test_a_patient_schedule_freezes_later_and_still_everything(tmp_path: Path) -> None:
    still = tiny_spec(
        learning_rate=1e-9, minimum_learning_rate=0.0
    )  # the loss goes up and down with the batches, no more
    planned, waiting = (
        TinyRun(tmp_path / name, spec=still, adaptive=spec)
        for name, spec in (("planned", IMPATIENT), ("waiting", NEVER_SATISFIED))
    )
    for run in (planned, waiting):
        run.train()
        assert run.sites is not None and run.sites.all_frozen() and run.sites.special_dropped()
    assert isinstance(planned.schedule, AdaptiveSchedule) and isinstance(waiting.schedule, AdaptiveSchedule)
    assert planned.schedule.complete_at == tiny_schedule().complete_at
    assert tiny_schedule().complete_at < waiting.schedule.complete_at <= STEPS - 1 - NEVER_SATISFIED.recovery
    first = {}
    for step, site, _ in events(waiting):
        first.setdefault(site, step)
    assert first == {event.site: event.step for event in waiting.schedule.current.events}, "metrics say when it was"


@pytest.mark.parametrize("stop_at", [6, 13])
def test_an_interrupted_run_waits_in_the_same_way(tmp_path: Path, stop_at: int) -> None:
    spec = tiny_spec(checkpoint_every=4, distillation=0.5)
    whole = TinyRun(tmp_path / "whole", spec=spec, adaptive=NEVER_SATISFIED)
    whole.train()
    stopped = TinyRun(tmp_path / "stopped", spec=spec, adaptive=NEVER_SATISFIED, objective=FaultyObjective)
    stopped.objective.stop_at = stop_at
    with pytest.raises(Stop):
        stopped.train()
    _, newest = checkpoints(stopped.state)[-1]
    assert json.loads((newest / "trainer.json").read_text())["schedule"]["begun"]
    resumed = TinyRun(tmp_path / "stopped", spec=spec, adaptive=NEVER_SATISFIED)
    resumed.train(resume=True)
    assert events(resumed) == events(whole)
    for (name, found), expected in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
