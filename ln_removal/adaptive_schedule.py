"""A schedule that waits: what freezes next does so when the loss has recovered from what froze last.

The planned schedule gives the order and the smallest gaps. With l the training loss smoothed over steps and r its value just
before the last group of events began, the next group begins at its planned step if l <= r + tolerance; else everything that
has not begun is put off by a step, at most until `largest_gap` steps have passed or the run's recovery would be cut short.
Pure Python; what it decides depends on the losses alone, so ranks agree and a resumed run goes on in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ln_removal.delayed_schedule import DelayedSchedule, Pace
from ln_removal.schedule import Event, RemovalSchedule

if TYPE_CHECKING:
    from ln_removal.recipe import AdaptiveSpec


@dataclass
class AdaptivePace(Pace):
    """Where an adaptive schedule stands.

    Attributes:
        smoothed: l, nats per token; None before the first step.
        reference: r; None before the first freeze.
    """

    smoothed: float | None = None
    reference: float | None = None


class AdaptiveSchedule(DelayedSchedule):
    """Waits after each group of events until the loss is what it was, within a tolerance.

    Args:
        planned: with the smallest gaps; valid.
        spec: tolerance, smoothing, largest gap and recovery.
    """

    needs_every_loss = True
    pace: AdaptivePace

    def __init__(self, planned: RemovalSchedule, spec: AdaptiveSpec) -> None:
        super().__init__(planned, AdaptivePace())
        self.spec = spec

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

    def observe(self, step: int, loss: float) -> list[dict[str, Any]]:
        """Take note of a step's training loss (nats per token) and decide about the next step's events."""
        pace, spec = self.pace, self.spec
        if math.isfinite(loss):  # else the step changed nothing, and infinity would stay in the mean for good
            smoothing = 0.0 if pace.smoothed is None else spec.smoothing
            pace.smoothed = smoothing * (pace.smoothed or 0.0) + (1 - smoothing) * loss
        waiting = self.waiting
        if not waiting or waiting[0].step > step + 1 or pace.reference is None or pace.smoothed is None:
            return []
        recovered = pace.smoothed <= pace.reference + spec.tolerance
        long_enough = step + 1 - pace.begun[-1] >= spec.largest_gap
        too_late = self.complete_at + 1 > self._deadline
        if not (recovered or long_enough or too_late):
            self._put_off(1)
        return []

    def _begins(self, event: Event) -> None:
        if not self.pace.begun or event.step > self.pace.begun[-1]:
            self.pace.reference = self.pace.smoothed
