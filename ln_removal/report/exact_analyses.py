"""Tables and figures of the analyses that are exact without LayerNorm: direct effects, paths, circuits from weights.

Each analysis has a function for its tables on the terminal and one for its figures, which map a name to a function that draws.

Shape legend: L layers, H heads, C components.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret.attribution import (
    KIND_TITLES,
    Array,
    DirectEffects,
    DirectEffectsByModel,
    Direction,
)
from ln_removal.interpret.models import TITLES
from ln_removal.report import plots
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

POINTS = 3000
"""Most points of a kind in a panel of a scatter plot."""

DIRECTION_TITLES: dict[Direction, str] = {
    "correct": "the right next token",
    "centred": "the right next token minus the mean over the vocabulary",
    "difference": "the right next token minus the runner-up",
}

SHORTEST_NUMBER = 0.01
"""Figures below this are written with an exponent."""


def number(value: float, digits: int = 1) -> str:
    """A figure with so many decimals, or with an exponent where these would show nothing of it."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= SHORTEST_NUMBER else f"{value:.0e}"


def with_interval(found: Interval, digits: int = 1) -> str:
    """A value and its interval: "39.5 [37.8, 41.2]"."""
    if abs(found.value) < SHORTEST_NUMBER and found.value != 0:
        return number(found.value, digits)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def dla_tables(found: DirectEffectsByModel) -> list[Table]:
    """The error, the sign flips and the rank correlation of heads and MLPs in each direction, a column a model."""
    seed = found.documents.seed
    roles = list(found.effects)
    rows = []
    for direction in found.effects[roles[0]]:
        for kind, title in KIND_TITLES.items():
            parts = [found.effects[role][direction].only(kind) for role in roles]  # type: ignore[arg-type]
            name = f"{direction}, {title}"
            rows += [
                [f"{name}: error (%)", *(with_interval(part.error(seed=seed)) for part in parts)],
                ["  wrong sign (%)", *(with_interval(part.sign_flips(seed=seed)) for part in parts)],
                ["  rank correlation", *(with_interval(part.rank_correlation(seed=seed), 3) for part in parts)],
            ]
    count, length = found.documents.tokens.shape
    notes = [
        f"{count} {found.documents.unit} of {length} tokens ({found.documents.corpus}), "
        f"{'with' if found.documents.prepend_bos else 'without'} BOS; 95 % intervals over {found.documents.unit}",
        "error: mean |attribution - ablation| over mean |ablation|",
    ]
    return [
        text_table(
            "direct effects on a logit, attributed and ablated", ["", *(TITLES[role] for role in roles)], rows, notes
        )
    ]


def dla_charts(found: DirectEffectsByModel) -> dict[str, Callable[[], Figure]]:
    """A scatter plot of attribution against ablation for each direction, and the errors of all components."""
    directions = list(next(iter(found.effects.values())))
    charts: dict[str, Callable[[], Figure]] = {
        f"dla-{direction}": partial(effects_scatter, found, direction) for direction in directions
    }
    last = directions[-1]
    return charts | {"dla-errors": lambda: component_errors(found, last)}


def effects_scatter(found: DirectEffectsByModel, direction: Direction) -> Figure:
    """Attribution against ablation, one point a component and position, one panel a model, on the same axes."""
    roles = list(found.effects)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.6), share=True)
    random = np.random.default_rng(0)
    drawn: list[Array] = []
    for panel, role in zip(axes, roles, strict=True):
        for kind, colour in (("head", plots.ACCENT), ("mlp", plots.ALARM)):
            part = found.effects[role][direction].only(kind)  # type: ignore[arg-type]
            points = np.stack([part.ablation.ravel(), part.attribution.ravel()])
            some = points[:, random.permutation(points.shape[1])[:POINTS]]
            drawn.append(some)
            label = f"{KIND_TITLES[kind]}: {number(part.error().value)} %"
            panel.plot(*some, ".", color=colour, markersize=1.6, alpha=0.35, markeredgewidth=0)
            panel.plot([], [], "o", color=colour, markersize=4, markeredgewidth=0, label=label)
        panel.axline((0, 0), slope=1, color=plots.RULE, linewidth=0.8, zorder=1)
        panel.legend(
            frameon=False, fontsize=7.5, loc="upper left", handletextpad=0.1, title="error", title_fontsize=7.5
        )
        panel.set_aspect("equal", adjustable="box")
    reach = float(np.percentile(np.abs(np.concatenate(drawn, axis=1)), 99.7))
    axes[0].set_xlim(-reach, reach)
    axes[0].set_ylim(-reach, reach)
    plots.label_edges(axes, "change of the logit by ablation", "attribution")
    plots.note(
        figure,
        f"Direct effects on {DIRECTION_TITLES[direction]}, in logits. A point is a component at one position of a document; on "
        "the line, attribution is exact. The 0.3 % largest lie outside.",
    )
    return figure


def component_errors(found: DirectEffectsByModel, direction: Direction) -> Figure:
    """The error of each head, and of each MLP in a column of its own, one panel a model, on one scale."""
    roles = list(found.effects)
    grids = [_grid(found.effects[role][direction], found.layers, found.heads) for role in roles]
    largest = max(float(np.nanmax(grid)) for grid in grids)
    width, height = plots.cell_size(*grids[0].shape)
    figure, axes = plots.panels([TITLES[role] for role in roles], (1.35 * width, height), share=False)
    write = grids[0].size <= 100
    for panel, grid in zip(axes, grids, strict=True):
        image = panel.imshow(
            grid, cmap=plots.colour_map(), vmin=0, vmax=largest, interpolation="nearest", aspect="auto"
        )
        if write:
            for (row, column), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    shade = plots.TEXT if value > 0.6 * largest else "#ffffff"
                    panel.text(column, row, number(value, 0), ha="center", va="center", fontsize=6, color=shade)
        panel.axvline(found.heads - 0.5, color="#ffffff", linewidth=4)
        ticks = plots.whole_ticks(found.heads, 8)
        panel.set_xticks([*ticks, found.heads], [*map(str, ticks), "MLP"])
        panel.set_yticks(plots.whole_ticks(found.layers))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    plots.label_edges(axes, "head", "layer")
    plots.colour_bar(figure, axes, image, "error (%)")
    plots.note(figure, f"Error of the attribution of each component's direct effect on {DIRECTION_TITLES[direction]}.")
    return figure


def _grid(effects: DirectEffects, layers: int, heads: int) -> Array:
    """(L, H + 1) errors: the heads, and the MLPs in the last column."""
    grid = np.full((layers, heads + 1), np.nan)
    errors = effects.component_errors
    for label, error in zip(effects.labels, errors, strict=True):
        if label.startswith("L") and "H" in label:
            layer, head = map(int, label[1:].split("H"))
            grid[layer, head] = error
        elif label.endswith("_mlp_out"):
            grid[int(label.partition("_")[0]), -1] = error
    return grid
