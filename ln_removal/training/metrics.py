"""Metrics and progress of a run: rows in metrics.jsonl, a progress bar, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from ln_removal.config.estimate import readable_duration
from ln_removal.errors import UserError
from ln_removal.files.metrics_log import WANDB_FILE, set_aside, truncate_metrics

Figure = float | int | str | None | list["Figure"]
Metrics = Mapping[str, Figure]

Progress = bool | Literal["lines"]
"""True shows a bar, False nothing, "lines" a line now and then: where standard error is a file, a bar would fill it."""

SECONDS_BETWEEN_LINES = 30.0

BAR = "{{desc}} {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{remaining}{{postfix}}]"
"""tqdm's own {remaining} counts the first step, which may compile."""


class Tracker:
    """Writes metrics and shows progress while its context is open. Of several ranks only the main one has an enabled one.

    Args:
        path: metrics.jsonl, one JSON object a line, each with `kind` ("train", "evaluation", "observation", "event",
            "incident", "rollback", "recipe", "windows") and `step`.
        total_steps: the length of the run.
        label: shown before the bar, such as "removal" or "control".
        enabled: False writes and shows nothing.
        progress: how steps are shown.
        wandb_project: also log to this Weights & Biases project.
        config: the resolved recipe, for wandb.

    Raises:
        UserError: on entering: wandb is asked for and not installed, or cannot start.
    """

    def __init__(
        self,
        path: Path,
        *,
        total_steps: int,
        label: str,
        enabled: bool = True,
        progress: Progress = True,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._total_steps = total_steps
        self._label = label
        self._enabled = enabled
        self._progress = progress
        self._last_line = float("-inf")
        self._wandb_project, self._config = wandb_project, config
        self._wandb: Any = None

    def __enter__(self) -> Tracker:
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._wandb_project:
                self._wandb = _start_wandb(self._wandb_project, self._path.parent, self._label, self._config)
            self._file = self._path.open("a", encoding="utf-8")
            self._bar = tqdm(
                total=self._total_steps,
                desc=self._label,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                disable=self._progress is not True,
                bar_format=BAR.format(remaining="?"),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bar.close()
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def forget_after(self, step: int) -> None:
        """Delete the metrics of steps that a resumed run will train again, and start the bar at `step`."""
        if not self._enabled:
            return
        self._file.close()
        truncate_metrics(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        # Restart the bar's clock too, or its rate would count the steps of earlier sessions.
        self._bar.initial = step
        self._bar.reset()
        self._bar.n = self._bar.last_print_n = step
        self._bar.refresh()

    def roll_back(self, step: int) -> None:
        """As `forget_after`, for a run that diverged: its observations of those steps are kept in another file."""
        if self._enabled:
            set_aside(self._path, step)
        self.forget_after(step)

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Append one row to metrics.jsonl, and log it to wandb. A number that is not finite is written as null."""
        if not self._enabled:
            return
        # JSON has no NaN and no infinity.
        row = {name: _without_nan(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            numbers = dict(pair for name, value in metrics.items() for pair in _numbers(f"{kind}/{name}", value))
            # Not wandb's own step, which may not fall: events are logged before the metrics of earlier steps.
            self._wandb.log({**numbers, "step": step})

    def show(self, step: int, *, stage: str, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Move the bar to `step` finished steps; `loss` in nats per token, `seconds_left` until the run has ended."""
        if not self._enabled:
            return
        figures = f"{stage}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        if self._progress == "lines":
            self._line(step, figures, seconds_left)
            return
        self._bar.bar_format = BAR.format(remaining=tqdm.format_interval(seconds_left))
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(step - self._bar.n)

    def _line(self, step: int, figures: str, seconds_left: float) -> None:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and step < self._total_steps:
            return
        self._last_line = now
        remaining = f", {readable_duration(seconds_left)} left" if step < self._total_steps else ""
        print(f"{self._label} {step}/{self._total_steps}: {figures}{remaining}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._enabled:
            self._bar.write(line, file=sys.stderr)


def _without_nan(value: Figure) -> Figure:
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(name: str, value: Figure) -> Iterator[tuple[str, float]]:
    """The numbers in a figure, each under a name of its own: "observation/entropy/3/0" for layer 3, head 0."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _numbers(f"{name}/{index}", entry)
    elif isinstance(value, (int, float)):
        yield name, value


def _start_wandb(project: str, directory: Path, label: str, config: dict[str, Any] | None) -> Any:
    """Begin the training's run on Weights & Biases, or continue the one whose id is in the directory of the training."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb needs the package wandb, which is not installed; pip install wandb, or leave --wandb out"
        ) from None
    file = directory / WANDB_FILE
    known = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    # Several trainings of one command, such as a removal and its control, must not share the id of the environment.
    given = os.environ.get("WANDB_RUN_ID")
    wanted = known or (f"{given}-{directory.name}-{label}" if given else secrets.token_hex(4))
    try:
        # A run that goes on after its learning rate was lowered has another configuration.
        run = wandb.init(
            project=project,
            name=f"{directory.name}-{label}",
            config=config,
            id=re.sub(r"[^\w.-]", "-", wanted, flags=re.ASCII),
            resume="allow",
            allow_val_change=True,
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # wandb raises many kinds: no login, no network, a bad project name
        again = f", or delete {file} to begin another run there" if known else ""
        raise UserError(f"wandb could not start: {error}; run `wandb login`, or leave --wandb out{again}") from error
    file.write_text(f"{run.id}\n", encoding="utf-8")
    return run
