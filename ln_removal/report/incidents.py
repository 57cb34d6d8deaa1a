"""What went wrong while a run trained, from its metrics.jsonl, in words: skipped steps, loss spikes, waiting, going back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 20
"""Steps that are named in one line, and lines that are shown."""


def incident_lines(metrics: Path) -> list[str]:
    """One sentence for each, in the order in which they happened; skipped steps first, by cause. Plain text, not HTML."""
    skipped: dict[str, list[int]] = {}
    lines: list[str] = []
    for row in _rows(metrics):
        try:
            if row["kind"] == "incident" and row["incident"] == "skipped":
                skipped.setdefault(str(row["cause"]), []).append(int(row["step"]))
            elif (line := _line(row)) is not None:
                lines.append(line)
        except (KeyError, TypeError, ValueError):  # not one of ours
            continue
    more = [f"and {len(lines) - SHOWN} more, see {metrics.name}"] if len(lines) > SHOWN else []
    return [_skipped(cause, steps) for cause, steps in skipped.items()] + lines[:SHOWN] + more


def _rows(metrics: Path) -> Iterator[dict[str, Any]]:
    if not metrics.is_file():
        return
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(row, dict):
            yield row


def _skipped(cause: str, steps: list[int]) -> str:
    named = ", ".join(map(str, steps[:SHOWN])) + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")
    return f"step{'s' if len(steps) > 1 else ''} {named}: the update was left out, the {cause} was not finite"


def _line(row: dict[str, Any]) -> str | None:
    kind, step = row["kind"], row.get("step")
    if kind == "rollback":
        bad = ", ".join(map(str, row["bad_steps"]))
        return (
            f"back to step {step}: in step{'s' if len(row['bad_steps']) > 1 else ''} {bad} the {row['cause']} was not finite "
            f"(stage {row['stage']}, learning rate {row['learning_rate']:g})"
        )
    if kind == "recipe":
        return f"from step {step} on with another recipe: {row['changed']}"
    if kind != "incident":
        return None
    if row["incident"] == "spike":
        high = "not finite" if row["loss"] is None else f"{row['loss']:.2f}"
        return f"step {step}: the loss spiked ({high}, usually {row['usual_loss']:.2f})"
    if row["incident"] == "recovered":
        return f"step {step}: it had recovered ({row['loss']:.2f})"
    if row["incident"] == "waiting":
        return f"step {step}: {row['site']} and what follows now begin {row['delay']} steps later than planned"
    return None
