"""What tables and figures of several models share: a column or a panel a model, a colour a model, and what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret.models import TITLES, Documents
from ln_removal.interpret.passes import Array
from ln_removal.report import plots

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"original": plots.SOFT, "control": plots.ALARM, "ln_free": plots.ACCENT}
"""As on the report page."""

MOST_WRITTEN = 100
"""Cells of a heatmap above which no figures are written into them."""


def header(roles: Iterable[str], first: str = "") -> list[str]:
    """The header of a table with a column for each model."""
    return [first, *(TITLES[role] for role in roles)]


def text_note(documents: Documents, *, unit: str | None = None) -> str:
    """What was read, and what the intervals are over: a line below a table."""
    count, length = documents.tokens.shape
    bos = "with" if documents.prepend_bos else "without"
    return (
        f"{count} {documents.unit} of {length} tokens ({documents.corpus}), {bos} BOS; 95 % intervals over "
        f"{unit or documents.unit}"
    )


def scaled(found: Interval, factor: float) -> Interval:
    """An interval in another unit, such as per cent of a share."""
    return Interval(factor * found.value, factor * found.low, factor * found.high)


def fixed(found: Interval, digits: int) -> str:
    """A value and its interval with so many decimals, also where these are zeros: "0.010 [0.009, 0.011]"."""
    if not np.isfinite(found.value):
        return "-"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def heatmaps(grids: Mapping[str, Array], label: str, words: str, *, low: float, high: float, form: str) -> Figure:
    """Layers by heads of each model, side by side on one colour scale.

    Args:
        grids: (L, H) by role.
        label: of the colour bar.
        words: below the panels.
        low, high: ends of the colour scale.
        form: how figures are written into cells, such as ".2f".
    """
    roles = list(grids)
    rows, columns = grids[roles[0]].shape
    width, height = plots.cell_size(rows, columns)
    figure, axes = plots.panels([TITLES[role] for role in roles], (width, height), share=False)
    for panel, role in zip(axes, roles, strict=True):
        image = panel.imshow(
            grids[role], cmap=plots.colour_map(), vmin=low, vmax=high, interpolation="nearest", aspect="auto"
        )
        if grids[role].size <= MOST_WRITTEN:
            for (row, column), value in np.ndenumerate(grids[role]):
                shade = plots.TEXT if value > low + 0.6 * (high - low) else "#ffffff"
                panel.text(column, row, format(value, form), ha="center", va="center", fontsize=6.5, color=shade)
        panel.set_xticks(plots.whole_ticks(columns))
        panel.set_yticks(plots.whole_ticks(rows))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    plots.label_edges(axes, "head", "layer")
    plots.colour_bar(figure, axes, image, label)
    plots.note(figure, words)
    return figure


def banded(panel: Axes, x: Sequence[float], found: Sequence[Interval], colour: str, label: str) -> None:
    """A line of values with a band for their intervals."""
    panel.plot(x, [one.value for one in found], color=colour, label=label, marker="o", markersize=2.5)
    panel.fill_between(
        x, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15, linewidth=0
    )


def grouped_bars(panel: Axes, found: Mapping[str, Sequence[Interval]], names: Sequence[str]) -> None:
    """A group of bars for each name with a bar for each model, and their intervals."""
    width = 0.8 / len(found)
    for number, (role, values) in enumerate(found.items()):
        places = np.arange(len(names)) + (number - (len(found) - 1) / 2) * width
        heights = np.array([one.value for one in values])
        ends = np.array([[one.value - one.low, one.high - one.value] for one in values]).T
        panel.bar(places, heights, width * 0.92, color=COLOURS[role], label=TITLES[role])
        panel.errorbar(places, heights, yerr=np.clip(ends, 0, None), fmt="none", ecolor=plots.TEXT, elinewidth=0.8)
    panel.set_xticks(range(len(names)), list(names))
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="y")
    panel.set_axisbelow(True)
