"""Steps whose loss or gradient is not finite: their updates are skipped, and after three in a row the run goes back and stops.

The update is skipped on the device (see optimizers.step_unless_bad); what is here looks at the figures when a log step has
read them. A checkpoint whose own next step was bad may hold the weights that made it so: going back passes it over and sets
it aside, for the user to look at.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ln_removal.errors import DivergedError
from ln_removal.rollback import ROLLBACK
from ln_removal.run_directory import RECIPE_FILE
from ln_removal.training.state import checkpoints, load_newest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ln_removal.analysis.observer import Figures
    from ln_removal.recipe import TrainingSpec
    from ln_removal.training.tracking import Tracker

BAD_STEPS_ALLOWED = 3
"""Consecutive steps with a non-finite loss or gradient after which the run goes back to a checkpoint and stops."""

STEPS_REMEMBERED = 20
"""Whose loss and gradient norm a rollback notes: the rows themselves are forgotten with their steps."""

Cause = Literal["loss", "gradient", "weights"]


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
    stage_at: Callable[[int], str],
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
        stage_at: the stage of the schedule in a step, for the message.
        seen: what an observer says of the model that broke; its observations are set aside, see analysis/taken_back.py.

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
    stage = stage_at(bad.streak[0])
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
