"""How the analysis figures look and are saved: the report's colours, one grid of panels, PNG and PDF.

Figures are made without pyplot: no window, no state, safe in a server.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TEXT, SOFT, RULE, GRID, ACCENT, ALARM = "#1b1f24", "#5b6570", "#d5dae0", "#e9edf1", "#0b62b0", "#c4540a"
"""The report's, on white: a figure goes into a paper as well as onto a page."""

LETTER = 0.075
"""Width in inches of a letter of a title, about."""

FORMATS = ("png", "pdf")

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": GRID,
    "lines.linewidth": 1.4,
    "hatch.color": SOFT,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save inside it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def panels(names: Sequence[str], size: tuple[float, float], *, share: bool) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel for each name, at most four in a row.

    Args:
        size: width and height of a panel in inches.
        share: one x axis and one y axis for all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    columns = next(width for width in (count, 4, 3) if width <= 4 and (count <= 4 or count % width == 0 or width == 3))
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + 1.1, size[1] * rows + 0.25), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flatten()
    for panel in grid[count:]:
        panel.set_visible(False)
    for panel, name in zip(grid, names, strict=False):
        panel.set_title(_wrapped(name, size[0]), loc="left")
    if share and rows > 1:
        for panel in grid[max(0, count - columns) : count]:  # also above an empty place
            panel.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def label_edges(axes: Sequence[Axes], x_label: str, y_label: str) -> None:
    """Label the axes of the panels at the left edge and of those with nothing below them."""
    for number, panel in enumerate(axes):
        place = panel.get_subplotspec()
        assert place is not None
        if place.is_first_col():
            panel.set_ylabel(y_label)
        if number + place.get_gridspec().ncols >= len(axes):
            panel.set_xlabel(x_label)


def line(panel: Axes, steps: Any, values: Any, colour: Any) -> None:
    """Values over steps, interrupted where they are NaN; with points when there are too few for a line."""
    panel.plot(steps, values, color=colour, marker="o" if np.isfinite(values).sum() < 3 else None, markersize=3)


def layer_colours(layers: int) -> list[Any]:
    """A colour for each layer, dark to light, readable on white up to the last."""
    return [_sequence()(position) for position in (np.linspace(0.0, 0.86, layers) if layers > 1 else [0.35])]


def layer_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """The legend of `layer_colours`: a bar with a field for each layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(layers + 1) - 0.5, layers)
    mappable = ScalarMappable(norm, ListedColormap(layer_colours(layers)))
    bar = colour_bar(figure, axes, mappable, "layer", ticks=whole_ticks(layers))
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()


def colour_bar(
    figure: Figure, axes: Sequence[Axes], mappable: ScalarMappable, label: str, *, gap: float = 0.08, ticks: Any = None
) -> Colorbar:
    """A bar at the right of all panels, `gap` inches away from them."""
    width, _ = figure.get_size_inches()
    bar = figure.colorbar(
        mappable, ax=list(axes), ticks=ticks, aspect=22, pad=gap / width, fraction=0.3 / width, panchor=False
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar


def whole_ticks(count: int, wanted: int = 12) -> list[int]:
    """Whole numbers below `count`, about `wanted` of them, from 0."""
    return list(range(0, count, max(1, -(-count // wanted))))


def cell_size(rows: int, columns: int) -> tuple[float, float]:
    """Width and height in inches of a panel whose cells are squares, neither tiny nor a page wide."""
    side = min(0.26, 4.2 / max(rows, columns))
    return max(1.9, side * columns + 0.55), max(1.5, side * rows + 0.9)


def colour_map(missing: str = "#ffffff") -> Colormap:
    """For values from low to high, and a colour for what is masked or NaN."""
    return _sequence().with_extremes(bad=missing)


def hatch_missing(panel: Axes, missing: Any) -> bool:
    """Hatch the cells (rows, columns) of an image that have no number; returns whether there are any."""
    from matplotlib.patches import Rectangle

    for row, column in np.argwhere(missing):
        panel.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#f2f2f2", edgecolor=SOFT, hatch="////", linewidth=0)
        )
    return bool(missing.any())


def note(figure: Figure, text: str) -> None:
    """A line in small print below the panels."""
    figure.supxlabel(
        textwrap.fill(text, max(40, int(figure.get_figwidth() / 0.061))), fontsize=8, color=SOFT, x=0.01, ha="left"
    )


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write DIRECTORY/NAME.png and .pdf.

    Raises:
        UserError: the directory cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{name}.{kind}" for kind in FORMATS]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for each format
        for path in paths:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    except OSError as error:
        raise UserError(f"cannot write into {directory}: {error.strerror or error}; choose another --out") from error
    return paths


def _sequence() -> Colormap:
    from matplotlib import colormaps

    return colormaps["viridis"]


def _wrapped(name: str, inches: float) -> str:
    width = max(16, int(inches / LETTER))
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in name.split("\n"))
