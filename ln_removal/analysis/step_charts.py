"""Figures of a training's stability: NaN in the attention, residual and gradient norms, learnable slopes, over its steps.

Shape legend: S observations, L layers, N slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.analysis import drawing
from ln_removal.analysis.observations import Array, Observations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def nan_counts(runs: Sequence[Observations]) -> Figure:
    """NaN in each layer's attention matrices at each observation, layers by observations, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    most = max(run.attention_entries for run in runs)
    rows, columns = (max(run.nan_counts.shape[axis] for run in runs) for axis in (1, 0))
    figure, axes = drawing.panels(
        [run.name for run in runs], (min(4.2, max(2.4, 0.1 * columns + 1.2)), min(3.2, 0.17 * rows + 1.0)), share=False
    )
    norm = LogNorm(1, most)
    colours = drawing.colour_map(missing=drawing.GRID)
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
        panel.set_yticks(drawing.whole_ticks(run.nan_counts.shape[1]))
        panel.spines[:].set_visible(False)
    drawing.label_edges(axes, "optimizer step observed", "layer")
    drawing.colour_bar(figure, axes, image, "NaN in the attention")
    drawing.note(figure, f"Grey: none. All entries of a layer's attention: {most:,}.")
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
        panel.axhline(0, color=drawing.SOFT, linewidth=0.8, zorder=1)
    return figure


def _lines(runs: Sequence[Observations], values: Sequence[Array], y_label: str, words: str, *, log: bool) -> Figure:
    """One panel a run, one line a column of its values (S, any)."""
    figure, axes = drawing.panels([run.name for run in runs], (2.9, 2.3), share=True)
    most = max(array.shape[1] for array in values)
    colours = drawing.layer_colours(most)
    for panel, run, array in zip(axes, runs, values, strict=True):
        for number, column in enumerate(array.T):
            drawing.line(panel, run.steps, column, drawing.ACCENT if array.shape[1] == 1 else colours[number])
        panel.grid(axis="y")
    if log:
        _logarithmic(axes[0], np.concatenate([array.ravel() for array in values]))
    drawing.label_edges(axes, "optimizer step", y_label)
    if most > 1:
        drawing.layer_bar(figure, axes, most)
    drawing.note(figure, words)
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
