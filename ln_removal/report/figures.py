"""The report's charts as inline SVG: which series they show, on which axes, with which caption.

Their colours come from the page's style sheet, so they can be read in light mode, in dark mode and in print. Coordinates
are pixels of a chart's viewBox; x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from ln_removal.evaluation.results import ROLES, TITLES, ResidualStd
from ln_removal.report.run_record import Curve, FrozenConstant, RunRecord

if TYPE_CHECKING:
    from ln_removal.evaluation.results import Results

Point = tuple[float, float]
Scale = Callable[[float], float]

WIDE, NARROW = 760, 350
"""Widths in pixels, for a page and for a phone. Text has the same size in both."""

TRACK_HEIGHT = 15
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40

TRACK_NAMES = {"ln_2": "ln_2", "ln_1_qk": "qk", "ln_1_v": "v", "ln_f": "ln_f", "special": "special", "cap": "cap"}


@dataclass(frozen=True)
class Series:
    """One line of a chart. `role` is a class of the style sheet that sets the colour. A point that is not finite is a gap."""

    name: str
    points: Sequence[Point]
    role: str
    style: Literal["line", "dashed", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Track:
    """A row below the plot with spans of x, such as those in which one kind of site freezes."""

    name: str
    spans: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        description: one sentence for screen readers.
        log_x, log_y: logarithmic axes; points that are not above 0 are left out.
        integers: put ticks of x at whole numbers only.
        y_limit: higher values are drawn at the upper edge.
    """

    series: Sequence[Series]
    x_label: str
    y_label: str
    description: str
    tracks: Sequence[Track] = ()
    log_x: bool = False
    log_y: bool = False
    integers: bool = False
    y_limit: float | None = None


def figure(chart: Chart, caption: str) -> str:
    """A <figure> with a legend, the chart in two widths, and its caption (HTML); empty when there is nothing to draw."""
    drawn = replace(chart, series=[_drawable(chart, series) for series in chart.series])
    if not any(series.points for series in drawn.series):
        return ""
    return (
        f"<figure>{_legend(chart.series)}"
        f'<div class="wide">{_svg(drawn, WIDE, 330)}</div><div class="narrow">{_svg(drawn, NARROW, 280)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def robust_limit(values: Sequence[float]) -> float | None:
    """An upper limit for an axis when a few values are far above all others; None when there are no such values."""
    found = sorted(value for value in values if math.isfinite(value))
    if len(found) < 20:
        return None
    low, high = found[0], found[int(0.98 * (len(found) - 1))]
    limit = high + 0.6 * (high - low)
    return limit if found[-1] > limit else None


def _drawable(chart: Chart, series: Series) -> Series:
    """The series with only those points that the axes can show; points that are not finite stay, as gaps."""
    kept = [
        (x, y)
        for x, y in series.points
        if math.isfinite(x) and (x > 0 or not chart.log_x) and not (math.isfinite(y) and y <= 0 and chart.log_y)
    ]
    return replace(series, points=kept if any(math.isfinite(y) for _, y in kept) else [])


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        '<span class="key"><svg width="26" height="10" aria-hidden="true">'
        + (
            f'<circle class="dot {one.role}" cx="13" cy="5" r="3.5"/>'
            if one.style == "dots"
            else f'<line class="{one.style} {one.role}" x1="1" y1="5" x2="25" y2="5"/>'
        )
        + f"</svg>{escape(one.name)}</span>"
        for one in series
        if one.name
    )
    return f'<div class="legend">{items}</div>'


