"""What the report of a run shows: its results, metrics, recipe, frozen constants and incidents, and published results.

Parts that a run does not have are None or empty. Incidents (skipped steps, loss spikes, waiting, rollbacks) come from
metrics.jsonl. The published results are those of the two earlier removals of LayerNorm from GPT-2. Losses are in nats per
token. The gap is the LN-free model's loss minus that of a control, which was fine-tuned on the same tokens and kept its
LayerNorms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.files.metrics_log import METRICS_FILE, metrics_rows
from ln_removal.files.run_directory import RECIPE_FILE
from ln_removal.models.layout import SITE_KINDS, SPECIALS
from ln_removal.norms.schedule import CAP

if TYPE_CHECKING:
    from ln_removal.config.recipe import Recipe
    from ln_removal.evaluation.results import Results

SHOWN = 20
"""At most so many steps are named in a line of incidents, and so many lines are shown."""

HEIMERSHEIM = "Heimersheim 2024"
BARONI = "Baroni et al. 2025"

SOURCES = {
    HEIMERSHEIM: ("You can remove GPT2's LayerNorm by fine-tuning", "https://arxiv.org/abs/2409.13710"),
    BARONI: (
        "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the "
        "Implications for Mechanistic Interpretability",
        "https://arxiv.org/abs/2507.02559",
    ),
}
"""Title and address of each paper."""

LOSS_NOTE = (
    "GPT-2 XL's 130.22 on the Pile comes from 3 of 10,000 samples, with form feeds and tabs that OpenWebText does not "
    "have; its median is unremarkable."
)


@dataclass(frozen=True)
class Curve:
    """One training, step by step.

    Attributes:
        steps, losses: of the optimizer steps; NaN where the loss was not finite.
        evaluations: steps done, and cross-entropy on held-out tokens.
        freezes: the first and the last step of each change, by kind of site; "special" are the special constants, "cap" the cap.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    freezes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class FrozenConstant:
    """The constant of a site, and the constants that the special positions had until theirs were dropped."""

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
    """Read a run. It needs results.json; everything else may be missing.

    Raises:
        UserError: there is no such directory, or its results cannot be read.
    """
    from ln_removal.config.recipe import load_recipe
    from ln_removal.evaluation import results as results_file

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
    """Loss, evaluations and freezes of a metrics.jsonl; a row that lacks what its kind has is passed over."""
    curve = Curve()
    changes: dict[str, list[float]] = {}
    for row in metrics_rows(path):
        kind, step = row["kind"], row["step"]
        try:
            if kind == "train":
                curve.losses.append(_number(row["loss"]))
                curve.steps.append(step)
            elif kind == "evaluation":
                curve.evaluations.append((float(step), _number(row["cross_entropy"])))
            elif kind == "event":
                changes.setdefault(str(row["site"]), []).append(float(step))
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    for site, steps in changes.items():
        kind = "special" if site in SPECIALS else site.partition(".")[0]
        curve.freezes.setdefault(kind, []).append((min(steps), max(steps)))
    order = {kind: place for place, kind in enumerate((*SITE_KINDS, "special", CAP))}
    ordered = dict(sorted(curve.freezes.items(), key=lambda item: order.get(item[0], len(order))))
    return Curve(curve.steps, curve.losses, curve.evaluations, ordered)


def read_constants(state: Path) -> list[FrozenConstant]:
    """The frozen constants in the newest checkpoint that can be read, site by site; empty when there is none."""
    from safetensors import SafetensorError, safe_open

    from ln_removal.training.checkpoint import checkpoints

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
    """One entry for each site, from the buffers (captured, frozen) of its norm, each (R, K): see `freezable.FreezableNorm`."""
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


def incident_lines(metrics: Path) -> list[str]:
    """The incidents of a run as sentences: skipped steps by cause, then the others in the order in which they happened."""
    skipped: dict[str, list[int]] = {}
    lines: list[str] = []
    for row in metrics_rows(metrics):
        try:
            if row["kind"] == "incident" and row["incident"] == "skipped":
                skipped.setdefault(str(row["cause"]), []).append(int(row["step"]))
            elif (line := _line(row)) is not None:
                lines.append(line)
        except (KeyError, TypeError, ValueError):  # a row of another version
            continue
    more = [f"and {len(lines) - SHOWN} more, see {metrics.name}"] if len(lines) > SHOWN else []
    return [_skipped(cause, steps) for cause, steps in skipped.items()] + lines[:SHOWN] + more


def _skipped(cause: str, steps: list[int]) -> str:
    named = ", ".join(map(str, steps[:SHOWN])) + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")
    return f"step{'s' if len(steps) > 1 else ''} {named}: the update was left out, the {cause} was not finite"


def _line(row: dict[str, Any]) -> str | None:
    kind, step = row["kind"], row["step"]
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


@dataclass(frozen=True, slots=True)
class PublishedLoss:
    """Cross-entropy of one model on one data set, mean over its samples."""

    model: str
    tokens: str
    data: str
    original: float
    control: float
    ln_free: float
    source: str

    @property
    def gap(self) -> float:
        """LN-free minus control."""
        return self.ln_free - self.control

    def shown(self, role: str) -> str:
        """The loss of one role, with as many digits as the paper gives."""
        loss = float(getattr(self, role))
        return f"{loss:.{2 if loss >= 100 else 3 if self.source == HEIMERSHEIM else 4}f}"


@dataclass(frozen=True, slots=True)
class PublishedAccuracy:
    """HellaSwag accuracy in per cent; None where the source gives none."""

    model: str
    measure: str
    original: float
    control: float | None
    ln_free: float
    source: str


LOSSES = (
    PublishedLoss("gpt2", "about 590M", "OpenWebText", 3.095, 2.989, 3.014, HEIMERSHEIM),
    PublishedLoss("gpt2", "157M", "OpenWebText", 3.1006, 3.0126, 3.0797, BARONI),
    PublishedLoss("gpt2-medium", "262M", "OpenWebText", 2.8145, 2.7390, 2.7642, BARONI),
    PublishedLoss("gpt2-large", "315M", "OpenWebText", 2.6623, 2.6240, 2.6384, BARONI),
    PublishedLoss("gpt2-xl", "413M", "OpenWebText", 2.5567, 2.4799, 2.5052, BARONI),
    PublishedLoss("gpt2", "about 590M", "The Pile", 2.856, 2.880, 2.926, HEIMERSHEIM),
    PublishedLoss("gpt2", "157M", "The Pile", 2.8450, 2.8511, 2.8852, BARONI),
    PublishedLoss("gpt2-medium", "262M", "The Pile", 2.5163, 2.5752, 2.6579, BARONI),
    PublishedLoss("gpt2-large", "315M", "The Pile", 2.5320, 2.6233, 2.7504, BARONI),
    PublishedLoss("gpt2-xl", "413M", "The Pile", 2.4436, 2.4673, 130.22, BARONI),
)

ACCURACIES = (
    PublishedAccuracy("gpt2", "nanoGPT-style protocol", 29.56, 29.82, 29.54, HEIMERSHEIM),
    PublishedAccuracy("gpt2", "lm-eval acc_norm", 31.1, None, 30.2, BARONI),
    PublishedAccuracy("gpt2-medium", "lm-eval acc_norm", 39.4, None, 37.4, BARONI),
    PublishedAccuracy("gpt2-large", "lm-eval acc_norm", 45.4, 43.4, 42.8, BARONI),
    PublishedAccuracy("gpt2-xl", "lm-eval acc_norm", 50.9, 49.8, 48.8, BARONI),
)
