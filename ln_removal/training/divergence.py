"""Notice a training that goes wrong: losses that spike, and steps whose loss or gradient is not finite.

The update of a step that is not finite is skipped on the device (see optimizers.step_unless_bad); after three in a row the
run goes back to a checkpoint and stops. A checkpoint whose own next step was bad may hold the weights that made it so: going
back passes it over and sets it aside, for the user to look at.

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
"""Whose loss and gradient norm a rollback notes: the rows themselves are forgotten with their steps."""

Cause = Literal["loss", "gradient", "weights"]

WINDOW = 16
"""Sound losses that are looked back on."""

LEAST_WINDOW = 8
"""Before there are so many nothing is called high."""

SIGMAS = 7.0
LEAST_RISE = 0.5
"""Nats per token: a bump that an ordinary freeze makes."""

TO_BEGIN, TO_END = 2, 3
"""High losses in a row that begin a spike, and losses in a row within half the rise that end it."""


class BadSteps:
    """Keeps count of bad steps.

    Attributes:
        total: bad steps of this session.
        streak: the latest ones in a row; once they are BAD_STEPS_ALLOWED it stays.
        causes: what was not finite, each once.
    """

    def __init__(self) -> None:
        self.total = 0
        self.streak: list[int] = []
        self.causes: list[Cause] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=STEPS_REMEMBERED)

    @property
    def diverged(self) -> bool:
        return len(self.streak) >= BAD_STEPS_ALLOWED or self.causes == ["weights"]

    def note(self, step: int, loss: float, norm: float, tracker: Tracker) -> None:
        """Look at a step's loss (nats per token) and gradient norm; each step once, in order. A bad one is logged."""
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
        """The update of `step` left weights that are not finite, or with which nothing is."""
        self.streak, self.causes = self.streak or [step], ["weights"]

    def recent(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of the last steps, up to the one at which it was too much."""
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
    """Take model, optimizers and metrics back to the newest checkpoint from which a sound step was made.

    Later ones are set aside. Where there is none the run is at its beginning again, and `model` is left as it is.

    Args:
        bad: with its streak.
        spec: the recipe's [training].
        state_directory: with the checkpoints.
        model: what they hold. optimizers: likewise.
        accelerator: every rank calls this; the main one moves files.
        tracker: forgets the steps after that checkpoint and notes the rollback.
        stage: of the schedule at the first bad step, for the message.
        seen: what an observer says of the model that broke; its observations are set aside, see files/metrics_log.py.

    Returns:
        What to raise: it says what happened and what to type next.
    """
    aside = [path for step, path in checkpoints(state_directory) if step >= bad.streak[0]]
    accelerator.wait_for_everyone()  # all of them have looked
    if accelerator.is_main_process:
        for path in aside:
            doomed = path.with_name(path.name.replace("step-", "suspect-"))
            shutil.rmtree(doomed, ignore_errors=True)  # of an earlier rollback
            path.rename(doomed)
    accelerator.wait_for_everyone()
    found, faults = load_newest(state_directory, model, optimizers)
    for fault in faults:
        tracker.say(f"warning: {fault}")
    step = 0 if found is None else found.step
    losses, norms = bad.recent()
    tracker.take_back(step)
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
        what = f"the update of step {first} left weights with which nothing is finite"
    else:
        what = f"the {' or the '.join(bad.causes)} was not finite for {count} steps in a row from step {first} on"
    made = "" if bad.causes == ["weights"] else "these updates were not made, and "
    back = f"step {step}, its last sound checkpoint" if step else "its beginning, for want of a sound checkpoint"
    moved = f" ({', '.join(path.name for path in aside)} set aside in {directory} as suspect-...)" if aside else ""
    lower = f"training.learning_rate={spec.learning_rate / 2:g}"
    if spec.minimum_learning_rate > spec.learning_rate / 2:
        lower += f" --set training.minimum_learning_rate={spec.learning_rate / 2:g}"
    freezing = "wider gaps of the schedule or a higher training.auxiliary_weight"
    gentler = "a longer training.warmup_steps" if stage == "training" else freezing
    if (directory.parent / RECIPE_FILE).exists():  # the control has its recipe from the removal, which is done
        advice = (
            f"go on with the same command, --resume and --set {lower}, or start again with another --out and {gentler}"
        )
    else:
        advice = f"start again with another --out and --set {lower}, {gentler}"
    return f"{what} (stage {stage}){_where(seen, directory.parent)}; {made}the run is back at {back}{moved}. To mend it, {advice}"


def _where(seen: Figures | None, run: Path) -> str:
    """The first layer whose attention is NaN, if the model was observed and one is."""
    broken = [] if seen is None else [layer for layer, count in enumerate(seen["nan_counts"]) if count]
    if not broken:
        return ""
    layers = f"layer {broken[0]}" if len(broken) == 1 else f"layers {broken[0]} to {broken[-1]}"
    return f", with NaN in the attention of {layers} (ln-analyze nans {run} shows how many)"


class StepMetrics:
    """Losses and gradient norms of the steps since the last log, on the device, and their learning rates."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: list[Tensor] = []
        self._rates: list[float] = []

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> Tensor:
        """Keep a step's figures, averaged over ranks; returns 1.0 where either is not finite, else 0.0 (a scalar tensor).

        A loss can be infinite on one rank and all gradients finite, so the ranks have to agree before they step.
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