def _svg(chart: Chart, width: int, height: int) -> str:
    points = [point for series in chart.series for point in series.points if math.isfinite(point[1])]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    xs += [edge for track in chart.tracks for span in track.spans for edge in span]
    if chart.y_limit is not None:
        ys = [min(y, chart.y_limit) for y in ys]
    plot_bottom = height - BOTTOM
    left = LEFT if width == WIDE else LEFT - 8
    x_of, x_ticks = _axis(min(xs), max(xs), left, width - RIGHT, log=chart.log_x, many=width == WIDE, pad=False)
    y_of, y_ticks = _axis(min(ys), max(ys), plot_bottom, TOP, log=chart.log_y, many=True, pad=True)
    if chart.integers:
        x_ticks = sorted({round(tick) for tick in x_ticks if abs(tick - round(tick)) < 1e-9})
    total = height + len(chart.tracks) * TRACK_HEIGHT + (12 if chart.tracks else 0)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {total}" role="img" aria-label="{escape(chart.description)}">'
        f"<title>{escape(chart.description)}</title>"
    ]
    if spans := [span for track in chart.tracks for span in track.spans]:
        first, last = x_of(min(low for low, _ in spans)), x_of(max(high for _, high in spans))
        parts.append(
            f'<rect class="band" x="{first:.1f}" y="{TOP}" width="{last - first:.1f}" height="{plot_bottom - TOP}"/>'
        )
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{plot_bottom}" y2="{plot_bottom + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{plot_bottom + 17}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(
        f'<path class="axis" fill="none" d="M{left} {TOP}V{plot_bottom}H{width - RIGHT}"/>'
        f'<text class="label" x="{(left + width - RIGHT) / 2:.0f}" y="{plot_bottom + 34}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
        f'<text class="label" transform="translate(13 {(TOP + plot_bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>"
    )
    for series in chart.series:
        parts.append(_drawn(series, x_of, y_of, chart.y_limit))
    for number, track in enumerate(chart.tracks):
        parts.append(_track(track, x_of, height + 8 + number * TRACK_HEIGHT, left, width - RIGHT))
    return "".join(parts) + "</svg>"


def _drawn(series: Series, x_of: Scale, y_of: Scale, limit: float | None) -> str:
    def place(point: Point) -> tuple[str, str]:
        x, y = point
        return f"{x_of(x):.1f}", f"{y_of(y if limit is None else min(y, limit)):.1f}"

    if series.style == "dots":
        return "".join(
            '<circle class="dot {}" cx="{}" cy="{}" r="3.5"><title>{}: {:.4f} at {:g}</title></circle>'.format(
                series.role, *place(point), escape(series.name), point[1], point[0]
            )
            for point in series.points
            if math.isfinite(point[1])
        )
    lines = [list(part) for finite, part in groupby(series.points, lambda p: math.isfinite(p[1])) if finite]
    return "".join(
        f'<polyline class="{series.style} {series.role}" points="{" ".join(",".join(place(p)) for p in line)}"/>'
        for line in lines
    )


def _track(track: Track, x_of: Scale, y: int, left: int, right: int) -> str:
    bars = "".join(
        f'<rect class="span" x="{x_of(first):.1f}" y="{y + 3}" width="{max(2.0, x_of(last) - x_of(first)):.1f}" '
        f'height="{TRACK_HEIGHT - 6}"/>'
        for first, last in track.spans
    )
    return (
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y + TRACK_HEIGHT / 2}" y2="{y + TRACK_HEIGHT / 2}"/>{bars}'
        f'<text class="tick" x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(track.name)}</text>'
    )


def _axis(
    low: float, high: float, start: float, end: float, *, log: bool, many: bool, pad: bool
) -> tuple[Scale, list[float]]:
    """A scale from values to pixels, and the values of its ticks."""
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    a, b = (math.log10(low), math.log10(high)) if log else (low, high)
    if pad:
        a, b = a - 0.04 * (b - a), b + 0.04 * (b - a)

    def scale(value: float) -> float:
        return start + (end - start) * ((math.log10(value) if log else value) - a) / (b - a)

    if log:
        steps = (1, 2, 5) if b - a < 3 and many else (1,)
        ticks = [m * 10.0**e for e in range(math.floor(a), math.ceil(b) + 1) for m in steps]
        return scale, [tick for tick in ticks if a - 1e-9 <= math.log10(tick) <= b + 1e-9]
    return scale, _linear_ticks(a, b, 7 if many else 5)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers in [low, high]."""
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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
