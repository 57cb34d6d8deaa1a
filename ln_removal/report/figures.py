"""The report's figures: which series, on which axes, with which words below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ln_removal.evaluation.data_scores import ROLES, TITLES, ResidualStd
from ln_removal.report.charts import Chart, Series, Track, figure, robust_limit
from ln_removal.report.run_record import Curve, FrozenConstant, RunRecord

if TYPE_CHECKING:
    from ln_removal.evaluation.results import Results

TRACK_NAMES = {"ln_2": "ln_2", "ln_1_qk": "qk", "ln_1_v": "v", "ln_f": "ln_f", "special": "special"}


def loss_figure(record: RunRecord) -> str:
    """Training loss and held-out evaluations of removal and control, with the freezes below."""
    series: list[Series] = []
    for role, curve in (("control", record.control), ("ln_free", record.removal)):
        title = TITLES[role]
        if curve.steps:
            series.append(Series("", list(zip(curve.steps, curve.losses, strict=True)), role, "faint"))
            series.append(Series(f"{title}, training", smoothed(curve), role))
        if curve.evaluations:
            series.append(Series(f"{title}, held out", curve.evaluations, role, "dots"))
    if not series:
        return ""
    limit = robust_limit([y for one in series for _, y in one.points])
    tracks = [Track(TRACK_NAMES.get(kind, kind), spans) for kind, spans in record.removal.freezes.items()]
    caption = "Cross-entropy while training: thin, every step; thick, a running mean; dots, on held-out tokens."
    if tracks:
        caption += (
            " Bars below: when each site moves from LayerNorm to its constant (<code>ln_2</code>; <code>ln_1</code> as read by "
            "queries and keys, and by values; <code>ln_f</code>), and when the constants of the special positions are dropped."
            " Shaded: from the first change to the last."
        )
    if limit is not None:
        caption += f" Losses above {limit:.3g} are drawn at the upper edge."
    description = "Cross-entropy by optimizer step, of the removal and of the control, with the steps of the freezes"
    return figure(
        Chart(
            series,
            "optimizer step",
            "nats per token",
            description,
            tracks=tracks,
            integers=True,
            y_limit=limit,
        ),
        caption,
    )


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """A running mean over a fortieth of the run, of the losses that are finite."""
    width = max(1, len(curve.steps) // 40)
    points = []
    for place, step in enumerate(curve.steps):
        near = [loss for loss in curve.losses[max(0, place - width) : place + width + 1] if math.isfinite(loss)]
        points.append((float(step), sum(near) / len(near) if near else math.nan))
    return points


def position_figure(results: Results) -> str:
    """Loss by position in the context, of each model, one figure a data set."""
    figures = []
    for data in results.by_data:
        series = [
            Series(
                TITLES[role],
                [(math.sqrt((one.first + 1) * (one.last + 1)), one.loss) for one in bins],
                role,
            )
            for role in ROLES
            if (bins := getattr(data.by_position, role))
        ]
        from html import escape

        caption = f"{escape(data.data)}: mean loss of the token after so many tokens of context."
        chart = Chart(series, "tokens of context", "nats per token", "Loss by position in the context", log_x=True)
        figures.append(figure(chart, caption) if series else "")
    return "".join(figures)


def residual_figure(results: Results) -> str:
    """Standard deviation of the residual stream through the layers, before and after."""
    series: list[Series] = []
    for role in ROLES:
        found: ResidualStd | None = getattr(results.residual_std, role)
        if found is None:
            continue
        for style, name, before, middle in (
            ("line", TITLES[role], found.ordinary_pre, found.ordinary_mid),
            ("dashed", f"{TITLES[role]}, position 0", found.first_pre, found.first_mid),
        ):
            points = [(float(layer), value) for layer, value in enumerate(before)]
            points += [(layer + 0.5, value) for layer, value in enumerate(middle)]
            series.append(Series(name, sorted(points), role, "dashed" if style == "dashed" else "line"))
    if not series:
        return ""
    tokens = next(found.tokens for role in ROLES if (found := getattr(results.residual_std, role)) is not None)
    chart = Chart(
        series,
        "layers read (half: between attention and MLP)",
        "standard deviation",
        "Standard deviation of the residual stream by layer, of each model, at ordinary positions and at position 0",
        log_y=True,
        integers=True,
    )
    return figure(
        chart,
        f"Standard deviation of the residual stream over its width, mean over positions of {tokens:,} held-out tokens. "
        "LayerNorm divided by it; after the removal a constant stands in its place.",
    )


def constants_figure(constants: Sequence[FrozenConstant]) -> str:
    """The frozen constants by layer, with what position 0 had before its own constant was dropped."""
    kinds = {
        "ln_2": ("ln_2", "mlp"),
        "ln_1_qk": ("ln_1, queries and keys", "qk"),
        "ln_1_v": ("ln_1, values", "v"),
    }
    series: list[Series] = []
    for kind, (name, role) in kinds.items():
        rows = [(float(c.site.partition(".")[2]), c) for c in constants if c.site.startswith(kind + ".")]
        if rows:
            series.append(Series(name, [(layer, c.ordinary) for layer, c in rows], role))
            series.append(Series(f"{name}, position 0", [(layer, c.first) for layer, c in rows], role, "dashed"))
    if not series:
        return ""
    final = next((c for c in constants if c.site == "ln_f"), None)
    caption = (
        "What each site divides by: its running standard deviation at the moment it froze. Dashed: what position 0 had of "
        "its own until that was dropped. Queries and keys, and values, of a layer read the same norm, so their lines "
        "nearly coincide."
    )
    if final is not None:
        caption += f" <code>ln_f</code>: {final.ordinary:.4g}."
    chart = Chart(series, "layer", "constant", "Frozen constants by layer and kind of site", log_y=True, integers=True)
    return figure(chart, caption)
