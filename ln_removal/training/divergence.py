"""Divergence: steps whose loss or gradient is not finite, going back to a checkpoint, and losses that spike.

**Steps that are not finite.** The update of a step whose loss or gradient is infinite or NaN is skipped on the device (see
`optimizers.to_step`). After three such steps in a row the run goes back to a checkpoint and stops. If the very first step
after a checkpoint was already bad, the checkpoint's weights may be the cause: it is set aside under another name, and the run
goes back to the one before it.

**Spikes.** Published removals explode when the norms read by the values are frozen (arXiv 2409.13710, 2507.02559), because
each freeze comes before the loss has settled after the last one. A step's loss l is high when

    l > m + max(LEAST_RISE, SIGMAS * s),    m = median of the last normal losses x_i,
                                            s = 1.4826 / sqrt(2) * median |x_i - x_(i-1)|

OLMo 2 (arXiv 2501.00656) calls a loss a spike when it is seven standard deviations above a moving average; llm.c watches the
same z-score over 128 steps. Here m and s are medians because a spike does not move a median (Hampel 1974), and s is computed
from differences of neighbours because a steadily falling loss does not change those (von Neumann 1941). A removal has few
steps, so the window is shorter than llm.c's. An ordinary freeze raises the loss a little, so there is a least rise.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ln_removal.errors import DivergedError
from ln_removal.files.metrics_log import ROLLBACK
from ln_removal.files.run_directory import RECIPE_FILE
from ln_removal.norms.schedule import Change, Event, RemovalSchedule
from ln_removal.training.checkpoint import checkpoints, load_newest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ln_removal.config.recipe import TrainingSpec
    from ln_removal.training.metrics import Tracker
    from ln_removal.training.probe import Figures

BAD_STEPS_ALLOWED = 3
"""Consecutive steps with a non-finite loss or gradient after which the run goes back to a checkpoint and stops."""

STEPS_REMEMBERED = 20
"""Steps whose losses and gradient norms a rollback writes down: their own rows in metrics.jsonl are deleted."""

Cause = Literal["loss", "gradient", "weights"]

WINDOW = 16
"""Normal losses from which median and spread are computed."""

LEAST_WINDOW = 8
"""No loss is called high before this many have been seen."""

SIGMAS = 7.0
LEAST_RISE = 0.5
"""Nats per token. An ordinary freeze raises the loss by about as much."""

TO_BEGIN, TO_END = 2, 3
"""A spike begins with two high losses in a row, and ends with three losses in a row that rise at most half as far."""


class BadSteps:
    """Counts the steps whose loss or gradient was not finite.

    Attributes:
        total: the number of them in this session.
        streak: the numbers of the latest ones in a row. It no longer changes once there are BAD_STEPS_ALLOWED.
        causes: what was not finite in the streak, each cause once.
    """

    def __init__(self) -> None:
        self.total = 0
        self.streak: list[int] = []
        self.causes: list[Cause] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=STEPS_REMEMBERED)

    @property
    def diverged(self) -> bool:
        """Whether the run has to go back to a checkpoint."""
        return len(self.streak) >= BAD_STEPS_ALLOWED or self.causes == ["weights"]

    def note(self, step: int, loss: float, norm: float, tracker: Tracker) -> None:
        """Take in a step's loss (nats per token) and gradient norm, and log the step if it is bad. Call it once a step, in order."""
        cause: Cause | None = None if math.isfinite(loss + norm) else "gradient" if math.isfinite(loss) else "loss"
        if cause is not None:
            self.total += 1
            tracker.log("incident", step, {"incident": "skipped", "cause": cause})
        if self.diverged:
            return
        self._recent.append((loss, norm))
        if cause is None:
            self.streak, self.causes = [], []
            return
        self.streak.append(step)
        if cause not in self.causes:
            self.causes.append(cause)

    def blame_weights(self, step: int) -> None:
        """Note that the weights after `step` are not finite, or that nothing computed with them is."""
        self.streak, self.causes = self.streak or [step], ["weights"]

    def recent(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of the last steps, up to the one that completed the streak."""
        return [loss for loss, _ in self._recent], [norm for _, norm in self._recent]


@torch.no_grad()
def are_finite(module: nn.Module) -> bool:
    """Whether no parameter is infinite or NaN. Waits for the device."""
    largest = torch._foreach_norm([parameter.detach() for parameter in module.parameters()], torch.inf)
    return bool(torch.isfinite(torch.stack([norm.float() for norm in largest])).all())


def roll_back(
    bad: BadSteps,
    spec: TrainingSpec,
    *,
    state_directory: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    accelerator: Accelerator,
    tracker: Tracker,
    stage: str,
    seen: Figures | None = None,
) -> DivergedError:
    """Take model, optimizers and metrics back to the newest checkpoint that was followed by a step with a finite loss.

    Later checkpoints are renamed to suspect-.... Without any checkpoint the run is back at its beginning, and `model` is left
    as it is. Every rank has to call this; the main one moves the files.

    Args:
        bad: with the streak that ended the run.
        spec: the recipe's [training].
        state_directory: the directory of the checkpoints.
        model: receives the weights of the checkpoint.
        optimizers: receive their state.
        tracker: deletes the metrics of the steps after the checkpoint, and logs the rollback.
        stage: the stage of the schedule at the first bad step, for the message.
        seen: what the probe measured on the broken model. The observations are kept, see files/metrics_log.py.

    Returns:
        The error to raise, which says what happened and what to type next.
    """
    aside = [path for step, path in checkpoints(state_directory) if step >= bad.streak[0]]
    accelerator.wait_for_everyone()  # every rank has listed the checkpoints
    if accelerator.is_main_process:
        for path in aside:
            suspect = path.with_name(path.name.replace("step-", "suspect-"))
            shutil.rmtree(suspect, ignore_errors=True)  # of an earlier rollback
            path.rename(suspect)
    accelerator.wait_for_everyone()
    found, faults = load_newest(state_directory, model, optimizers)
    for fault in faults:
        tracker.say(f"warning: {fault}")
    step = 0 if found is None else found.step
    losses, norms = bad.recent()
    tracker.roll_back(step)
    tracker.log(
        ROLLBACK,
        step,
        {
            "bad_steps": list(bad.streak),
            "cause": " and ".join(bad.causes),
            "stage": stage,
            "learning_rate": spec.learning_rate,
            "losses": list(losses),
            "gradient_norms": list(norms),
            "nan_counts": None if seen is None else seen["nan_counts"],
        },
    )
    return DivergedError(_message(bad, spec, state_directory, step, aside, stage, seen))


def _message(
    bad: BadSteps, spec: TrainingSpec, directory: Path, step: int, aside: list[Path], stage: str, seen: Figures | None
) -> str:
    first, count = bad.streak[0], len(bad.streak)
    if bad.causes == ["weights"]:
        what = f"the weights after the update of step {first} are not finite, or nothing computed with them is"
    else:
        what = f"the {' or the '.join(bad.causes)} was not finite for {count} steps in a row from step {first} on"
    skipped = "" if bad.causes == ["weights"] else "these updates were skipped, and "
    back = f"step {step}, its last sound checkpoint" if step else "its beginning, because it has no sound checkpoint"
    moved = f" ({', '.join(path.name for path in aside)} set aside in {directory} as suspect-...)" if aside else ""
    lower = f"training.learning_rate={spec.learning_rate / 2:g}"
    if spec.minimum_learning_rate > spec.learning_rate / 2:
        lower += f" --set training.minimum_learning_rate={spec.learning_rate / 2:g}"
    freezing = "wider gaps of the schedule or a higher training.auxiliary_weight"
    gentler = "a longer training.warmup_steps" if stage == "training" else freezing
    if (
        directory.parent / RECIPE_FILE
    ).exists():  # a control has no recipe of its own, and cannot be resumed with another
        advice = (
            f"Go on with the same command, --resume and --set {lower}, or start again with another --out and {gentler}"
        )
    else:
        advice = f"Start again with another --out and --set {lower}, {gentler}"
    where = _where(seen, directory.parent)
    return f"{what} (stage {stage}){where}; {skipped}the run is back at {back}{moved}. {advice}"


def _where(seen: Figures | None, run: Path) -> str:
    """The layers whose attention is NaN, in words; empty if the probe found none or there is no probe."""
    broken = [] if seen is None else [layer for layer, count in enumerate(seen["nan_counts"]) if count]
    if not broken:
        return ""
    layers = f"layer {broken[0]}" if len(broken) == 1 else f"layers {broken[0]} to {broken[-1]}"
    return f", with NaN in the attention of {layers} (ln-analyze nans {run} shows how many)"


class StepMetrics:
    """Losses and gradient norms of the steps since the last log, kept on the device, and their learning rates."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: list[Tensor] = []
        self._rates: list[float] = []

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> Tensor:
        """Keep a step's loss and gradient norm, averaged over ranks.

        Returns:
            A scalar tensor on the device: 1.0 if the loss or the norm is not finite on any rank, else 0.0. The loss can be
            infinite on one rank alone, so the ranks have to agree before they update the weights.
        """
        row: Tensor = self._accelerator.reduce(torch.stack([loss.float(), norm.float()]), reduction="mean")
        bad = (~torch.isfinite(row).all()).float()
        self._rows.append(row)
        self._rates.append(rate)
        return bad

    def read(self) -> list[tuple[float, float, float]]:
        """(loss, gradient norm, learning rate) of every step since the last call. Waits for the device."""
        figures = zip(torch.stack(self._rows).tolist(), self._rates, strict=True)
        rows = [(float(loss), float(norm), rate) for (loss, norm), rate in figures]
        self._rows, self._rates = [], []
        return rows


@dataclass
class SpikeDetector:
    """Finds where spikes of the loss begin and end. Its attributes are saved in checkpoints.

    Attributes:
        window: the last normal losses, nats per token. It does not change during a spike.
        streak: the number of high losses in a row; during a spike, of losses in a row that are normal again.
        spiking: whether there is a spike now.
    """

    window: list[float] = field(default_factory=list)
    streak: int = 0
    spiking: bool = False

    def observe(self, loss: float) -> str | None:
        """Take in the next step's loss; returns "spike" if a spike begins with it, "recovered" if one ends, else None.

        NaN and infinity are high.
        """
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
        """The median of the window, and how far above it a loss has to be to be high."""
        middle = statistics.median(self.window)
        sigma = 1.4826 / math.sqrt(2) * statistics.median(abs(x - before) for before, x in pairwise(self.window))
        return middle, max(LEAST_RISE, SIGMAS * sigma)

    def _keep(self, loss: float) -> None:
        if math.isfinite(loss):
            self.window = [*self.window[1 - WINDOW :], loss]


@dataclass
class ScheduleProgress:
    """How far a schedule that waits has come. Its attributes are saved in checkpoints.

    Attributes:
        delay: the number of steps by which the events that have not begun are later than planned.
        begun: the steps at which the first events began, in the schedule's order.
        spikes: the detector, with the losses that it has seen.
    """

    delay: int = 0
    begun: list[int] = field(default_factory=list)
    spikes: SpikeDetector = field(default_factory=SpikeDetector)

    def __post_init__(self) -> None:
        if isinstance(self.spikes, dict):  # from a checkpoint
            self.spikes = SpikeDetector(**self.spikes)


class WaitingSchedule:
    """A removal schedule in which no event begins while the loss spikes.

    It has the methods of a `RemovalSchedule`, which answer for the events that have begun and for the others as now expected.
    Events that have not begun are delayed together, so their order and the gaps between them stay. Losses are read, and delays
    decided, only every `loop.LOG_EVERY` steps: so no step waits for the device, and all ranks, which read the same losses,
    decide the same. The total delay is at most half of the steps that are planned for recovery.

    Args:
        planned: a valid schedule, as it is to be followed without spikes.
    """

    def __init__(self, planned: RemovalSchedule) -> None:
        self.planned = planned
        self.progress = ScheduleProgress()
        self._current = planned

    @property
    def current(self) -> RemovalSchedule:
        """The events that have begun, at the steps at which they did, and the others as now expected."""
        return self._current

    @property
    def not_begun(self) -> tuple[Event, ...]:
        """The events that have not begun, in order."""
        return self._current.events[len(self.progress.begun) :]

    @property
    def complete_at(self) -> int:
        """As `RemovalSchedule.complete_at`, as now expected."""
        return self._current.complete_at

    @property
    def latest_complete_at(self) -> int:
        """The last step at which everything can be frozen, however long the spikes last."""
        return self.planned.complete_at + (self.planned.steps - 1 - self.planned.complete_at) // 2

    def changes(self, step: int) -> list[Change]:
        """As `RemovalSchedule.changes`; also notes which events begin. Call it once a step, in order."""
        for event in self.not_begun:
            if event.step > step:
                break
            self.progress.begun.append(event.step)
        return self._current.changes(step)

    def stage(self, step: int) -> str:
        """As `RemovalSchedule.stage`."""
        return self._current.stage(step)

    def observe(self, loss: float) -> list[dict[str, Any]]:
        """Take in a step's training loss (nats per token).

        Returns:
            Rows for metrics.jsonl: one if a spike begins or ends with this loss, else none.
        """
        seen = self.progress.spikes.observe(loss)
        if seen is None:
            return []
        return [{"incident": seen, "loss": loss, "usual_loss": self.progress.spikes.level()[0]}]

    def decide(self, until: int) -> list[dict[str, Any]]:
        """During a spike, delay the events that would begin before step `until` to that step, as far as there is time.

        Returns:
            Rows for metrics.jsonl: one if there is a new delay, else none.
        """
        waiting = self.not_begun
        if not self.progress.spikes.spiking or not waiting:
            return []
        steps = min(until - waiting[0].step, self.latest_complete_at - self.complete_at)
        if steps <= 0:
            return []
        self.progress.delay += steps
        self._current = self._expected()
        return [{"incident": "waiting", "site": waiting[0].site, "delay": self.progress.delay}]

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves; `restore` takes it back."""
        return asdict(self.progress)

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on after `step` steps from what `state()` returned then.

        None stands for a checkpoint of a run without waiting: the events planned for earlier steps have begun.
        """
        if state is None:
            state = {"begun": [event.step for event in self.planned.events if event.step < step]}
        self.progress = ScheduleProgress(**state)
        self._current = self._expected()

    def _expected(self) -> RemovalSchedule:
        events: list[Event] = []
        for number, event in enumerate(self.planned.events):
            step = (
                self.progress.begun[number] if number < len(self.progress.begun) else event.step + self.progress.delay
            )
            events.append(replace(event, step=step))
        return replace(self.planned, events=tuple(events))
