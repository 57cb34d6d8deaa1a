"""A schedule whose remaining events can be put off together while it runs: their order and the gaps between them stay.

What has begun stays where it began. Pure Python; ranks that are told the same losses decide the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ln_removal.schedule import Change, Event, RemovalSchedule


@dataclass
class Pace:
    """Where such a schedule stands; kept in checkpoints.

    Attributes:
        delay: steps by which what has not begun comes later than planned.
        begun: the steps at which the first events began, in the schedule's order.
    """

    delay: int = 0
    begun: list[int] = field(default_factory=list)


class DelayedSchedule:
    """Answers as a `RemovalSchedule` does, for the events as they are and will be if nothing else is put off.

    Args:
        planned: with the smallest gaps; valid.
        pace: where it begins.

    Attributes:
        needs_every_loss: `observe` is to be called in every step, and not only when losses are read.
    """

    needs_every_loss = False

    def __init__(self, planned: RemovalSchedule, pace: Pace | None = None) -> None:
        self.planned = planned
        self.pace = pace or Pace()
        self._current = planned

    @property
    def current(self) -> RemovalSchedule:
        """The events that have begun, when they did, and the others as now expected."""
        return self._current

    @property
    def waiting(self) -> tuple[Event, ...]:
        """The events that have not begun, in order."""
        return self._current.events[len(self.pace.begun) :]

    @property
    def steps(self) -> int:
        return self.planned.steps

    @property
    def complete_at(self) -> int:
        return self._current.complete_at

    def changes(self, step: int) -> list[Change]:
        """As `RemovalSchedule.changes`; notes what begins. To be asked once for each step, in order."""
        for event in self.waiting:
            if event.step > step:
                break
            self._begins(event)
            self.pace.begun.append(event.step)
        return self._current.changes(step)

    def stage(self, step: int) -> str:
        return self._current.stage(step)

    def begins_of_kinds(self) -> list[int]:
        return self._current.begins_of_kinds()

    def observe(self, step: int, loss: float) -> list[dict[str, Any]]:
        """Take note of a step's training loss (nats per token); returns what is worth a row in metrics.jsonl."""
        return []

    def decide(self, step: int, until: int) -> list[dict[str, Any]]:
        """Decide, `step` steps being done and their losses known, about what begins before step `until`.

        Returns:
            As `observe`.
        """
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self.pace)

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from what `state` returned after `step` steps; None: from where the plan is then."""
        if state is None:
            state = {"begun": [event.step for event in self.planned.events if event.step < step]}
        self.pace = type(self.pace)(**state)
        self._current = self._expected()

    def _begins(self, event: Event) -> None:
        """Called for each event that begins, before it is noted."""

    def _put_off(self, steps: int) -> None:
        self.pace.delay += steps
        self._current = self._expected()

    def _expected(self) -> RemovalSchedule:
        events: list[Event] = []
        for number, event in enumerate(self.planned.events):
            step = self.pace.begun[number] if number < len(self.pace.begun) else event.step + self.pace.delay
            events.append(replace(event, step=step))
        return RemovalSchedule(tuple(events), self.planned.n_layer, self.planned.steps)
