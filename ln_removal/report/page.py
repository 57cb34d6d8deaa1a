"""report.html: one page about a run that opens anywhere, without a network and without scripts.

The page is the template page.html. Jinja escapes every text that comes from a run (recipe, corpus, model names, samples),
and the page's content security policy forbids scripts and requests besides.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ln_removal.config.recipe import dump_toml
from ln_removal.errors import UserError
from ln_removal.evaluation.results import TITLES
from ln_removal.files.metrics_log import METRICS_FILE
from ln_removal.report.figures import constants_figure, loss_figure, position_figure, residual_figure
from ln_removal.report.run_record import (
    ACCURACIES,
    LOSS_NOTE,
    LOSSES,
    SOURCES,
    RunRecord,
    incident_lines,
    read_run,
)
from ln_removal.report.tables import (
    PROMPTS_TITLE,
    VISIBLE,
    Score,
    kind_label,
    prompt_notes,
    prompt_table,
    score_rows,
    shown_roles,
)

REPORT_FILE = "report.html"

PAPER_PAGE = "analysis/paper.html"
"""What `ln-analyze paper RUN` writes into a run's directory; the report links it."""

_LABELS: dict[Score, str] = {
    "cross_entropy": "cross-entropy, nats per token",
    "difference": "minus the control",
    "median": "median token",
    "percentile_95": "95 % of tokens below",
    "percentile_99_9": "99.9 % of tokens below",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy, %",
    "top_1": "next token right, %",
    "calibration": "calibration error",
    "entropy": "entropy of the prediction, nats",
}

_VISIBLE_SPACE = {0x20: "\u2423", 0x09: "\u21e5", 0x0A: "\u21b5\n"}


def write_report(run: Path | str) -> Path:
    """Write `report.html` into a run's directory, whole or not at all, and return its path.

    Args:
        run: the directory of a run. It needs results.json; anything else that is missing is left out of the page.

    Raises:
        UserError: there is no such run, its results cannot be read, or the page cannot be written.
    """
    record = read_run(run)
    return write_page(record.directory / REPORT_FILE, render_page(record))


def write_page(path: Path, html: str) -> Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(html, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or check the rights"
        ) from error
    return path


def render_page(record: RunRecord) -> str:
    """The whole page as HTML."""
    results, recipe = record.results, record.recipe
    differences = results.by_data[0].differences if results.by_data else ()
    return template("page.html").render(
        title=f"LayerNorm removal: {recipe.name if recipe else record.directory.resolve().name}",
        model=recipe.model if recipe else results.models.original,
        record=record,
        results=results,
        settings=results.settings,
        roles=shown_roles(results),
        titles=TITLES,
        rows=score_rows(results, _LABELS),
        prompts_title=PROMPTS_TITLE,
        prompt_table=prompt_table(results),
        prompt_notes=prompt_notes(results),
        gap_interval=next((one for one in differences if (one.model, one.than) == ("ln_free", "control")), None),
        figures={
            "Training": Markup(loss_figure(record)),
            "Loss by position": Markup(position_figure(results)),
            "Residual stream": Markup(residual_figure(results)),
        },
        constants_figure=Markup(constants_figure(record.constants)),
        losses=LOSSES,
        loss_note=LOSS_NOTE,
        accuracies=ACCURACIES,
        sources=SOURCES,
        facts=_facts(record),
        incidents=incident_lines(record.directory / METRICS_FILE),
        recipe_toml=dump_toml(recipe).strip() if recipe else "",
        paper=PAPER_PAGE if (record.directory / PAPER_PAGE).is_file() else None,
    )


@cache
def template(name: str) -> Template:
    """A template of this directory, in which every expression is escaped, and control characters become symbols."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(number=_number, spaces=_visible_spaces, kind=kind_label)
    return environment.get_template(name)


def _visible(value: Any) -> Any:
    """A text whose control characters are symbols; HTML of our own and numbers are left as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return value.translate(VISIBLE).encode("utf-8", errors="replace").decode("utf-8")


def _visible_spaces(value: str) -> str:
    """A text whose white space is symbols too."""
    return value.translate(VISIBLE | _VISIBLE_SPACE)


def _number(value: float | None, form: str) -> str:
    """A number as `form` says, or a dash where there is none."""
    return "\u2013" if value is None else format(value, form)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was trained, for how long, and with which versions: names and values."""
    results, recipe, training = record.results, record.recipe, record.training
    facts: list[tuple[str, str]] = []
    if recipe is not None:
        facts.append(("trained on", f"{recipe.tokens:,} tokens of {recipe.data.corpus}"))
        facts.append(("steps", f"{recipe.training.steps:,} of {recipe.training.tokens_per_step:,} tokens"))
    if isinstance(seconds := training.get("seconds"), int | float):
        facts.append(("training", f"{seconds:,.0f} s"))
    if isinstance(speed := training.get("tokens_per_second"), int | float):
        facts.append(("speed", f"{speed:,.0f} tokens/s"))
    if isinstance(skipped := training.get("skipped_steps"), int):
        facts.append(("steps skipped, not finite", f"{skipped}"))
    facts.append(("results written after", f"{results.seconds:,.0f} s"))
    facts += [(TITLES[role], name) for role, name in results.models.known().items()]
    return facts + sorted(results.versions.items())
