"""Observations of steps that a run took back: what it saw while it diverged outlives the rollback, in a file beside its metrics.

A run whose loss is not finite goes back to its last sound checkpoint, and its metrics forget the steps after that. The look
into the layers at those steps is what tells where it broke, so it is set aside first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ln_removal.run_directory import METRICS_FILE

TAKEN_BACK_FILE = "diverged.jsonl"
OBSERVATION = "observation"
"""Kind of the rows of metrics.jsonl that `Observer.observe` made."""


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
