"""Tables and figures of activation and attribution patching: errors, the error budget, effects as heatmaps.

Shape legend: L layers, T positions, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.evaluation.bootstrap import bootstrap_means
from ln_removal.interpret.interventions import HEAD_KINDS, NODE_KINDS, Array, Effects
from ln_removal.interpret.models import TITLES
from ln_removal.interpret.patching import BUDGET, SMALLEST_GAP, Method, Patching, PatchingByModel, mean_of
from ln_removal.report import plots
from ln_removal.report.exact_analyses import number, with_interval
from ln_removal.report.side_by_side import COLOURS
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

METHOD_TITLES: dict[Method, str] = {
    "atp": "attribution patching",
    "atp-star": "AtP* (QK fix)",
    "eap-ig": "integrated gradients",
}

KIND_TITLES = {
    "resid_pre": "residual stream",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "head output z",
    "v": "values",
    "q": "queries",
    "k": "keys",
}

BUDGET_TITLES = {
    "none": "all linearised",
    "norm": "norm real",
    "softmax": "softmax real",
    "activation": "activation real",
    "all": "the model itself",
}

NOTHING = 1e-3
"""An error in per cent below which a bar of the budget is shown as 0; rounding in float32 is smaller."""

POINTS = 3000
"""Most points in a panel of a scatter plot."""


def patching_tables(found: PatchingByModel) -> list[Table]:
    """The task; errors and correlations by kind of node and method; the published statistic; the error budget."""
    models = list(found.found.values())
    header = ["", *(TITLES[role] for role in found.found)]
    tables = [text_table(f"the task: {found.task.title}", header, _task_rows(models, found.seed), [_read(found)])]
    cells = [
        (kind, method) for kind in KIND_TITLES for method in found.methods if _is_shown(kind, method, found.methods)
    ]
    if cells:
        named = [f"{KIND_TITLES[kind]}, {METHOD_TITLES[method]}" for kind, method in cells]
        errors = [[with_interval(one.error(method, kind, seed=found.seed)) for one in models] for kind, method in cells]
        alike = [
            [with_interval(one.correlation(method, kind, seed=found.seed), 3) for one in models]
            for kind, method in cells
        ]
        off = [[_published(one, method, kind) for one in models] for kind, method in cells]
        notes = ["error: mean |estimate - exact| over mean |exact|; 95 % intervals over prompts"]
        tables.append(text_table("error of estimates against patched runs (%)", header, _rows(named, errors), notes))
        tables.append(
            text_table("correlation of estimates and patched runs within a prompt", header, _rows(named, alike), [])
        )
        notes = [f"mean and standard deviation, over prompts whose |clean - corrupt| is above {SMALLEST_GAP}"]
        tables.append(text_table("(estimate - exact) / (clean - corrupt)", header, _rows(named, off), notes))
    if any(one.budget for one in models):
        rows = [[with_interval(one.budget_error(row, seed=found.seed)) for one in models] for row in BUDGET]
        notes = [
            "error (%) of attribution patching at the residual stream, if one nonlinearity is real and the others are replaced "
            "by their tangents at the corrupt run"
        ]
        tables.append(
            text_table("error budget (%)", header, _rows([BUDGET_TITLES[row] for row in BUDGET], rows), notes)
        )
    return tables


def patching_charts(found: PatchingByModel) -> dict[str, Callable[[], Figure]]:
    """Heatmaps of nodes and heads, a scatter plot of estimates, and bars of the error budget."""
    method = found.methods[0] if found.methods else None
    charts: dict[str, Callable[[], Figure]] = {
        f"patching-{kind.replace('_', '-')}": partial(node_heatmaps, found, kind, method) for kind in NODE_KINDS
    }
    charts["patching-heads"] = partial(head_heatmaps, found, method)
    if method is not None:
        charts["patching-scatter"] = partial(estimates_scatter, found, method)
    if any(one.budget for one in found.found.values()):
        charts["patching-budget"] = partial(budget_bars, found)
    return charts


def node_heatmaps(found: PatchingByModel, kind: str, method: Method | None) -> Figure:
    """Mean effects of a kind of node, layers by positions: a row of patched runs and one of estimates, models side by side."""
    index = NODE_KINDS.index(kind)

    def grid(effects: Effects) -> Array:
        values = effects.nodes[..., index]
        return mean_of(values[:, :, _first_shown(found) :])

    figure, axes = _heatmaps(found, method, grid)
    width = found.task.length - _first_shown(found)
    for panel in axes:
        ticks = plots.whole_ticks(width, 8)
        panel.set_xticks([width - 1 - tick for tick in ticks], [str(-tick) for tick in ticks])
    plots.label_edges(axes, "position, counted from the last", "layer")
    plots.note(
        figure,
        f"What patching the {KIND_TITLES[kind]} at one position adds to the logit difference, mean over {len(found.task.prompts)} "
        f"prompts ({found.task.title}), in logits.",
    )
    return figure


def head_heatmaps(found: PatchingByModel, method: Method | None) -> Figure:
    """Mean effects of the heads' outputs, layers by heads."""
    figure, axes = _heatmaps(found, method, lambda effects: mean_of(effects.heads[..., HEAD_KINDS.index("z")]))
    for panel in axes:
        panel.set_xticks(plots.whole_ticks(next(iter(found.found.values())).exact.heads.shape[2], 8))
    plots.label_edges(axes, "head", "layer")
    plots.note(
        figure,
        f"What patching a head's output z at all positions adds to the logit difference, mean over {len(found.task.prompts)} "
        f"prompts ({found.task.title}), in logits.",
    )
    return figure


