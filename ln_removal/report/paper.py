"""The table of the published comparison: for the terminal, as bars, and as paper.html, a page that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret.models import TITLES
from ln_removal.interpret.paper import ENTROPY_NEURON, Paper, Row
from ln_removal.report import plots
from ln_removal.report.behaviour import loss_bars, reliability_lines
from ln_removal.report.exact_analyses import effects_scatter, number
from ln_removal.report.heads import score_heatmaps
from ln_removal.report.neurons import entropy_scatter
from ln_removal.report.page import template
from ln_removal.report.patching import estimates_scatter
from ln_removal.report.run_record import BARONI, SOURCES
from ln_removal.report.side_by_side import COLOURS, header, text_note
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

UNITS = {"per cent": "%", "nats": "nats"}

CAPTIONS = {
    "paper": "The table as bars. Lines are 95 % intervals, diamonds the published values.",
    "paper-dla-centred": "Direct effects of components, attributed and ablated.",
    "paper-patching-scatter": "Attribution patching against patched runs.",
    "paper-attention-sink-rate": "The sink rate of every head.",
    "paper-calibration": "Calibration.",
    "paper-loss": "Loss at document starts and of second copies.",
    "paper-neurons-entropy": "Neurons of the last block: what goes through the final norm.",
}
"""The figures, in the order of the page."""


def paper_tables(found: Paper) -> list[Table]:
    """The table, a column a model, and the published values in the last; what is compared stands below."""
    rows = found.rows()
    lines = [
        [_title(row), *(" ".join(filter(None, cell_parts(row.values[role], row.digits))) for role in found.roles), published_cell(row)]
        for row in rows
    ]  # fmt: skip
    notes = [*_notes(found), *(sentence for row in rows if (sentence := comparison(row)))]
    return [text_table("the published comparison", [*header(found.roles), "paper: O / C / L"], lines, notes)]


def paper_charts(found: Paper) -> dict[str, Callable[[], Figure]]:
    """Bars of the table, and the main figure of each analysis."""
    return {
        "paper": lambda: table_bars(found),
        "paper-dla-centred": lambda: effects_scatter(found.direct, "centred"),
        "paper-patching-scatter": lambda: estimates_scatter(found.patching, "atp"),
        "paper-attention-sink-rate": lambda: score_heatmaps(found.attention, "published_sink_rate"),
        "paper-calibration": lambda: reliability_lines(found.behaviour),
        "paper-loss": lambda: loss_bars(found.behaviour),
        "paper-neurons-entropy": lambda: entropy_scatter(found.neurons),
    }


def paper_page(found: Paper, run: str, figures: Sequence[Path]) -> str:
    """The page as HTML, with the figures in it.

    Args:
        run: the run's directory, whose name is the title.
        figures: files whose names are those of `paper_charts`; PNG files are shown.
    """
    drawn = {path.stem: path for path in figures if path.suffix == ".png"}
    paper, url = SOURCES[BARONI]
    rows = found.rows()
    return template("paper.html").render(
        title=f"Inside the models of {Path(run).resolve().name}",
        names={TITLES[role]: found.direct.names.get(role, "") for role in found.roles},
        roles=found.roles,
        titles=TITLES,
        rows=[(row, _title(row), {role: cell_parts(row.values[role], row.digits) for role in found.roles}) for row in rows],
        published_cell=published_cell,
        disagree=[sentence for row in rows if row.agrees is False and (sentence := comparison(row))],
        agree=[sentence for row in rows if row.agrees and (sentence := comparison(row))],
        notes=_notes(found),
        paper=paper,
        source=BARONI,
        url=url,
        figures=[(name, words, _data_address(drawn[name])) for name, words in CAPTIONS.items() if name in drawn],
    )  # fmt: skip


def cell_parts(found: Interval, digits: int) -> tuple[str, str]:
    """A value and its interval; of a value that is rounding only its order of magnitude."""
    if not np.isfinite(found.value):
        return "-", ""
    if abs(found.value) < 0.5 / 10**digits:
        return number(found.value, digits) if found.value else "0", ""
    return f"{found.value:.{digits}f}", f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"


def published_cell(row: Row) -> str:
    """The published values of original, control and LN-free, or the published change."""
    if row.published is None:
        return "-"
    if not row.published.values:
        return row.published.change
    values = row.published.values
    return " / ".join(f"{values[role]:.{row.digits}f}" if role in values else "-" for role in TITLES)


def comparison(row: Row) -> str:
    """A sentence on whether a quantity changes as published; nothing where that is not known."""
    published, change = row.published, row.change
    if published is None or change is None:
        return ""
    first = next(iter(row.values))
    ends = [cell_parts(row.values[role], row.digits)[0] for role in (first, "ln_free")]
    unit = f" {UNITS[row.unit]}" if row.unit else ""
    where = ", ".join(filter(None, [published.model, published.setting]))
    here = f"{_verb(change)} from {ends[0]} to {ends[1]}{unit}"
    there = _verb(published.change)
    if {first, "ln_free"} <= set(published.values):
        there += " from {} to {}".format(*(f"{published.values[role]:g}" for role in (first, "ln_free"))) + unit
    start = "agrees with the paper in the direction" if row.agrees else "disagrees with the paper"
    return f"{row.title[0].upper()}{row.title[1:]}: {start}. Here it {here}. There it {there} ({where})."


def table_bars(found: Paper) -> Figure:
    """A panel for each row of the table with a bar a model, 95 % intervals and the published values."""
    rows = found.rows()
    figure, axes = plots.panels([_title(row) for row in rows], (2.05, 1.75), share=False)
    for panel, row in zip(axes, rows, strict=True):
        for place, role in enumerate(found.roles):
            one = row.values[role]
            if not np.isfinite(one.value):
                continue
            panel.bar(place, one.value, 0.7, color=COLOURS[role])
            ends = np.clip([[one.value - one.low], [one.high - one.value]], 0, None)
            panel.errorbar(place, one.value, yerr=ends, fmt="none", ecolor=plots.TEXT, elinewidth=0.8)
            if row.published is not None and role in row.published.values:
                point = row.published.values[role]
                panel.plot(
                    place,
                    point,
                    "D",
                    color="#ffffff",
                    markeredgecolor=plots.TEXT,
                    markersize=4.5,
                    clip_on=False,
                    zorder=5,
                )
        panel.set_xticks(range(len(found.roles)), [TITLES[role] for role in found.roles])
        panel.tick_params(axis="x", length=0, labelsize=7)
        panel.margins(y=0.12)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y")
        panel.set_axisbelow(True)
    plots.note(figure, f"{CAPTIONS['paper']} These are of {_models(rows)}, so only directions compare.")
    return figure


def _title(row: Row) -> str:
    return f"{row.title} ({UNITS[row.unit]})" if row.unit else row.title


def _models(rows: Sequence[Row]) -> str:
    """The models whose published values are shown."""
    return ", ".join(sorted({row.published.model for row in rows if row.published and row.published.values}))


def _verb(change: str) -> str:
    return "does not clearly change" if change == "no clear change" else change


def _notes(found: Paper) -> list[str]:
    """What was read and compared."""
    task, neurons = found.patching.task, found.neurons.results[found.roles[0]]
    counts = "; ".join(f"{len(some)} ({kind})" for kind, some in found.behaviour.results[found.roles[0]].scored.items())
    chosen = found.entropy_neurons
    if chosen:
        share = f"{len(chosen)} {'has' if len(chosen) == 1 else 'have'}"
        after = "; their choice favours high values there"
    else:
        share, after = "none has", ""
    return [
        f"{text_note(found.direct.documents)} or prompts.",
        f"Attribution patching: {len(task.prompts)} prompts of the task {task.name}. Losses: {counts} prompts.",
        f"Of {len(neurons.ablated)} ablated neurons of the last block, {share} a share above {ENTROPY_NEURON:g} in the first "
        f"model{after}.",
        "A quantity rises or falls if the intervals of the first and the LN-free model do not overlap.",
    ]


def _data_address(path: Path) -> Any:
    return Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"))
