"""A schedule that waits: what freezes next does so when the loss has recovered from what froze last.

The planned schedule gives the order and the smallest gaps. With l the training loss smoothed over steps and r its value just
before the last group of events began, the next group begins at its planned step if l <= r + tolerance; else everything that
has not begun is put off by a step, at most until `largest_gap` steps have passed or the run's recovery would be cut short.
Pure Python; what it decides depends on the losses alone, so ranks agree and a resumed run goes on in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ln_removal.schedule import Change, Event, RemovalSchedule

if TYPE_CHECKING:
    from ln_removal.recipe import AdaptiveSpec


@dataclass
class Pace:
    """Where an adaptive schedule stands; kept in checkpoints.

    Attributes:
        delay: steps by which what has not begun comes later than planned.
        begun: the steps at which the first events began, in the schedule's order.
        smoothed: l, nats per token; None before the first step.
        reference: r; None before the first freeze.
    """

    delay: int
    begun: list[int]
    smoothed: float | None = None
    reference: float | None = None


class AdaptiveSchedule:
    """Answers as a `RemovalSchedule` does, for the events as they are and will be if nothing else is put off.

    Args:
        planned: with the smallest gaps; valid.
        spec: tolerance, smoothing, largest gap and recovery.
    """

    def __init__(self, planned: RemovalSchedule, spec: AdaptiveSpec) -> None:
        self.planned = planned
        self.spec = spec
        self.pace = Pace(0, [])
        self._current = planned

    @property
    def current(self) -> RemovalSchedule:
        """The events that have begun, when they did, and the others as now expected."""
        return self._current

    @property
    def steps(self) -> int:
        return self.planned.steps

    @property
    def complete_at(self) -> int:
        return self._current.complete_at

    @property
    def latest_complete_at(self) -> int:
        """The last step at which everything can be frozen, however slowly the loss recovers."""
        groups = len({event.step for event in self.planned.events})
        return max(
            self.planned.complete_at, min(self._deadline, self.planned.complete_at + groups * self.spec.largest_gap)
        )

    @property
    def _deadline(self) -> int:
        return self.planned.steps - 1 - self.spec.recovery

    def changes(self, step: int) -> list[Change]:
        """As `RemovalSchedule.changes`; notes what begins. To be asked once for each step, in order."""
        for event in self._current.events[len(self.pace.begun) :]:
            if event.step > step:
                break
            if not self.pace.begun or event.step > self.pace.begun[-1]:
                self.pace.reference = self.pace.smoothed
            self.pace.begun.append(event.step)
        return self._current.changes(step)

    def stage(self, step: int) -> str:
        return self._current.stage(step)

    def begins_of_kinds(self) -> list[int]:
        return self._current.begins_of_kinds()

    def observe(self, step: int, loss: float) -> None:
        """Take note of a step's training loss (nats per token) and decide about the next step's events."""
        pace, spec = self.pace, self.spec
        if math.isfinite(loss):  # else the step changed nothing, and infinity would stay in the mean for good
            smoothing = 0.0 if pace.smoothed is None else spec.smoothing
            pace.smoothed = smoothing * (pace.smoothed or 0.0) + (1 - smoothing) * loss
        waiting = self._current.events[len(pace.begun) :]
        if not waiting or waiting[0].step > step + 1 or pace.reference is None or pace.smoothed is None:
            return
        recovered = pace.smoothed <= pace.reference + spec.tolerance
        long_enough = step + 1 - pace.begun[-1] >= spec.largest_gap
        too_late = self._current.complete_at + 1 > self._deadline
        if not (recovered or long_enough or too_late):
            pace.delay += 1
            self._current = self._expected()

    def _expected(self) -> RemovalSchedule:
        events: list[Event] = []
        for number, event in enumerate(self.planned.events):
            step = self.pace.begun[number] if number < len(self.pace.begun) else event.step + self.pace.delay
            events.append(replace(event, step=step))
        return RemovalSchedule(tuple(events), self.planned.n_layer, self.planned.steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        pace = self.pace
        return {"delay": pace.delay, "begun": list(pace.begun), "smoothed": pace.smoothed, "reference": pace.reference}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.pace = Pace(**state)
        self._current = self._expected()