def estimates_scatter(found: PatchingByModel, method: Method) -> Figure:
    """Estimate against patched run at the residual stream, one point a prompt, layer and position, on the same axes."""
    roles = list(found.found)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.6), share=True)
    random = np.random.default_rng(0)
    drawn = []
    for panel, role in zip(axes, roles, strict=True):
        one = found.found[role]
        points = np.stack([one.exact.of("resid_pre").ravel(), one.estimates[method].of("resid_pre").ravel()])
        points = points[:, np.isfinite(points).all(axis=0) & (points != 0).any(axis=0)]
        some = points[:, random.permutation(points.shape[1])[:POINTS]]
        drawn.append(some)
        panel.plot(*some, ".", color=plots.ACCENT, markersize=3.2, alpha=0.45, markeredgewidth=0)
        panel.axline((0, 0), slope=1, color=plots.RULE, linewidth=0.8, zorder=1)
        error = one.error(method, "resid_pre", seed=found.seed)
        panel.text(0.05, 0.95, f"error {number(error.value)} %", transform=panel.transAxes, va="top", fontsize=8)
        panel.set_aspect("equal", adjustable="box")
    everything = np.concatenate(drawn, axis=1)
    low, high = (float(np.percentile(everything, share)) for share in (0.1, 99.9)) if everything.size else (-1.0, 1.0)
    margin = 0.05 * max(high - low, 1e-9)
    axes[0].set_xlim(low - margin, high + margin)
    axes[0].set_ylim(low - margin, high + margin)
    plots.label_edges(axes, "patched run (logits)", "estimate (logits)")
    plots.note(
        figure,
        f"Effects of the residual stream on the logit difference ({found.task.title}), by {METHOD_TITLES[method]}. On the line, the "
        "estimate is exact.",
    )
    return figure


