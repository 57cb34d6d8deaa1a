"""Tables for the terminal: the scores of original, control and LN-free, and what `ln-analyze` found, also as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.evaluation.results import ROLES, TITLES, Results, Trio, difference_of
from ln_removal.interpret.entropies import HeadEntropies, nullable
from ln_removal.interpret.observations import Array, Observations, layer_means
from ln_removal.models.attention import OVERLOAD_SHARE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORST_SHOWN = 2
"""Worst windows of a data set that the printed table shows; results.json and the report have more."""

MODELS_A_TABLE = 6


def render(results: Results, console: Console) -> None:
    """Print the table original / control / LN-free, with the differences that matter."""
    from rich.table import Table

    shown = [role for role in ROLES if getattr(results.models, role) is not None]
    table = Table(title="LayerNorm removal: scores", title_justify="left")
    table.add_column("")
    for role in shown:
        table.add_column(TITLES[role], justify="right")
    differences = [role for role in ("control", "original") if role in shown and "ln_free" in shown]
    for role in differences:
        table.add_column(f"LN-free - {TITLES[role]}", justify="right")

    def row(name: str, values: Trio[float], form: str, errors: Trio[float] | None = None) -> None:
        cells = []
        for role in shown:
            value, error = getattr(values, role), getattr(errors, role, None)
            cells.append(
                ("-" if value is None else format(value, form)) + (f" ± {error:{form}}" if error is not None else "")
            )
        for role in differences:
            difference = difference_of(values.ln_free, getattr(values, role))
            cells.append("-" if difference is None else format(difference, "+" + form))
        if any(getattr(values, role) is not None for role in shown):
            table.add_row(name, *cells)

    def part(name: str) -> Trio[float]:
        spreads = {role: getattr(results.loss_spread, role) for role in ROLES}
        return Trio[float](**{role: getattr(spread, name) for role, spread in spreads.items() if spread is not None})

    row("cross-entropy (nats per token)", results.cross_entropy, ".4f", part("standard_error"))
    row("  median token", part("median"), ".4f")
    row("  95 % of tokens below", part("percentile_95"), ".2f")
    row("  99.9 % of tokens below", part("percentile_99_9"), ".2f")
    if results.by_data:
        calibrations = {role: getattr(results.by_data[0].calibration, role) for role in ROLES}

        def calibration(name: str) -> Trio[float]:
            return Trio[float](**{role: getattr(c, name) for role, c in calibrations.items() if c is not None})

        row("calibration error", calibration("expected_calibration_error"), ".4f")
        row("entropy of the prediction", calibration("entropy"), ".4f")
    row("bits per byte", results.bits_per_byte, ".4f")
    row("accuracy (%)", _percent(results.accuracy), ".2f", _percent(results.accuracy_standard_error))
    console.print(table)
    for more in _further_tables(results, shown):
        console.print(more)
    settings = results.settings
    window = f"context {settings.context}{results.stride_note}"
    notes = [f"{results.tokens:,} tokens of {settings.data}, {window}, {settings.precision}"]
    if settings.questions:
        notes.append(f"{settings.questions:,} questions of {settings.question_set}, protocol {settings.protocol}")
    notes.append(f"{results.seconds:.0f} s on {results.device}")
    if results.gap is not None:
        notes.append(f"gap (LN-free - control): {results.gap:+.4f} nats per token")
    for note in notes:
        console.print(note, markup=False, highlight=False)
    for data in results.by_data:
        for one in data.differences:
            console.print(
                f"{data.data}: {TITLES[one.model]} - {TITLES[one.than]} {one.mean:+.4f}, {100 * one.confidence:.0f} % "
                f"interval {one.low:+.4f} to {one.high:+.4f} ({one.units} {one.unit})",
                markup=False,
                highlight=False,
            )
        for sample in data.worst[:WORST_SHOWN]:
            losses = ", ".join(
                f"{TITLES[role]} {value:.2f}" for role in shown if (value := getattr(sample.loss, role)) is not None
            )
            text = (
                repr(sample.before[-60:])[1:-1]
                + " >>"
                + repr(sample.token)[1:-1]
                + "<< "
                + repr(sample.after[:20])[1:-1]
            )
            console.print(f"{data.data}: worst window, {losses}: {text}", markup=False, highlight=False)
    for written in results.continuations:
        for role in shown:
            if (text := getattr(written.texts, role)) is not None:
                console.print(f"--- {TITLES[role]}\n{written.prompt}{text}", markup=False, highlight=False)


def _further_tables(results: Results, shown: Sequence[str]) -> Iterator[Table]:
    """By data set where there are several, and on odd text."""
    from rich.markup import escape
    from rich.table import Table

    def cells(values: Trio[float], form: str) -> list[str]:
        return ["-" if (value := getattr(values, role)) is None else format(value, form) for role in shown]

    def begun(title: str) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for role in shown:
            table.add_column(TITLES[role], justify="right")
        return table

    if len(results.by_data) > 1:
        table = begun("Cross-entropy by data set")
        for data in results.by_data:
            table.add_row(escape(data.data), *cells(data.cross_entropy, ".4f"))
            highest = {role: spread.percentile_99_9 for role in shown if (spread := getattr(data.loss_spread, role))}
            table.add_row("  99.9 % of tokens below", *cells(Trio[float](**highest), ".2f"))
        yield table
    if results.odd_text:
        table = begun(f"Odd text: mean loss and worst of {results.odd_text[0].sequences} sequences")
        for odd in results.odd_text:
            pairs = zip(cells(odd.loss, ".3f"), cells(odd.worst, ".3f"), strict=True)
            table.add_row(odd.kind, *(f"{mean} / {worst}" for mean, worst in pairs))
        yield table


def _percent(values: Trio[float]) -> Trio[float]:
    return Trio[float](**{role: 100 * share for role in ROLES if (share := getattr(values, role)) is not None})


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
    from rich.table import Table

    table = Table(title="negative slopes", title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("slope of", "first", "last", "smallest", "largest"):
        table.add_column(column, justify="right")
    for run in runs:
        for number, values in enumerate(run.slopes.T):
            known = values[np.isfinite(values)]
            figures = (known[0], known[-1], known.min(), known.max()) if len(known) else ()
            table.add_row(
                run.name if number == 0 else "", slope_name(run, number), *(f"{value:+.4f}" for value in figures)
            )
    return table


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
