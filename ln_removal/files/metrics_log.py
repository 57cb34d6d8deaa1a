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

ROLLBACK, RECIPE_CHANGE = "rollback", "recipe"
"""Kinds of rows in metrics.jsonl; their `step` is the number of steps that the run then has behind it."""

TAKEN_BACK_FILE = "diverged.jsonl"
OBSERVATION = "observation"
"""Kind of the rows of metrics.jsonl that `Observer.observe` made."""

AFTER_STEPS = ("evaluation", ROLLBACK, RECIPE_CHANGE)
"""Kinds of rows that are about the run after so many steps."""


def note_change(metrics: Path, changed: str) -> None:
    """Append a row that says, in words, how the recipe changed; only after a rollback."""
    last = last_row(metrics)
    if last.get("kind") in (ROLLBACK, RECIPE_CHANGE):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": RECIPE_CHANGE, "step": last["step"], "changed": changed}) + "\n")


def last_row(metrics: Path) -> dict[str, Any]:
    """The last whole row, or an empty one."""
    if not metrics.is_file():
        return {}
    for line in reversed(metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}


def set_aside(metrics: Path, step: int) -> None:
    """Keep the observations of `step` and later in diverged.jsonl, in place of those kept before; `metrics` stays as it is."""
    rows = [row for row in observation_rows(metrics) if row["step"] >= step]
    if rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        metrics.with_name(TAKEN_BACK_FILE).write_text(lines, encoding="utf-8")


def rows_of_run(run: Path) -> list[dict[str, Any]]:
    """A run's observations by step: those of its metrics, and behind the last of them those that it took back.

    A run that went on after its rollback and came past those steps has new ones for them.
    """
    kept = {row["step"]: row for row in observation_rows(run / METRICS_FILE)}  # of a step trained twice, the last
    end = max(kept, default=-1)
    kept |= {row["step"]: row for row in observation_rows(run / TAKEN_BACK_FILE) if row["step"] > end}
    return [kept[step] for step in sorted(kept)]


def observation_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The observations in a file of metrics, if it is there; a line cut short by a crash is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["kind"] == OBSERVATION and isinstance(row["step"], int):
                yield row
        except (ValueError, KeyError, TypeError):
            continue


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl that a run has behind it at `step`, dropping one cut short by a crash.

    What AFTER_STEPS names is logged under the number of steps before it, everything else under the step that it belongs to.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step + (row["kind"] in AFTER_STEPS):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def last_logged(path: Path) -> dict[str, float]:
    """The last finite loss in metrics.jsonl and the speed then, under their names in a TrainResult."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    finite = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
    return {"last_loss": finite[-1]["loss"], "tokens_per_second": finite[-1]["tokens_per_second"]} if finite else {}
