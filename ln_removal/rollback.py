"""What a run that went back to a checkpoint leaves in metrics.jsonl, and what may change in its recipe when it goes on.

A run that is resumed as it was comes to the same steps with the same numbers. So after going back, and only then, it may go on
with less: a lower learning rate, a lower minimum of it or a tighter clip. The change is written into recipe.toml and noted.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

ROLLBACK, RECIPE_CHANGE = "rollback", "recipe"
"""Kinds of rows in metrics.jsonl; their `step` is the number of steps that the run then has behind it."""

MAY_BE_LOWERED = ("learning_rate", "minimum_learning_rate", "clip")
"""Of [training]."""


def may_go_on_with(metrics: Path, before: bytes, now: str) -> bool:
    """Whether the run has just gone back, and its new recipe only lowers what may be lowered.

    Args:
        metrics: the run's metrics.jsonl.
        before: recipe.toml as it is. now: the new one.
    """
    from ln_removal.recipe import with_defaults

    if _last_row(metrics).get("kind") not in (ROLLBACK, RECIPE_CHANGE):
        return False
    try:
        old, new = with_defaults(tomllib.loads(before.decode())), with_defaults(tomllib.loads(now))
    except ValueError:  # recipe.toml is damaged
        return False
    was, wanted = old.get("training", {}), new.get("training", {})
    lowered = all(wanted.get(name, 0) <= was.get(name, 0) for name in MAY_BE_LOWERED)
    for name in MAY_BE_LOWERED:
        was.pop(name, None)
        wanted.pop(name, None)
    return bool(lowered and old == new)


def note_change(metrics: Path, changed: str) -> None:
    """Append a row that says, in words, how the recipe changed; only after a rollback."""
    last = _last_row(metrics)
    if last.get("kind") in (ROLLBACK, RECIPE_CHANGE):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": RECIPE_CHANGE, "step": last["step"], "changed": changed}) + "\n")


def _last_row(metrics: Path) -> dict[str, Any]:
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