def budget_bars(found: PatchingByModel) -> Figure:
    """The error with one nonlinearity real, a group of bars for each, a colour for each model, with 95 % intervals."""
    figure, (panel,) = plots.panels(["error budget of attribution patching"], (5.4, 2.7), share=False)
    roles = [role for role, one in found.found.items() if one.budget]
    width = 0.8 / len(roles)
    for number_, role in enumerate(roles):
        errors = [found.found[role].budget_error(row, seed=found.seed) for row in BUDGET]
        places = np.arange(len(BUDGET)) + (number_ - (len(roles) - 1) / 2) * width
        values = np.array([one.value for one in errors])
        ends = np.array([[one.value - one.low, one.high - one.value] for one in errors]).T
        panel.bar(places, values, width * 0.92, color=COLOURS[role], label=TITLES[role])
        panel.errorbar(places, values, yerr=np.clip(ends, 0, None), fmt="none", ecolor=plots.TEXT, elinewidth=0.8)
        for place in places[values < NOTHING]:
            panel.text(place, 0, "0", ha="center", va="bottom", color=COLOURS[role], fontsize=8)
    panel.set_xticks(range(len(BUDGET)), [BUDGET_TITLES[row].replace(" ", "\n", 1) for row in BUDGET])
    panel.tick_params(axis="x", length=0)
    panel.set_ylabel("error (%)")
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    panel.legend(frameon=False, fontsize=8)
    plots.note(
        figure,
        "Error of the estimates at the residual stream if one nonlinearity alone is real and the others are replaced by their "
        f"tangents at the corrupt run ({found.task.title}).",
    )
    return figure


def _heatmaps(
    found: PatchingByModel, method: Method | None, grid: Callable[[Effects], Array]
) -> tuple[Figure, list[Axes]]:
    """Panels of signed effects on one scale around 0: patched runs of each model, then their estimates."""
    from matplotlib import colormaps

    shown = [(f"{TITLES[role]}, patched runs", grid(one.exact)) for role, one in found.found.items()]
    if method is not None:
        title = METHOD_TITLES[method]
        shown += [(f"{TITLES[role]}, {title}", grid(one.estimates[method])) for role, one in found.found.items()]
    rows, columns = shown[0][1].shape
    width, height = plots.cell_size(rows, columns)
    figure, axes = plots.panels([name for name, _ in shown], (max(2.3, width), height), share=False)
    largest = max((float(np.nanmax(np.abs(values))) for _, values in shown if np.isfinite(values).any()), default=1.0)
    for panel, (_, values) in zip(axes, shown, strict=True):
        image = panel.imshow(
            values,
            cmap=colormaps["RdBu_r"].with_extremes(bad=plots.GRID),
            vmin=-largest or -1.0,
            vmax=largest or 1.0,
            interpolation="nearest",
            aspect="auto",
        )
        panel.set_yticks(plots.whole_ticks(rows))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    plots.colour_bar(figure, axes, image, "effect (logits)")
    return figure, axes


def _first_shown(found: PatchingByModel) -> int:
    """The first position at which some model has an effect; before the first token that differs there is none."""
    largest = [np.nanmax(np.abs(one.exact.nodes), axis=(0, 1, 3), initial=0.0) for one in found.found.values()]
    places = np.flatnonzero(np.nan_to_num(np.max(largest, axis=0)) > 0)
    return int(places[0]) if len(places) else 0


def _is_shown(kind: str, method: Method, methods: Sequence[Method]) -> bool:
    """Queries and keys are what AtP* mends; it changes nothing else, so its other rows would repeat those of atp."""
    if kind in ("q", "k"):
        return "atp-star" in methods
    return kind != "v" and (method != "atp-star" or "atp" not in methods)


def _task_rows(models: Sequence[Patching], seed: int) -> list[list[str]]:
    def row(name: str, values: Sequence[Any]) -> list[str]:
        ones = np.ones(len(values[0]))
        return [name, *(with_interval(bootstrap_means(one[None], ones, seed=seed)[0], 2) for one in values)]

    return [
        row("logit difference, clean", [one.clean for one in models]),
        row("logit difference, corrupt", [one.corrupt for one in models]),
        row("right, clean (%)", [100.0 * (one.clean > 0) for one in models]),
        row("right, corrupt (%)", [100.0 * (one.corrupt < 0) for one in models]),
    ]


def _read(found: PatchingByModel) -> str:
    task = found.task
    drawn = "" if task.seed is None else f", seed {task.seed}"
    return f"{len(task.prompts)} prompts ({task.name}{drawn}), {'with' if task.prepend_bos else 'without'} BOS; effects in logits"


def _published(one: Patching, method: Method, kind: str) -> str:
    found = one.published(method, kind)
    return f"{found.mean:+.4f} ± {found.deviation:.4f}" if found.prompts else "-"


def _rows(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[name, *row] for name, row in zip(names, cells, strict=True)]
