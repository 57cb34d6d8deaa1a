"""Tables and lines of the shape of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.interpret.models import TITLES
from ln_removal.interpret.passes import ByModel
from ln_removal.interpret.streams import CLASSES, MEANS, ResidualShape
from ln_removal.report import plots
from ln_removal.report.exact_analyses import number
from ln_removal.report.side_by_side import banded, header, text_note
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

QUANTITIES = {
    "l2": "L2 norm",
    "max_over_median": "max / median",
    "cosine_to_mean": "cosine to the mean",
    "effective_rank": "effective rank",
}

WORDS = {
    "l2": "Mean L2 norm of the residual stream.",
    "max_over_median": "Largest over median size of the coordinates of the residual stream, mean over positions.",
    "cosine_to_mean": "Cosine of the residual stream and its mean over the positions of the class, mean over positions.",
    "effective_rank": "Exp of the entropy of the singular values of the residual stream minus its mean. At most the number of "
    "positions of the class less one.",
}

CLASS_COLOURS = (plots.SOFT, plots.ACCENT, plots.ALARM)

LOGARITHMIC = ("l2", "max_over_median")


def residual_tables(found: ByModel[ResidualShape]) -> list[Table]:
    """A table for each quantity: sites by models, with the position classes in one cell."""
    models = list(found.results.values())
    positions = ", ".join(
        f"{int(count):,} {title}" for title, count in zip(CLASSES, models[0].counts.sum(-1), strict=True)
    )
    notes = [
        text_note(found.documents, unit="pairs of documents (in the JSON file and the figures)"),
        f"positions: {positions}. Cells: {' / '.join(CLASSES)}",
    ]
    tables = []
    for name, title in QUANTITIES.items():
        digits = 2 if name == "cosine_to_mean" else 1
        grids = [_values(one, name) for one in models]
        rows = [
            [site, *(" / ".join(number(value, digits) for value in grid[place]) for grid in grids)]
            for place, site in enumerate(models[0].sites)
        ]
        tables.append(text_table(f"residual stream: {title}", header(found.results, "site"), rows, notes))
        notes = []
    return tables


def residual_charts(found: ByModel[ResidualShape]) -> dict[str, Callable[[], Figure]]:
    """A figure for each quantity along the sites, a panel a model, a line a position class."""
    return {f"residual-{name.replace('_', '-')}": partial(quantity_lines, found, name) for name in QUANTITIES}


def quantity_lines(found: ByModel[ResidualShape], name: str) -> Figure:
    """One quantity along the sites, one panel a model, on the same axes; bands are intervals over pairs of documents."""
    roles = list(found.results)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.3), share=True)
    layers = (len(found.results[roles[0]].sites) - 1) // 2
    x = np.arange(2 * layers + 1) / 2
    for panel, role in zip(axes, roles, strict=True):
        one = found.results[role]
        intervals = one.intervals(name, seed=found.documents.seed) if name in MEANS else []
        for place, (title, colour) in enumerate(zip(CLASSES, CLASS_COLOURS, strict=True)):
            if intervals:
                banded(panel, x.tolist(), [row[place] for row in intervals], colour, title)
            else:
                panel.plot(x, one.effective_rank[:, place], color=colour, label=title, marker="o", markersize=2.5)
        panel.grid(axis="y")
        panel.set_xticks(plots.whole_ticks(layers + 1, 8))
    if name in LOGARITHMIC:
        axes[0].set_yscale("log")
    else:
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
    axes[0].legend(frameon=False, fontsize=7.5)
    plots.label_edges(axes, "blocks passed", QUANTITIES[name])
    bands = " Bands: 95 % intervals over pairs of documents." if name in MEANS else ""
    plots.note(figure, WORDS[name] + bands + " Half a block: between attention and MLP.")
    return figure


def _values(one: ResidualShape, name: str) -> np.ndarray:
    """(S, K)."""
    return one.effective_rank if name == "effective_rank" else one.mean(name)
