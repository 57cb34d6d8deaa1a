"""Figures of attention entropy: heads of each layer, layers over training, heads in the overload band.

Shape legend: S observations, L layers, H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.analysis import drawing
from ln_removal.analysis.head_entropies import HeadEntropies
from ln_removal.analysis.observations import Array, Observations
from ln_removal.attention_entropy import OVERLOAD_SHARE, largest_entropy

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure


def head_heatmap(measured: Sequence[HeadEntropies]) -> Figure:
    """Entropy of every head, layers by heads, models side by side on one colour scale from 0 to the largest possible.

    Models that were measured at different contexts have different largest entropies; they are drawn as shares of it.
    """
    relative = len({one.queries for one in measured}) > 1
    largest = 1.0 if relative else measured[0].largest
    rows, columns = (max(one.entropy.shape[axis] for one in measured) for axis in (0, 1))
    figure, axes = drawing.panels([one.title for one in measured], drawing.cell_size(rows, columns), share=False)
    missing = marked = False
    for panel, one in zip(axes, measured, strict=True):
        values = one.entropy / one.largest if relative else one.entropy
        image = panel.imshow(values, cmap=drawing.colour_map(), vmin=0, vmax=largest, interpolation="nearest")
        missing |= drawing.hatch_missing(panel, np.isnan(values))
        marked |= bool(one.overloaded.any())
        layers, heads = np.nonzero(one.overloaded)
        panel.plot(heads, layers, "o", color=drawing.TEXT, markersize=2.4)
        panel.set_xticks(drawing.whole_ticks(values.shape[1]))
        panel.set_yticks(drawing.whole_ticks(values.shape[0]))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_anchor("NW")
        panel.set_xlabel("head")
        panel.set_ylabel("layer")
    unit = "share of the largest possible" if relative else "nats"
    _mark_band(drawing.colour_bar(figure, axes, image, f"attention entropy ({unit})", gap=0.4), largest)
    queries = "" if relative else f" (here {largest:.3f} nats, for {measured[0].queries} queries)"
    words = f"Overload band: above {OVERLOAD_SHARE:g} of the largest entropy of a causal head{queries}"
    drawing.note(
        figure,
        words
        + ("; dots mark the heads in it." if marked else "; no head is in it.")
        + (" Hatched: NaN." if missing else ""),
    )
    return figure


def layers_over_steps(runs: Sequence[Observations]) -> Figure:
    """Mean entropy of each layer's heads over training, one line a layer, one panel a run, on the same axes."""
    figure, axes = drawing.panels([run.name for run in runs], (2.9, 2.3), share=True)
    most = max(run.entropy.shape[1] for run in runs)
    colours = drawing.layer_colours(most)
    for panel, run in zip(axes, runs, strict=True):
        largest = largest_entropy(run.queries)
        panel.axhspan(OVERLOAD_SHARE * largest, largest, color=drawing.ALARM, alpha=0.12, linewidth=0)
        for layer, line in enumerate(layer_means(run.entropy).T):
            drawing.line(panel, run.steps, line, colours[layer])
        panel.grid(axis="y")
    axes[0].set_ylim(0, 1.03 * max(largest_entropy(run.queries) for run in runs))
    drawing.label_edges(axes, "optimizer step", "attention entropy (nats)")
    drawing.layer_bar(figure, axes, most)
    drawing.note(
        figure,
        f"Mean over the layer's heads that are not NaN. Shaded: the overload band, above {OVERLOAD_SHARE:g} of the largest "
        "entropy of a causal head.",
    )
    return figure


def overload_shares(measured: Sequence[HeadEntropies]) -> Figure:
    """Share of each layer's heads in the overload band, one panel a model, on the same axes."""
    figure, axes = drawing.panels([one.title for one in measured], (2.4, 2.2), share=True)
    most = max(len(one.entropy) for one in measured)
    for panel, one in zip(axes, measured, strict=True):
        panel.bar(range(len(one.entropy)), 100 * one.overload_shares, color=drawing.ACCENT, width=0.75)
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        if not one.overloaded.any():
            panel.text(0.5, 0.5, "no head", transform=panel.transAxes, ha="center", color=drawing.SOFT)
    axes[0].set_ylim(0, 100)
    axes[0].set_xlim(-0.6, most - 0.4)
    axes[0].set_xticks(drawing.whole_ticks(most))
    drawing.label_edges(axes, "layer", "heads in the band (%)")
    drawing.note(figure, f"Overload band: above {OVERLOAD_SHARE:g} of the largest entropy of a causal head.")
    return figure


def layer_means(entropy: Array) -> Array:
    """(S, L, H) to (S, L): mean over the heads that have a number; NaN where none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing, which is NaN as it should be
        return np.asarray(np.nanmean(entropy, axis=2), dtype=np.float64)


def _mark_band(bar: Colorbar, largest: float) -> None:
    """A bracket along the colour bar, from 0.9 of the largest entropy to its end."""
    low, left = OVERLOAD_SHARE * largest, -0.35
    bar.ax.plot([left + 0.2, left, left, left + 0.2], [low, low, largest, largest], color=drawing.TEXT, clip_on=False)
    bar.ax.text(left - 0.25, largest, "overload", rotation=90, ha="right", va="top", fontsize=8)
