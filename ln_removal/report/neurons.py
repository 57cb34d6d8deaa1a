"""Tables and scatter plots of the neurons of the last block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.interpret.models import TITLES
from ln_removal.interpret.neurons import NeuronEffects
from ln_removal.interpret.passes import ByModel
from ln_removal.report import plots
from ln_removal.report.side_by_side import fixed, header, text_note
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHOWN = 8
"""Neurons in the table."""


def neuron_tables(found: ByModel[NeuronEffects]) -> list[Table]:
    """The neurons in sum, and those of the first model whose change of the entropy goes most through the norm."""
    seed, models = found.documents.seed, list(found.results.values())
    first = models[0]
    rows = [
        ["neurons", *(f"{len(one.norm):,}" for one in models)],
        ["median |w_out|", *(f"{np.median(one.norm):.2f}" for one in models)],
        ["median variance of cosines", *(f"{np.median(one.variance):.5f}" for one in models)],
        ["smallest variance", *(f"{one.variance.min():.5f} (neuron {one.variance.argmin()})" for one in models)],
        ["mean |dH|, ablated neurons (nats)", *(f"{one.effect.mean():.4f}" for one in models)],
        ["share mediated by the norm, ablated neurons", *(fixed(one.overall_mediated(seed=seed), 3) for one in models)],
        ["  of them above one half", *(str(int((np.nan_to_num(one.mediated) > 0.5).sum())) for one in models)],
    ]
    notes = [
        text_note(found.documents),
        f"{len(first.ablated)} neurons of the last block, ablated one at a time by their mean; unless these are all, half were chosen "
        "because they act through the norm of the first model",
        "share: 1 - mean |dH, sigma frozen| / mean |dH|; 0 without norms",
    ]
    through = np.abs(first.entropy_total).mean(axis=(1, 2)) - np.abs(first.entropy_frozen).mean(axis=(1, 2))
    order = np.argsort(-through if through.any() else -first.effect)[:SHOWN]
    listed = []
    for index in order.tolist():
        cells = [f"{one.effect[index]:.4f}, {fixed(one.mediated_interval(index, seed=seed), 2)}" for one in models]
        listed.append([str(first.ablated[index]), *cells])
    return [
        text_table("entropy neurons", header(found.results), rows, notes),
        text_table(
            "ablated neurons: mean |dH| (nats), share mediated by the norm",
            header(found.results, "neuron"),
            listed,
            ["The neurons of the first model whose |dH| shrinks most when sigma is frozen."],
        ),
    ]


def neuron_charts(found: ByModel[NeuronEffects]) -> dict[str, Callable[[], Figure]]:
    """Norm against variance of all neurons, and total against frozen change of the entropy of the ablated ones."""
    return {"neurons-weights": lambda: weights_scatter(found), "neurons-entropy": lambda: entropy_scatter(found)}


def weights_scatter(found: ByModel[NeuronEffects]) -> Figure:
    """|w_out| against the variance of the cosines, one point a neuron; ablated ones are coloured by mean |dH|."""
    roles = list(found.results)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.5), share=True)
    largest = max(float(found.results[role].effect.max()) for role in roles)
    for panel, role in zip(axes, roles, strict=True):
        one = found.results[role]
        panel.plot(one.norm, one.variance, ".", color=plots.RULE, markersize=3, markeredgewidth=0)
        order = np.argsort(one.effect)
        chosen = one.ablated[order]
        points = panel.scatter(
            one.norm[chosen], one.variance[chosen], c=one.effect[order], s=11, cmap=plots.colour_map(), vmin=0,
            vmax=largest or 1.0, linewidths=0, zorder=3,
        )  # fmt: skip
    axes[0].set_yscale("log")
    plots.label_edges(axes, "|w_out|", "variance of cos(w_out, W[:, v])")
    plots.colour_bar(figure, axes, points, "mean |dH| (nats)")
    plots.note(
        figure,
        "Neurons of the last block; grey ones were not ablated. Entropy neurons lie at the lower right: they write much, but "
        "move all logits alike.",
    )
    return figure


def entropy_scatter(found: ByModel[NeuronEffects]) -> Figure:
    """Mean |dH| of each ablated neuron, with sigma frozen against total, one panel a model, on the same axes."""
    roles = list(found.results)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.6), share=True)
    reach = 0.0
    for panel, role in zip(axes, roles, strict=True):
        one = found.results[role]
        frozen = np.abs(one.entropy_frozen).mean(axis=(1, 2))
        reach = max(reach, float(one.effect.max()), float(frozen.max()))
        panel.axline((0, 0), slope=1, color=plots.RULE, linewidth=0.8, zorder=1)
        panel.plot(one.effect, frozen, "o", color=plots.ACCENT, markersize=3, alpha=0.6, markeredgewidth=0)
        for index in np.argsort(-np.abs(one.effect - frozen))[:3].tolist():
            if abs(one.effect[index] - frozen[index]) > 0.02 * (reach or 1.0):
                panel.annotate(
                    str(one.ablated[index]), (one.effect[index], frozen[index]), xytext=(3, -7),
                    textcoords="offset points", fontsize=7, color=plots.SOFT,
                )  # fmt: skip
        panel.set_aspect("equal", adjustable="box")
    axes[0].set_xlim(0, 1.08 * reach or 1.0)
    axes[0].set_ylim(0, 1.08 * reach or 1.0)
    plots.label_edges(axes, "mean |dH| (nats)", "mean |dH|, sigma frozen (nats)")
    plots.note(
        figure,
        "Change of the entropy of the prediction when a neuron of the last block is set to its mean. Below the line, a part of "
        "it goes through the final norm. Without norms both are the same.",
    )
    return figure
