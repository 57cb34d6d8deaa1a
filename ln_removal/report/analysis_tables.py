"""What `ln-analyze` found: attention entropy, NaN and learnable slopes, as tables for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.interpret.entropies import HeadEntropies, nullable, observed
from ln_removal.interpret.observations import Array, Observations, layer_means
from ln_removal.models.attention import OVERLOAD_SHARE
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from rich.table import Table

MODELS_A_TABLE = 6


def entropy_tables(heads: Sequence[HeadEntropies]) -> list[Table]:
    """Mean entropy of each layer and the share of its heads in the overload band, a column a model."""
    from rich.table import Table

    title = f"attention entropy in nats (and heads above {OVERLOAD_SHARE:g} of the largest possible)"
    tables = []
    for start in range(0, len(heads), MODELS_A_TABLE):
        part = heads[start : start + MODELS_A_TABLE]
        table = Table(title=title, title_justify="left")
        table.add_column("layer", justify="right")
        for one in part:
            table.add_column(one.title, justify="right", overflow="fold")
        for layer in range(max(len(one.entropy) for one in part)):
            table.add_row(str(layer), *(_layer_cell(one, layer) for one in part))
        table.add_section()
        table.add_row("all", *(_cell(one.entropy, one.overloaded) for one in part))
        table.add_row("largest", *(f"{one.largest:.3f}" for one in part))
        tables.append(table)
    return tables


def entropy_json(heads: Sequence[HeadEntropies], runs: Sequence[Observations]) -> list[dict[str, Any]]:
    """Every model's heads; for runs also the layers' means over the steps."""
    rows = [one.to_json() for one in heads]
    for row, run in zip(rows, runs, strict=False):
        row["directory"] = str(run.directory)
        row["observed_steps"] = run.steps.tolist()
        row["layer_entropy_over_steps"] = nullable(layer_means(run.entropy))
    return rows


def nan_lines(runs: Sequence[Observations]) -> list[str]:
    """A line a run: whether, when and where NaN or infinity appeared."""
    lines = []
    for run in runs:
        steps = f"{run.counted}, from step {run.steps[0]:,} to {run.steps[-1]:,}"
        attention, residual = run.nan_counts > 0, run.nonfinite_residual > 0
        if not attention.any() and not residual.any():
            lines.append(f"{run.name}: no NaN in any layer's attention, residual stream finite, in {steps}")
            continue
        parts = []
        if attention.any():
            worst = int(run.nan_counts.max())
            parts.append(
                f"NaN in the attention of {_layers(attention)} from step {_first(run, attention):,} on, at most {worst:,} of "
                f"{run.attention_entries:,} entries of a layer"
            )
        if residual.any():
            parts.append(f"residual stream not finite from step {_first(run, residual):,} on, {_places(residual)}")
        lines.append(f"{run.name}: {'; '.join(parts)}; {steps}")
    return lines


def nan_json(runs: Sequence[Observations]) -> list[dict[str, Any]]:
    """Counts and norms at every observation, and the first step with NaN of each layer."""
    return [
        {
            "name": run.name,
            "directory": str(run.directory),
            "steps": run.steps.tolist(),
            "attention_entries": run.attention_entries,
            "nan_counts": run.nan_counts.astype(int).tolist(),
            "first_nan_step": [
                int(run.steps[column.argmax()]) if column.any() else None for column in (run.nan_counts > 0).T
            ],
            "nonfinite_residual": run.nonfinite_residual.astype(int).tolist(),
            "residual_norm": nullable(run.residual_norm),
            "gradient_norm": nullable(run.gradient_norm),
        }
        for run in runs
    ]


def training_table(runs: Sequence[Observations]) -> Table:
    """For each run the share of overloaded heads and the mean entropy at the end, and the largest norms and when they were."""
    rows = []
    for figures in training_json(runs):
        norm, gradient = figures["largest_residual_norm"], figures["largest_gradient_norm"]
        rows.append(
            [
                str(figures["name"]),
                f"{100 * figures['overloaded']:.0f} %",
                "NaN" if figures["mean_entropy"] is None else f"{figures['mean_entropy']:.3f}",
                *("NaN" if one is None else f"{one['value']:.4g} (step {one['step']:,})" for one in (norm, gradient)),
            ]
        )
    header = ["run", "heads overloaded", "entropy (nats)", "largest stream norm", "largest gradient norm of a block"]
    return text_table("inside, at the last observation and at the largest", header, rows)


def training_json(runs: Sequence[Observations]) -> list[dict[str, Any]]:
    """What `training_table` shows, and what its figure draws."""
    return [
        {
            "name": run.name,
            "directory": str(run.directory),
            "steps": run.steps.tolist(),
            "overloaded": float(last.overloaded.mean()),
            "mean_entropy": nullable(np.asarray(last.mean)),
            "largest_residual_norm": _largest(run, run.residual_norm),
            "largest_gradient_norm": _largest(run, run.gradient_norm),
            "layer_entropy": nullable(layer_means(run.entropy)),
            "residual_norm": nullable(run.residual_norm),
            "gradient_norm": nullable(run.gradient_norm),
            "slopes": nullable(run.slopes),
        }
        for run in runs
        for last in [observed(run, None)]
    ]


def _largest(run: Observations, values: Array) -> dict[str, Any] | None:
    """The largest of (S, any) that is finite, with its step."""
    if not np.isfinite(values).any():
        return None
    known = np.where(np.isfinite(values), values, -np.inf).max(axis=1)
    return {"value": float(known.max()), "step": int(run.steps[known.argmax()])}


def with_slopes(runs: Sequence[Observations]) -> list[Observations]:
    """The runs that have learnable slopes.

    Raises:
        UserError: none has.
    """
    found = [run for run in runs if run.slopes.shape[1]]
    if not found:
        names = ", ".join(run.name for run in runs)
        raise UserError(
            f"no learnable slopes in {names}; train with --set architecture.activation=learnable_leaky_relu to have some"
        )
    return found


def slope_table(runs: Sequence[Observations]) -> Table:
    """First, last, smallest and largest value of every slope."""
    rows = []
    for run in runs:
        for number, values in enumerate(run.slopes.T):
            known = values[np.isfinite(values)]
            chosen = (known[0], known[-1], known.min(), known.max()) if len(known) else ()
            name = run.name if number == 0 else ""
            rows.append([name, slope_name(run, number), *(f"{value:+.4f}" for value in chosen)])
    return text_table("negative slopes", ["run", "slope of", "first", "last", "smallest", "largest"], rows)


def slope_json(runs: Sequence[Observations]) -> list[dict[str, Any]]:
    """Every slope at every observation."""
    return [
        {
            "name": run.name,
            "directory": str(run.directory),
            "steps": run.steps.tolist(),
            "slopes": {slope_name(run, number): nullable(values) for number, values in enumerate(run.slopes.T)},
        }
        for run in runs
    ]


def slope_name(run: Observations, number: int) -> str:
    """Whose slope it is."""
    return "network" if run.slopes.shape[1] == 1 else f"layer {number}"


def _layer_cell(one: HeadEntropies, layer: int) -> str:
    return _cell(one.entropy[layer], one.overloaded[layer]) if layer < len(one.entropy) else ""


def _cell(entropy: Array, overloaded: Any) -> str:
    """ "2.314 ( 17 %)": mean over the heads that are not NaN, share of all in the band."""
    known = entropy[np.isfinite(entropy)]
    mean = f"{known.mean():.3f}" if len(known) else "NaN"
    return f"{mean} ({100 * overloaded.mean():3.0f} %)"


def _first(run: Observations, found: Any) -> int:
    return int(run.steps[found.any(axis=1).argmax()])


def _layers(found: Any) -> str:
    layers = np.flatnonzero(found.any(axis=0)).tolist()
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _places(found: Any) -> str:
    first = int(np.flatnonzero(found.any(axis=0))[0])
    return f"behind block {first - 1} and later" if first else "already in front of the first block"
