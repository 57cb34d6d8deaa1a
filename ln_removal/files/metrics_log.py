"""Read and correct metrics.jsonl, the log of a run: one JSON object a line, each with its `kind` and its `step`.

A run that is resumed, or that goes back to a checkpoint, drops the rows of the steps that it trains again. When it goes back
because its loss was not finite, the observations of those steps show in which layer it broke. They are therefore kept in
diverged.jsonl, beside metrics.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

WANDB_FILE = "wandb-id.txt"
"""Beside metrics.jsonl: the id of the training's run on Weights & Biases, which a resumed training continues."""

ROLLBACK, RECIPE_CHANGE = "rollback", "recipe"
"""Kinds of rows in metrics.jsonl; their `step` is the number of steps that the run then has behind it."""

TAKEN_BACK_FILE = "diverged.jsonl"
OBSERVATION = "observation"
"""Kind of the rows of metrics.jsonl that a probe wrote (training/probe.py)."""

WINDOWS = "windows"
"""Kind of the row of metrics.jsonl that compares the original's loss on documents and in a stream, before the first step."""

AFTER_STEPS = ("evaluation", ROLLBACK, RECIPE_CHANGE, WINDOWS)
"""Kinds of rows that are about the run after so many steps."""


def metrics_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics log in order; none where there is no file.

    A line that is not a JSON object with a kind and a whole number of steps is passed over: a crash may have cut it short.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int):
            yield row


def last_row(metrics: Path) -> dict[str, Any]:
    """The last row, or an empty one."""
    rows = list(metrics_rows(metrics))
    return rows[-1] if rows else {}


def note_change(metrics: Path, changed: str) -> None:
    """Append a row that says, in words, how the recipe changed; only after a rollback."""
    last = last_row(metrics)
    if last.get("kind") in (ROLLBACK, RECIPE_CHANGE):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": RECIPE_CHANGE, "step": last["step"], "changed": changed}) + "\n")


def set_aside(metrics: Path, step: int) -> None:
    """Keep the observations of `step` and later in diverged.jsonl, in place of those kept before; `metrics` stays as it is."""
    rows = [row for row in observation_rows(metrics) if row["step"] >= step]
    if rows:
        _write_rows(metrics.with_name(TAKEN_BACK_FILE), rows)


def rows_of_run(run: Path) -> list[dict[str, Any]]:
    """A run's observations by step: those in its metrics log, then those of later steps that it took back.

    A run that trained those steps again after its rollback has new observations of them.
    """
    kept = {row["step"]: row for row in observation_rows(run / METRICS_FILE)}  # of a step trained twice, the last
    end = max(kept, default=-1)
    kept |= {row["step"]: row for row in observation_rows(run / TAKEN_BACK_FILE) if row["step"] > end}
    return [kept[step] for step in sorted(kept)]


def observation_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The observations in a metrics log, or in the file of those that a run took back."""
    return (row for row in metrics_rows(path) if row["kind"] == OBSERVATION)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the rows of a metrics log that a run has behind it at `step`.

    Kinds in AFTER_STEPS are logged under the number of steps before them, all others under the step that they belong to.
    """
    if path.exists():
        _write_rows(path, [row for row in metrics_rows(path) if row["step"] < step + (row["kind"] in AFTER_STEPS)])


def last_logged(path: Path) -> dict[str, float]:
    """The last finite loss in a metrics log and the speed then, under their names in a TrainResult; empty without one."""
    finite = [row for row in metrics_rows(path) if row["kind"] == "train" and row["loss"] is not None]
    return {"last_loss": finite[-1]["loss"], "tokens_per_second": finite[-1]["tokens_per_second"]} if finite else {}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
