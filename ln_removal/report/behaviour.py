"""Tables and bars of calibration, document starts, copying and tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ln_removal.interpret.behaviour import BINS, Behaviour
from ln_removal.interpret.models import TITLES
from ln_removal.interpret.passes import ByModel
from ln_removal.interpret.tasks import TASKS
from ln_removal.report import plots
from ln_removal.report.side_by_side import COLOURS, fixed, grouped_bars, header
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

BOS = {False: "without BOS", True: "with BOS"}


def behaviour_tables(found: ByModel[Behaviour], left_out: Sequence[str] = ()) -> list[Table]:
    """Calibration and losses, and the tasks, each without and with BOS, a column a model.

    Args:
        left_out: tasks without a prompt for the tokenizer, which are named below the table.
    """
    seed, models = found.documents.seed, list(found.results.values())
    rows = [
        [f"calibration error, {title}", *(fixed(one.calibration(bos, seed=seed), 4) for one in models)]
        for bos, title in BOS.items()
    ]
    for kind in models[0].kinds:
        rows += [
            [f"{kind}, {title}: loss (nats)", *(fixed(one.loss(kind, bos, seed=seed), 3) for one in models)]
            for bos, title in BOS.items()
        ]
    count, length = found.documents.tokens.shape
    prompts = "; ".join(f"{len(some)} ({kind})" for kind, some in models[0].scored.items())
    notes = [
        f"calibration: {BINS} bins, {count} {found.documents.unit} of {length} tokens ({found.documents.corpus})",
        f"prompts: {prompts}. 95 % intervals over documents or prompts",
    ]
    tables = [text_table("calibration, document starts and copying", header(found.results), rows, notes)]
    rows = []
    for task in models[0].tasks:
        for bos, title in BOS.items():
            rows.append(
                [f"{task}, {title}: right (%)", *(f"{100 * one.accuracy(task, bos).value:.1f}" for one in models)]
            )
            cells = [fixed(one.logit_difference(task, bos, seed=seed), 2) for one in models]
            rows.append(["  logit difference", *cells])
    if rows:
        asked = "; ".join(f"{task}: {_title(task)}" for task in models[0].tasks)
        notes = [asked, f"{_prompts(models[0])} prompts each; right: the right answer has the higher logit of two"]
        if left_out:
            notes.append(f"no prompts for this tokenizer: {', '.join(left_out)}")
        tables.append(text_table("tasks", header(found.results), rows, notes))
    return tables


def behaviour_charts(found: ByModel[Behaviour]) -> dict[str, Callable[[], Figure]]:
    """Reliability diagrams, bars of losses, and bars of the tasks' accuracies and logit differences."""
    charts: dict[str, Callable[[], Figure]] = {"behaviour-calibration": lambda: reliability_lines(found)}
    if next(iter(found.results.values())).kinds:
        charts["behaviour-loss"] = lambda: loss_bars(found)
    if next(iter(found.results.values())).tasks:
        charts["behaviour-accuracy"] = partial(task_bars, found, "accuracy")
        charts["behaviour-logit-difference"] = partial(task_bars, found, "logit difference")
    return charts


def reliability_lines(found: ByModel[Behaviour]) -> Figure:
    """Accuracy against confidence in each bin, a line a model; without and with BOS."""
    figure, axes = plots.panels(list(BOS.values()), (2.7, 2.6), share=True)
    for panel, bos in zip(axes, BOS, strict=True):
        panel.axline((0, 0), slope=1, color=plots.RULE, linewidth=0.8, zorder=1)
        for role, one in found.results.items():
            confidence, accuracy, _ = one.reliability(bos)
            error = one.calibration(bos, seed=found.documents.seed).value
            label = f"{TITLES[role]}: {error:.4f}"
            panel.plot(confidence, accuracy, color=COLOURS[role], marker="o", markersize=3, label=label)
        panel.legend(frameon=False, fontsize=7.5, title="calibration error", title_fontsize=7.5)
        panel.set_aspect("equal", adjustable="box")
    axes[0].set_xlim(0, 1)
    axes[0].set_ylim(0, 1)
    plots.label_edges(axes, "probability of the likeliest token", "how often it is right")
    plots.note(figure, f"{BINS} bins of the probability. On the line, a model is calibrated.")
    return figure


def loss_bars(found: ByModel[Behaviour]) -> Figure:
    """Loss of document starts and of second copies, without and with BOS, a bar a model, with 95 % intervals."""
    models = found.results
    kinds = next(iter(models.values())).kinds
    figure, (panel,) = plots.panels(["loss of prompts"], (2.0 * len(kinds) + 0.6, 2.5), share=False)
    groups = [(kind, bos) for kind in kinds for bos in BOS]
    seed = found.documents.seed
    values = {role: [one.loss(kind, bos, seed=seed) for kind, bos in groups] for role, one in models.items()}
    grouped_bars(panel, values, [f"{kind.replace(', ', chr(10))}\n{BOS[bos]}" for kind, bos in groups])
    panel.set_ylabel("loss (nats)")
    panel.legend(frameon=False, fontsize=8)
    panel.tick_params(axis="x", labelsize=7.5)
    plots.note(
        figure,
        "The same tokens are scored without and with the end-of-text token (BOS) in front. 95 % intervals over prompts.",
    )
    return figure


def task_bars(found: ByModel[Behaviour], quantity: str) -> Figure:
    """Accuracy, or mean logit difference, of each task, a bar a model; without and with BOS."""
    tasks = next(iter(found.results.values())).tasks
    figure, axes = plots.panels(list(BOS.values()), (max(2.4, 0.62 * len(tasks) + 0.6), 2.3), share=True)
    seed = found.documents.seed
    for panel, bos in zip(axes, BOS, strict=True):
        values = {}
        for role, one in found.results.items():
            measure = one.accuracy if quantity == "accuracy" else one.logit_difference
            values[role] = [measure(task, bos, seed=seed) for task in tasks]
        grouped_bars(panel, values, tasks)
        panel.tick_params(axis="x", labelsize=7.5)
    if quantity == "accuracy":
        axes[0].set_ylim(0, 1)
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0].set_ylabel("share answered rightly" if quantity == "accuracy" else "logit difference (logits)")
    words = (
        "The right answer has the higher logit of two."
        if quantity == "accuracy"
        else "Logit of the right minus the wrong answer."
    )
    plots.note(
        figure, f"{words} {_prompts(next(iter(found.results.values())))} prompts a task; 95 % intervals over prompts."
    )
    return figure


def _title(task: str) -> str:
    return TASKS[task][0] if task in TASKS else "the user's own prompts"


def _prompts(one: Behaviour) -> str:
    """How many prompts the tasks have: "32", or "15 to 32"."""
    counts = sorted({len(some) for some in one.differences.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
