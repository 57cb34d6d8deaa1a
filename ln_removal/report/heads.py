"""Tables and heatmaps of what attention heads look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.interpret.heads import SCORES, SINK_THRESHOLD, TRIVIAL_QUERIES, UNITS, HeadScores, Score
from ln_removal.interpret.passes import ByModel
from ln_removal.report.side_by_side import fixed, header, heatmaps, scaled, text_note
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TITLES: dict[Score, str] = {
    "published_sink_rate": "sink rate, all queries (%)",
    "later_sink_rate": f"sink rate, without queries 0 to {TRIVIAL_QUERIES - 1} (%)",
    "sink_heads": f"heads with mean attention on position 0 above {SINK_THRESHOLD:g} (%)",
    "entropy": "entropy (nats)",
    "previous": "previous token",
    "duplicate": "duplicate token",
    "induction": "induction",
}

WORDS: dict[Score, str] = {
    "published_sink_rate": f"Share of queries with more than {SINK_THRESHOLD:g} of their attention on position 0. No query is "
    f"left out; a uniform head passes at queries 0 to {TRIVIAL_QUERIES - 1}.",
    "sink_heads": f"Share of documents in which the head's mean attention on position 0 is above {SINK_THRESHOLD:g}.",
    "entropy": "Mean entropy of a query's attention.",
    "previous": "Mean attention on the token before.",
    "duplicate": "Mean attention on earlier places of the same token, in random tokens that come twice.",
    "induction": "Mean attention on places behind an earlier place of the same token, in random tokens that come twice.",
}

PATTERNS: tuple[Score, ...] = ("previous", "duplicate", "induction")


def head_tables(found: ByModel[HeadScores]) -> list[Table]:
    """Sink rates and entropy over all heads, and the strongest head of each pattern, a column a model."""
    seed, models = found.documents.seed, list(found.results.values())
    rows = []
    for score in SCORES:
        if score in PATTERNS:
            continue
        factor, digits = _scale(score)
        rows.append([TITLES[score], *(fixed(scaled(one.overall(score, seed=seed), factor), digits) for one in models)])
    for score in PATTERNS:
        rows.append(
            [
                f"{TITLES[score]}: mean of all heads",
                *(fixed(one.overall(score, seed=seed), 3) for one in models),
            ]
        )
        cells = []
        for one in models:
            layer, head = one.strongest(score)
            cells.append(f"L{layer}H{head} {fixed(one.at(score, layer, head, seed=seed), 3)}")
        rows.append(["  strongest head", *cells])
    queries = models[0].queries
    passing = 100 * min(TRIVIAL_QUERIES, queries) / queries
    notes = [
        text_note(found.documents),
        f"A head that attends uniformly has a sink rate of {passing:.1f} % over all {queries} queries, and 0 without queries 0 to "
        f"{TRIVIAL_QUERIES - 1}.",
        "Duplicate token and induction: random tokens that come twice; intervals over sequences.",
    ]
    return [text_table("what attention heads look at", header(found.results), rows, notes)]


def head_charts(found: ByModel[HeadScores]) -> dict[str, Callable[[], Figure]]:
    """A heatmap of every score of WORDS, layers by heads, models side by side. One is enough for the sink rates of queries."""
    return {f"attention-{score.replace('_', '-')}": partial(score_heatmaps, found, score) for score in WORDS}


def score_heatmaps(found: ByModel[HeadScores], score: Score) -> Figure:
    """One score of every head, models side by side on one colour scale that begins at 0."""
    factor, _ = _scale(score)
    grids = {role: factor * one.by_head(score) for role, one in found.results.items()}
    largest = max(float(np.nanmax(grid)) for grid in grids.values())
    label = TITLES[score] if score in ("entropy", *PATTERNS) else "%"
    form = ".0f" if factor > 1 else ".2f"
    return heatmaps(grids, label, WORDS[score], low=0, high=largest or 1.0, form=form)


def _scale(score: Score) -> tuple[float, int]:
    """Factor and decimals of the figures that are shown."""
    return (100.0, 1) if UNITS[score] == "per_cent" else (1.0, 3)
