"""What a run's directory holds for its report: results, metrics, recipe, frozen constants. What is missing is None or empty."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.architectures import SITE_KINDS
from ln_removal.errors import UserError
from ln_removal.run_directory import METRICS_FILE, RECIPE_FILE

if TYPE_CHECKING:
    from ln_removal.evaluation.results import Results
    from ln_removal.recipe import Recipe

SPECIALS = ("eot", "first")


@dataclass(frozen=True)
class Curve:
    """One training, step by step.

    Attributes:
        steps, losses: of the optimizer steps; NaN where the loss was not finite.
        evaluations: (steps done, cross-entropy on held-out tokens).
        freezes: for each kind of site, and for the special constants, the steps (first, last) of each change.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    freezes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class FrozenConstant:
    """A site's constant in place of the standard deviation, and what the special positions had before their drop."""

    site: str
    ordinary: float
    end_of_text: float
    first: float


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows."""

    directory: Path
    results: Results
    recipe: Recipe | None
    removal: Curve
    control: Curve
    constants: list[FrozenConstant]
    training: dict[str, Any]


def read_run(directory: Path | str) -> RunRecord:
    """Read a run. It needs results.json; anything else may be missing.

    Raises:
        UserError: there is no such directory, or its results cannot be read.
    """
    from ln_removal.evaluation import results as results_file
    from ln_removal.recipe import load_recipe

    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}; give the directory of a run, such as checkpoints/demo")
    if not (directory / "results.json").is_file():
        unfinished = (directory / RECIPE_FILE).is_file()
        advice = (
            f"finish the run with --resume, or run ln-evaluate {directory} --out {directory / 'results.json'}"
            if unfinished
            else "give the directory that ln-remove --out named"
        )
        raise UserError(f"{directory} has no results.json; {advice}")
    recipe = directory / RECIPE_FILE
    return RunRecord(
        directory=directory,
        results=results_file.read(directory / "results.json"),
        recipe=load_recipe(str(recipe)) if recipe.is_file() else None,
        removal=read_curve(directory / METRICS_FILE),
        control=read_curve(directory / "control" / METRICS_FILE),
        constants=read_constants(directory / "state"),
        training=_read_json(directory / "training.json"),
    )


def read_curve(path: Path) -> Curve:
    """Loss, evaluations and freezes of a metrics.jsonl; a line cut short by a crash is passed over."""
    curve = Curve()
    if not path.is_file():
        return curve
    changes: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            kind, step = row["kind"], row["step"]
            if kind == "train":
                number, loss = int(step), _number(row["loss"])  # both or neither
                curve.steps.append(number)
                curve.losses.append(loss)
            elif kind == "evaluation":
                curve.evaluations.append((float(step), _number(row["cross_entropy"])))
            elif kind == "event":
                changes.setdefault(str(row["site"]), []).append(float(step))
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    for site, steps in changes.items():
        kind = "special" if site in SPECIALS else site.partition(".")[0]
        curve.freezes.setdefault(kind, []).append((min(steps), max(steps)))
    order = {kind: place for place, kind in enumerate((*SITE_KINDS, "special"))}
    ordered = dict(sorted(curve.freezes.items(), key=lambda item: order.get(item[0], len(order))))
    return Curve(curve.steps, curve.losses, curve.evaluations, ordered)


def read_constants(state: Path) -> list[FrozenConstant]:
    """The frozen standard deviations in the newest checkpoint that can be read, site by site; empty without one."""
    from safetensors import SafetensorError, safe_open

    from ln_removal.training.state import checkpoints

    for _, path in reversed(checkpoints(state)):
        try:
            with safe_open(path / "model.safetensors", framework="numpy") as opened:
                names = [name for name in opened.keys() if name.endswith(".captured_std")]  # noqa: SIM118
                frozen = {name: opened.get_tensor(name.replace("captured_std", "frozen_std")) for name in names}
                return sorted(_constants({name: (opened.get_tensor(name), frozen[name]) for name in names}), key=_place)
        except (OSError, SafetensorError, ValueError, IndexError):
            continue
    return []


def _constants(tensors: dict[str, tuple[Any, Any]]) -> Iterable[FrozenConstant]:
    """Site by site from (captured, frozen), each (R, K): see `norm.FreezableNorm`."""
    for name, (captured, frozen) in tensors.items():
        parts = name.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        kinds = ("ln_1_qk", "ln_1_v") if len(captured) == 2 else ("ln_f",) if layer is None else ("ln_2",)
        for reader, kind in enumerate(kinds):
            site = kind if layer is None else f"{kind}.{layer}"
            _, end_of_text, first = (float(value) for value in captured[reader])
            yield FrozenConstant(site, float(frozen[reader][0]), end_of_text, first)


def _place(constant: FrozenConstant) -> tuple[int, int]:
    kind, _, layer = constant.site.partition(".")
    return SITE_KINDS.index(kind), int(layer or 0)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
