"""The figures of `ln-analyze`: attention entropy of heads and layers, and the stability of a training over its steps.

The entropy figures show the heads of each layer, the layers over training, and the heads in the overload band. The others
show NaN in the attention, residual and gradient norms, and learnable slopes. All use the report's colours and one grid of
panels, and are saved as PNG and PDF. They do without pyplot, which keeps global state.

Shape legend: S observations, L layers, H heads, N slopes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.interpret.entropies import HeadEntropies
from ln_removal.interpret.observations import Array, Observations, layer_means
from ln_removal.models.attention import OVERLOAD_SHARE, largest_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TEXT, SOFT, RULE, GRID, ACCENT, ALARM = "#1b1f24", "#5b6570", "#d5dae0", "#e9edf1", "#0b62b0", "#c4540a"
"""The report's colours in light mode."""

LETTER = 0.075
"""Approximate width in inches of a letter in a title."""

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
    "text.parse_math": False,  # names of runs and models stand in the titles, and $ is a character of theirs
}


@contextmanager
def house_style() -> Iterator[None]:
    """A block in which figures are drawn and saved in the report's style."""
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
        for panel in grid[max(0, count - columns) : count]:  # also those above an empty place
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


def curve(panel: Axes, steps: Any, values: Any, colour: Any) -> None:
    """A line of values over steps, with gaps where they are NaN, and with points when there are too few for a line."""
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
    """A colour bar at the right of all panels, `gap` inches away from them."""
    width, _ = figure.get_size_inches()
    bar = figure.colorbar(
        mappable, ax=list(axes), ticks=ticks, aspect=22, pad=gap / width, fraction=0.3 / width, panchor=False
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar


def whole_ticks(count: int, wanted: int = 12) -> list[int]:
    """About `wanted` whole numbers below `count`, beginning with 0."""
    return list(range(0, count, max(1, -(-count // wanted))))


def cell_size(rows: int, columns: int) -> tuple[float, float]:
    """Width and height in inches of a panel whose cells are squares of a readable size."""
    side = min(0.26, 4.2 / max(rows, columns))
    return max(1.9, side * columns + 0.55), max(1.5, side * rows + 0.9)


def colour_map(missing: str = "#ffffff") -> Colormap:
    """A colour map for values from low to high, with a colour for values that are masked or NaN."""
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


def head_heatmap(measured: Sequence[HeadEntropies]) -> Figure:
    """Entropy of every head, layers by heads, models side by side on one colour scale from 0 to the largest possible.

    Models that were measured at different contexts have different largest entropies; they are drawn as shares of it.
    """
    relative = len({one.queries for one in measured}) > 1
    largest = 1.0 if relative else measured[0].largest
    rows, columns = (max(one.entropy.shape[axis] for one in measured) for axis in (0, 1))
    figure, axes = panels([one.title for one in measured], cell_size(rows, columns), share=False)
    missing = marked = False
    for panel, one in zip(axes, measured, strict=True):
        values = one.entropy / one.largest if relative else one.entropy
        image = panel.imshow(values, cmap=colour_map(), vmin=0, vmax=largest, interpolation="nearest")
        missing |= hatch_missing(panel, np.isnan(values))
        marked |= bool(one.overloaded.any())
        layers, heads = np.nonzero(one.overloaded)
        panel.plot(heads, layers, "o", color=TEXT, markersize=2.4)
        panel.set_xticks(whole_ticks(values.shape[1]))
        panel.set_yticks(whole_ticks(values.shape[0]))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_anchor("NW")
        panel.set_xlabel("head")
        panel.set_ylabel("layer")
    unit = "share of the largest possible" if relative else "nats"
    _mark_band(colour_bar(figure, axes, image, f"attention entropy ({unit})", gap=0.4), largest)
    queries = "" if relative else f" (here {largest:.3f} nats, for {measured[0].queries} queries)"
    words = f"Overload band: above {OVERLOAD_SHARE:g} of the largest entropy of a causal head{queries}"
    note(
        figure,
        words
        + ("; dots mark the heads in it." if marked else "; no head is in it.")
        + (" Hatched: NaN." if missing else ""),
    )
    return figure


def layers_over_steps(runs: Sequence[Observations]) -> Figure:
    """Mean entropy of each layer's heads over training, one line a layer, one panel a run, on the same axes."""
    figure, axes = panels([run.name for run in runs], (2.9, 2.3), share=True)
    most = max(run.entropy.shape[1] for run in runs)
    colours = layer_colours(most)
    for panel, run in zip(axes, runs, strict=True):
        largest = largest_entropy(run.queries)
        panel.axhspan(OVERLOAD_SHARE * largest, largest, color=ALARM, alpha=0.12, linewidth=0)
        for layer, line in enumerate(layer_means(run.entropy).T):
            curve(panel, run.steps, line, colours[layer])
        panel.grid(axis="y")
    axes[0].set_ylim(0, 1.03 * max(largest_entropy(run.queries) for run in runs))
    label_edges(axes, "optimizer step", "attention entropy (nats)")
    layer_bar(figure, axes, most)
    note(
        figure,
        f"Mean over the layer's heads that are not NaN. Shaded: the overload band, above {OVERLOAD_SHARE:g} of the largest "
        "entropy of a causal head.",
    )
    return figure


def overload_shares(measured: Sequence[HeadEntropies]) -> Figure:
    """Share of each layer's heads in the overload band, one panel a model, on the same axes."""
    figure, axes = panels([one.title for one in measured], (2.4, 2.2), share=True)
    most = max(len(one.entropy) for one in measured)
    for panel, one in zip(axes, measured, strict=True):
        panel.bar(range(len(one.entropy)), 100 * one.overload_shares, color=ACCENT, width=0.75)
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        if not one.overloaded.any():
            panel.text(0.5, 0.5, "no head", transform=panel.transAxes, ha="center", color=SOFT)
    axes[0].set_ylim(0, 100)
    axes[0].set_xlim(-0.6, most - 0.4)
    axes[0].set_xticks(whole_ticks(most))
    label_edges(axes, "layer", "heads in the band (%)")
    note(figure, f"Overload band: above {OVERLOAD_SHARE:g} of the largest entropy of a causal head.")
    return figure


def _mark_band(bar: Colorbar, largest: float) -> None:
    """A bracket along the colour bar, from 0.9 of the largest entropy to its end."""
    low, left = OVERLOAD_SHARE * largest, -0.35
    bar.ax.plot([left + 0.2, left, left, left + 0.2], [low, low, largest, largest], color=TEXT, clip_on=False)
    bar.ax.text(left - 0.25, largest, "overload", rotation=90, ha="right", va="top", fontsize=8)


def nan_counts(runs: Sequence[Observations]) -> Figure:
    """NaN in each layer's attention matrices at each observation, layers by observations, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    most = max(run.attention_entries for run in runs)
    rows, columns = (max(run.nan_counts.shape[axis] for run in runs) for axis in (1, 0))
    figure, axes = panels(
        [run.name for run in runs], (min(4.2, max(2.4, 0.1 * columns + 1.2)), min(3.2, 0.17 * rows + 1.0)), share=False
    )
    norm = LogNorm(1, most)
    colours = colour_map(missing=GRID)
    for panel, run in zip(axes, runs, strict=True):
        counts = np.ma.masked_less(run.nan_counts.T, 1)
        image = panel.imshow(counts, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        if not run.nan_counts.any():
            panel.text(
                0.5,
                0.5,
                f"no NaN in {run.counted}",
                transform=panel.transAxes,
                ha="center",
                va="center",
            )
        _step_ticks(panel, run)
        panel.set_yticks(whole_ticks(run.nan_counts.shape[1]))
        panel.spines[:].set_visible(False)
    label_edges(axes, "optimizer step observed", "layer")
    colour_bar(figure, axes, image, "NaN in the attention")
    note(figure, f"Grey: none. All entries of a layer's attention: {most:,}.")
    return figure


def norms_over_steps(runs: Sequence[Observations]) -> Figure:
    """The residual stream's norm in front of each block and behind the last, over training, on the same logarithmic axes."""
    return _lines(
        runs,
        [run.residual_norm for run in runs],
        "mean L2 norm",
        "Residual stream in front of each block; the last line is behind the last block. A gap: not finite.",
        log=True,
    )


def gradients_over_steps(runs: Sequence[Observations]) -> Figure:
    """The norm of each block's gradient over training, on the same logarithmic axes."""
    return _lines(
        runs,
        [run.gradient_norm for run in runs],
        "L2 norm",
        "Gradient of each block's parameters, after clipping. A gap: not finite.",
        log=True,
    )


def slopes_over_steps(runs: Sequence[Observations]) -> Figure:
    """The learnable negative slopes over training: a line a layer, or one for the network, on the same axes."""
    figure = _lines(
        runs,
        [run.slopes for run in runs],
        "negative slope",
        "Slope of the leaky ReLU where its input is negative; 0 is ReLU, 1 the identity.",
        log=False,
    )
    for panel in figure.axes[: len(runs)]:
        panel.axhline(0, color=SOFT, linewidth=0.8, zorder=1)
    return figure


def training_over_steps(runs: Sequence[Observations]) -> Figure:
    """Entropy, stream norms and gradient norms while runs train, and slopes if any learns them; a row for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {
        "attention entropy (nats)": [layer_means(run.entropy) for run in runs],
        "norm of the residual stream": [run.residual_norm for run in runs],
        "gradient norm of the block": [run.gradient_norm for run in runs],
    }
    if any(run.slopes.shape[1] for run in runs):
        columns["negative slope"] = [run.slopes for run in runs]
    figure = Figure(figsize=(2.5 * len(columns) + 1.3, 1.35 * len(runs) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(runs), len(columns), squeeze=False, sharex=True, sharey="col")
    most = max(run.residual_norm.shape[1] for run in runs)
    colours = layer_colours(most)
    for column, (title, values) in enumerate(columns.items()):
        for panel, run, array in zip(grid[:, column], runs, values, strict=True):
            for number, line in enumerate(array.T):
                curve(panel, run.steps, line, ACCENT if array.shape[1] == 1 else colours[number])
            panel.grid(axis="y")
            if column == 0:
                largest = largest_entropy(run.queries)
                panel.axhspan(OVERLOAD_SHARE * largest, largest, color=ALARM, alpha=0.12, linewidth=0)
                panel.set_ylabel(_wrapped(run.name, 1.3), color=TEXT)
        if title.endswith(("stream", "block")):
            _logarithmic(grid[0, column], np.concatenate([array.ravel() for array in values]))
        grid[0, column].set_title(title, loc="left")
        grid[-1, column].set_xlabel("optimizer step")
    grid[0, 0].set_ylim(0, 1.03 * max(largest_entropy(run.queries) for run in runs))
    layer_bar(figure, grid.flatten().tolist(), most)
    note(
        figure,
        f"A line a layer, the last of the stream behind the last block. Shaded: above {OVERLOAD_SHARE:g} of the largest entropy of a "
        "causal head. A gap: not finite.",
    )
    return figure


def _lines(runs: Sequence[Observations], values: Sequence[Array], y_label: str, words: str, *, log: bool) -> Figure:
    """One panel a run, one line a column of its values (S, any)."""
    figure, axes = panels([run.name for run in runs], (2.9, 2.3), share=True)
    most = max(array.shape[1] for array in values)
    colours = layer_colours(most)
    for panel, run, array in zip(axes, runs, values, strict=True):
        for number, column in enumerate(array.T):
            curve(panel, run.steps, column, ACCENT if array.shape[1] == 1 else colours[number])
        panel.grid(axis="y")
    if log:
        _logarithmic(axes[0], np.concatenate([array.ravel() for array in values]))
    label_edges(axes, "optimizer step", y_label)
    if most > 1:
        layer_bar(figure, axes, most)
    note(figure, words)
    return figure


def _logarithmic(panel: Axes, values: Array) -> None:
    """A logarithmic y axis whose ticks are plain numbers: powers of ten, and 2 and 5 times those over a short range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    drawn = values[np.isfinite(values) & (values > 0)]
    is_short = len(drawn) > 0 and drawn.max() < 50 * drawn.min()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(plain)
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.yaxis.set_minor_formatter(plain if is_short else NullFormatter())


def _step_ticks(panel: Axes, run: Observations) -> None:
    """The steps of about four observations below an image of one column an observation."""
    places = np.unique(np.linspace(0, len(run.steps) - 1, min(4, len(run.steps))).round().astype(int))
    panel.set_xticks(places, [f"{run.steps[place]:,}" for place in places])
    panel.tick_params(length=0)
