"""Loss spikes while sites freeze, and a fixed schedule that waits for their end.

Freezing the values' sites is where published removals explode (arXiv 2409.13710, 2507.02559): each freeze comes before the
loss has settled after the last. A step's loss l is high when

    l > m + max(LEAST_RISE, SIGMAS * s),    m = median of the last sound losses x_i,
                                            s = 1.4826 / sqrt(2) * median |x_i - x_(i-1)|

OLMo 2 (arXiv 2501.00656) calls seven standard deviations from a moving average a spike, and llm.c watches the same z-score over
128 steps. Medians (Hampel 1974) are not moved by what they are to find, and differences of neighbours (von Neumann 1941) not
by a falling loss. A removal has few steps, so the window is shorter; its ordinary bumps must not count, so there is a least rise.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from ln_removal.schedule import Change, Event, RemovalSchedule

WINDOW = 16
"""Sound losses that are looked back on."""

LEAST_WINDOW = 8
"""Before there are so many nothing is called high."""

SIGMAS = 7.0
LEAST_RISE = 0.5
"""Nats per token: a bump that an ordinary freeze makes."""

TO_BEGIN, TO_END = 2, 3
"""High losses in a row that begin a spike, and losses in a row within half the rise that end it."""


@dataclass
class LossSpikes:
    """Told the loss of every step, says when a spike begins and ends. What it holds is kept in checkpoints.

    Attributes:
        window: the last sound losses, nats per token; it stays as it is during a spike.
        streak: high losses in a row, or during a spike low ones.
        spiking: whether there is a spike now.
    """

    window: list[float] = field(default_factory=list)
    streak: int = 0
    spiking: bool = False

    def observe(self, loss: float) -> str | None:
        """Returns "spike" or "recovered" for the loss with which one begins or ends. NaN and infinity are high."""
        if len(self.window) < LEAST_WINDOW:
            self._keep(loss)
            return None
        middle, rise = self.level()
        if self.spiking:
            self.streak = self.streak + 1 if loss <= middle + rise / 2 else 0
            if self.streak < TO_END:
                return None
            self.spiking, self.streak = False, 0
            return "recovered"
        if loss <= middle + rise:
            self.streak = 0
            self._keep(loss)
            return None
        self.streak += 1
        if self.streak < TO_BEGIN:
            return None
        self.spiking, self.streak = True, 0
        return "spike"

    def level(self) -> tuple[float, float]:
        """The median of the window, and how far above it a loss is high."""
        middle = statistics.median(self.window)
        sigma = 1.4826 / math.sqrt(2) * statistics.median(abs(x - before) for before, x in pairwise(self.window))
        return middle, max(LEAST_RISE, SIGMAS * sigma)

    def _keep(self, loss: float) -> None:
        if math.isfinite(loss):
            self.window = [*self.window[1 - WINDOW :], loss]


@dataclass
class SpikePace:
    """Where a schedule that waits stands; kept in checkpoints.

    Attributes:
        delay: steps by which what has not begun comes later than planned.
        begun: the steps at which the first events began, in the schedule's order.
        spikes: what was seen of the losses.
    """

    delay: int = 0
    begun: list[int] = field(default_factory=list)
    spikes: LossSpikes = field(default_factory=LossSpikes)

    def __post_init__(self) -> None:
        if isinstance(self.spikes, dict):  # from a checkpoint
            self.spikes = LossSpikes(**self.spikes)


class SpikeSchedule:
    """A fixed schedule: as planned while the loss is calm, and nothing new begins during a spike.

    It answers as a `RemovalSchedule` does, for the events as they are and will be if nothing else is put off. What has begun
    stays where it began; the rest is put off together, so its order and the gaps in it stay. Losses are read some steps late
    (loop.LOG_EVERY), and so is what is decided: a step waits for no device, and ranks that are told the same losses decide
    the same. Waiting takes at most half of the steps that are planned for recovery.

    Args:
        planned: with the smallest gaps; valid.
    """

    def __init__(self, planned: RemovalSchedule) -> None:
        self.planned = planned
        self.pace = SpikePace()
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
    def complete_at(self) -> int:
        """As `RemovalSchedule.complete_at`, as now expected."""
        return self._current.complete_at

    @property
    def latest_complete_at(self) -> int:
        """The last step at which everything can be frozen, however long the spikes last."""
        return self.planned.complete_at + (self.planned.steps - 1 - self.planned.complete_at) // 2

    def changes(self, step: int) -> list[Change]:
        """As `RemovalSchedule.changes`; notes what begins. To be asked once for each step, in order."""
        for event in self.waiting:
            if event.step > step:
                break
            self.pace.begun.append(event.step)
        return self._current.changes(step)

    def stage(self, step: int) -> str:
        """As `RemovalSchedule.stage`."""
        return self._current.stage(step)

    def observe(self, loss: float) -> list[dict[str, Any]]:
        """Take note of a step's training loss (nats per token).

        Returns:
            What is worth a row in metrics.jsonl: a spike that begins or ends.
        """
        seen = self.pace.spikes.observe(loss)
        if seen is None:
            return []
        return [{"incident": seen, "loss": loss, "usual_loss": self.pace.spikes.level()[0]}]

    def decide(self, until: int) -> list[dict[str, Any]]:
        """During a spike, put off what would begin before step `until` to that step, as far as there is time.

        Returns:
            As `observe`.
        """
        waiting = self.waiting
        if not self.pace.spikes.spiking or not waiting:
            return []
        steps = min(until - waiting[0].step, self.latest_complete_at - self.complete_at)
        if steps <= 0:
            return []
        self.pace.delay += steps
        self._current = self._expected()
        return [{"incident": "waiting", "site": waiting[0].site, "delay": self.pace.delay}]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self.pace)

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from what `state` returned after `step` steps; None: from where the plan is then."""
        if state is None:
            state = {"begun": [event.step for event in self.planned.events if event.step < step]}
        self.pace = SpikePace(**state)
        self._current = self._expected()

    def _expected(self) -> RemovalSchedule:
        events: list[Event] = []
        for number, event in enumerate(self.planned.events):
            step = self.pace.begun[number] if number < len(self.pace.begun) else event.step + self.pace.delay
            events.append(replace(event, step=step))
        return RemovalSchedule(tuple(events), self.planned.n_layer, self.planned.steps)
