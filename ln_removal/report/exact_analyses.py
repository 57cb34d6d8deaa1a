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
from ln_removal.interpret.circuits import COMPOSITIONS, CircuitsByModel
from ln_removal.interpret.models import TITLES, Documents
from ln_removal.interpret.paths import GROUPS, TOP, PathsByModel
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


def number(value: float, digits: int = 1) -> str:
    """A figure with so many decimals, or with an exponent where these would show nothing of it."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.0e}" if 0 < abs(value) < 0.5 / 10**digits else f"{value:.{digits}f}"


def with_interval(found: Interval, digits: int = 1) -> str:
    """A value and its interval: "39.5 [37.8, 41.2]"."""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def error_cell(found: Interval) -> str:
    """An error with its interval, or its order of magnitude where it is rounding."""
    return with_interval(found) if abs(found.value) >= 0.05 else number(found.value)


def read_text(documents: Documents) -> str:
    """What was read, in a few words, for the note below a table."""
    count, length = documents.tokens.shape
    bos = "with" if documents.prepend_bos else "without"
    return f"{count} {documents.unit} of {length} tokens ({documents.corpus}), {bos} BOS"


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
                [f"{name}: error (%)", *(error_cell(part.error(seed=seed)) for part in parts)],
                ["  wrong sign (%)", *(with_interval(part.sign_flips(seed=seed)) for part in parts)],
                ["  rank correlation", *(with_interval(part.rank_correlation(seed=seed), 3) for part in parts)],
            ]
    notes = [
        f"{read_text(found.documents)}; 95 % intervals over {found.documents.unit}",
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


def paths_tables(found: PathsByModel) -> list[Table]:
    """Mean contributions by number of heads and by source with the errors of ablation; then the largest single paths."""
    seed, roles = found.documents.seed, list(found.sums)
    header = ["", *(TITLES[role] for role in roles)]
    parts = list(found.sums.values())
    orders = [part.by_order(seed=seed) for part in parts]
    groups = [part.by_group(seed=seed) for part in parts]
    rows = []
    for place, order in enumerate(parts[0].orders):
        name = "no head (direct)" if order == 0 else f"{order} head{'s' if order > 1 else ''}"
        rows.append([f"{name}: mean (logits)", *(with_interval(one[place], 2) for one in orders)])
        rows.append(["  error by ablation (%)", *(error_cell(part.error_of_order(order, seed=seed)) for part in parts)])
    rows += [[f"from {group}: mean (logits)", *(with_interval(one[group], 2) for one in groups)] for group in GROUPS]
    rows.append(["largest difference to the logits", *(number(part.sum_error) for part in parts)])
    notes = [
        f"{parts[0].paths:,} paths in {len(parts[0].terms)} terms; contributions to {DIRECTION_TITLES[found.direction]}",
        f"{read_text(found.documents)}; 95 % intervals over {found.documents.unit}",
        "error by ablation: of a term that is taken out of the final residual stream",
    ]
    last = roles[-1]
    named = [{one.name: one for one in part.named} for part in parts]
    single = [
        [
            one.name,
            *(f"{other[one.name].mean:+.2f}" if one.name in other else "-" for other in named),
            f"{one.size:.2f}",
        ]
        for one in found.sums[last].named[:TOP]
    ]
    single_header = [*header, f"mean size, {TITLES[last]}"]
    return [
        text_table("paths from a source through heads to the logit", header, rows, notes),
        text_table(
            f"largest paths with at most 2 heads in the {TITLES[last]} model: mean (logits)", single_header, single
        ),
    ]


def paths_charts(found: PathsByModel) -> dict[str, Callable[[], Figure]]:
    """Bars by number of heads."""
    return {"paths-orders": lambda: path_orders(found)}


def path_orders(found: PathsByModel) -> Figure:
    """Mean contribution by number of heads passed, a bar for each group of sources, one panel a model, on the same axes."""
    roles = list(found.sums)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.6, 2.3), share=True)
    colours = (plots.ALARM, plots.RULE, plots.ACCENT, plots.SOFT)
    width = 0.2
    for panel, role in zip(axes, roles, strict=True):
        table = found.sums[role].by_group_and_order()
        orders = np.array(found.sums[role].orders)
        for place, (group, values) in enumerate(zip(GROUPS, table, strict=True)):
            panel.bar(orders + (place - 1.5) * width, values, width, color=colours[place], label=group)
        panel.axhline(0, color=plots.SOFT, linewidth=0.6)
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        panel.set_xticks(orders)
    axes[-1].legend(frameon=False, fontsize=7.5, title="source", title_fontsize=7.5, loc="upper right")
    plots.label_edges(axes, "heads passed", "mean contribution (logits)")
    plots.note(
        figure,
        f"Contributions to {DIRECTION_TITLES[found.direction]}. All bars and a bias sum to the mean logit. An MLP is a source: "
        "what it read is not taken apart.",
    )
    return figure


def circuits_tables(found: CircuitsByModel, *, most: int = 24) -> list[Table]:
    """The scores of each head with the pair of sources that its pattern depends on most; the strongest compositions."""
    roles = list(found.circuits)
    last = found.circuits[roles[-1]]
    layers, heads = last.copying.shape
    places = sorted(np.ndindex(layers, heads), key=lambda place: -abs(last.copying[place]))[:most]
    rows = []
    for layer, head in sorted(places):
        rows.append([f"L{layer}H{head}: copying, matching", *(_two_scores(found, role, layer, head) for role in roles)])
        if layer > 0:
            with_mlp = [found.circuits[role].mlp_copying[layer, head] for role in roles]
            rows.append(["  copying with MLP 0", *(f"{score:+.2f}" for score in with_mlp)])
        pairs = [found.pairs(role, layer, head, 1)[0] for role in roles]
        rows.append(["  query . key", *(f"{name} {100 * share:.0f} %" for name, share in pairs)])
    header = ["", *(TITLES[role] for role in roles)]
    errors = ", ".join(f"{TITLES[role]} {number(float(found.pattern_errors[role].max()))}" for role in roles)
    notes = [
        "copying: eigenvalues of W_E OV W_U, from -1 to 1; matching: of W_E QK W_E^T",
        "with MLP 0: copying, if the head reads a token from what the first MLP writes for it, not from its embedding",
        "query . key: the pair of sources with the largest share in the variation of the head's scores over keys",
        f"largest difference between a pattern and the softmax of its summed terms: {errors}",
    ]
    tables = [text_table("circuits from weights", header, rows, notes)]
    names = {"Q": "query", "K": "key", "V": "value"}
    strongest = [
        [kind, *(_pair(found, role, kind, rank) for role in roles)] for kind in COMPOSITIONS for rank in range(4)
    ]
    title = f"strongest compositions ({', '.join(f'{kind} {name}' for kind, name in names.items())})"
    raised = [
        [repr(token), *(" ".join(repr(text) for text in found.raised[role][place][1]) for role in roles)]
        for place, (token, _) in enumerate(found.raised[roles[-1]])
    ]
    layer, head = found.head
    name = f"what L{layer}H{head} raises when it looks at a token (the four largest of a row of W_E OV W_U)"
    return [*tables, text_table(title, header, strongest), text_table(name, ["looks at", *header[1:]], raised)]


def circuits_charts(found: CircuitsByModel) -> dict[str, Callable[[], Figure]]:
    """Copying and matching scores, eigenvalues, and compositions."""
    return {
        "circuits-heads": lambda: head_scores(found),
        "circuits-eigenvalues": lambda: eigenvalues(found),
        "circuits-composition": lambda: compositions(found),
    }


def head_scores(found: CircuitsByModel) -> Figure:
    """Copying and matching score of each head, layers by heads, two panels a model, on one scale."""
    roles = list(found.circuits)
    grids = {
        f"{TITLES[role]}: {name}": getattr(found.circuits[role], name)
        for name in ("copying", "matching")
        for role in roles
    }
    first = next(iter(grids.values()))
    figure, axes = plots.panels(list(grids), plots.cell_size(*first.shape), share=False)
    for panel, grid in zip(axes, grids.values(), strict=True):
        image = panel.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        panel.set_xticks(plots.whole_ticks(grid.shape[1]))
        panel.set_yticks(plots.whole_ticks(grid.shape[0]))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_anchor("NW")
    plots.label_edges(axes, "head", "layer")
    plots.colour_bar(figure, axes, image, "score")
    plots.note(
        figure, "Copying: 1 if a head raises the tokens that it looks at. Matching: 1 if a head looks at its own token."
    )
    return figure


def eigenvalues(found: CircuitsByModel) -> Figure:
    """The eigenvalues of every head's W_E OV W_U in the complex plane, each head's divided by its largest, one panel a model."""
    roles = list(found.circuits)
    figure, axes = plots.panels([TITLES[role] for role in roles], (2.4, 2.4), share=True)
    layers = found.circuits[roles[0]].copying.shape[0]
    colours = plots.layer_colours(layers)
    for panel, role in zip(axes, roles, strict=True):
        for layer, of_layer in enumerate(found.circuits[role].ov_eigenvalues):
            values = (of_layer / np.abs(of_layer).max(axis=-1, keepdims=True)).ravel()
            panel.plot(values.real, values.imag, ".", color=colours[layer], markersize=3, markeredgewidth=0, alpha=0.7)
        panel.axhline(0, color=plots.RULE, linewidth=0.6, zorder=0)
        panel.axvline(0, color=plots.RULE, linewidth=0.6, zorder=0)
        panel.set_aspect("equal", adjustable="box")
    axes[0].set_xlim(-1.1, 1.1)
    axes[0].set_ylim(-1.1, 1.1)
    plots.label_edges(axes, "real part", "imaginary part")
    plots.layer_bar(figure, axes, layers)
    plots.note(figure, "Eigenvalues of W_E OV W_U. To the right: tokens that a head looks at become likelier.")
    return figure


def compositions(found: CircuitsByModel) -> Figure:
    """Composition scores of all pairs of heads, later heads by earlier heads, a row of panels a kind, on one scale."""
    roles = list(found.circuits)
    names = {"Q": "queries", "K": "keys", "V": "values"}
    grids = {}
    for kind in COMPOSITIONS:
        for role in roles:
            scores = found.circuits[role].composition[kind]
            count = scores.shape[0] * scores.shape[1]
            grids[f"{TITLES[role]}: {names[kind]}"] = scores.reshape(count, count).T
    largest = max(float(grid.max()) for grid in grids.values())
    figure, axes = plots.panels(list(grids), (2.3, 2.2), share=True)
    layers, heads = found.circuits[roles[0]].copying.shape
    edges = np.arange(layers) * heads
    for panel, grid in zip(axes, grids.values(), strict=True):
        shown = np.ma.masked_equal(grid, 0)
        image = panel.imshow(shown, cmap=plots.colour_map(), vmin=0, vmax=largest, interpolation="nearest")
        ticks = plots.whole_ticks(layers, 8)
        panel.set_xticks(edges[ticks] + (heads - 1) / 2, [str(tick) for tick in ticks])
        panel.set_yticks(edges[ticks] + (heads - 1) / 2, [str(tick) for tick in ticks])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    plots.label_edges(axes, "layer of the earlier head", "layer of the later head")
    plots.colour_bar(figure, axes, image, "composition score")
    plots.note(
        figure,
        f"What the earlier head writes, read by the later head's queries, keys or values; {heads} heads a layer.",
    )
    return figure


def _two_scores(found: CircuitsByModel, role: str, layer: int, head: int) -> str:
    one = found.circuits[role]
    return f"{one.copying[layer, head]:+.2f}, {one.matching[layer, head]:+.2f}"


def _pair(found: CircuitsByModel, role: str, kind: str, rank: int) -> str:
    strongest = found.circuits[role].strongest(kind, rank + 1)  # type: ignore[arg-type]
    return f"{strongest[rank][0]}  {strongest[rank][1]:.2f}" if len(strongest) > rank else "-"
