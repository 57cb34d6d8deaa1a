"""report.html: one page about a run that opens anywhere, without a network and without scripts.

Every text that comes from a run (recipe, corpus, model names, samples, continuations) is escaped, and a content security
policy forbids scripts and requests besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.evaluation.results import ROLES, TITLES, DataScores, Trio
from ln_removal.files.metrics_log import METRICS_FILE
from ln_removal.report.figures import constants_figure, loss_figure, position_figure, residual_figure
from ln_removal.report.run_record import (
    ACCURACIES,
    HEIMERSHEIM,
    LOSS_NOTE,
    LOSSES,
    SOURCES,
    RunRecord,
    incident_lines,
    read_run,
)
from ln_removal.report.style import STYLE

if TYPE_CHECKING:
    from ln_removal.evaluation.results import Results

REPORT_FILE = "report.html"

NOTHING = "&ndash;"

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: "\u2421"}
_VISIBLE_SPACE = {0x20: "\u2423", 0x09: "\u21e5", 0x0A: "\u21b5\n"}


def write_report(run: Path | str) -> Path:
    """Write `report.html` into a run's directory, whole or not at all, and return its path.

    Args:
        run: the directory of a run; results.json must be there, anything else that is missing is left out of the page.

    Raises:
        UserError: there is no such run, its results cannot be read, or the page cannot be written.
    """
    record = read_run(run)
    path = record.directory / REPORT_FILE
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(render_page(record), encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or check the rights"
        ) from error
    return path


def render_page(record: RunRecord) -> str:
    """The whole page as HTML."""
    results = record.results
    name = record.recipe.name if record.recipe else record.directory.resolve().name
    model = record.recipe.model if record.recipe else results.models.original
    title = f"LayerNorm removal: {name}"
    sections = [
        f"<h1>{text(title)}</h1>{_lead(results, model)}{_scores(results)}",
        _section("Training", loss_figure(record)),
        _section("Loss by position", position_figure(results)),
        _section("Residual stream", residual_figure(results)),
        _section("Frozen constants", constants_figure(record.constants) + _constants_table(record)),
        _section("Worst samples", "".join(_worst(data) for data in results.by_data)),
        _section("Odd text", _odd_text(results)),
        _section("Continuations", _continuations(results)),
        _section("Published results", _published(results, model)),
        _section("Recipe and versions", _recipe(record)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def text(value: object, *, spaces: bool = False) -> str:
    """Escaped for HTML; control characters, and with `spaces` white space too, are shown as symbols."""
    shown = str(value).translate(_VISIBLE | _VISIBLE_SPACE if spaces else _VISIBLE)
    return escape(shown.encode("utf-8", errors="replace").decode("utf-8"))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _lead(results: Results, model: str | None) -> str:
    difference = next((d for data in results.by_data[:1] for d in data.differences if d.than == "control"), None)
    what = f"<code>{text(model)}</code>" if model else "The model"
    if results.gap is not None:
        interval = (
            f", 95 % interval {difference.low:+.4f} to {difference.high:+.4f} over {difference.units} {difference.unit}"
            if difference is not None and difference.model == "ln_free"
            else ""
        )
        said = (
            f'{what} without LayerNorm: <strong>gap <span data-figure="gap">{results.gap:+.4f}</span> nats per token'
            f"</strong> to a control that was fine-tuned on the same tokens and kept its LayerNorms{interval}."
        )
    elif results.cross_entropy.ln_free is not None:
        said = f"{what} without LayerNorm; no control was trained, so there is no gap to report."
    else:
        said = f"{what}: scores."
    return f'<p class="lead">{said}</p>'


def _shown(results: Results) -> list[str]:
    return [role for role in ROLES if getattr(results.models, role) is not None]


def _heads(roles: Iterable[str]) -> str:
    return "".join(f'<th scope="col" class="{role}">{TITLES[role]}</th>' for role in roles)


def _scores(results: Results) -> str:
    """The table original / control / LN-free, for each data set, and the notes below it."""
    roles = _shown(results)
    settings = results.settings
    parts = [_headline(results, roles)]
    notes = [
        f"{results.tokens:,} tokens of {text(settings.data)}, context {settings.context:,}{results.stride_note}, "
        f"{settings.precision}, on {text(results.device)}; ± is the standard error over windows."
    ]
    if settings.questions:
        notes.append(
            f"Accuracy is length-normalised, {settings.questions:,} questions of {text(settings.question_set)}, protocol "
            f"{text(settings.protocol)}."
        )
    parts.append(f'<p class="note">{" ".join(notes)}</p>')
    for data in results.by_data:
        if data.differences:
            parts.append(_differences(data, several=len(results.by_data) > 1))
    if len(results.by_data) > 1:
        parts.append(_data_sets(results, roles))
    if not results.by_data:
        again = " --questions completions|hellaswag|FILE" if settings.questions else ""  # or accuracy would be lost
        parts.append(
            '<p class="missing">These results were written by a version that did not measure calibration, loss by '
            f"position, residual stds and worst samples. <code>ln-evaluate RUN{again} --out RUN/results.json</code> and then "
            "<code>ln-report RUN</code> add them.</p>"
        )
    return "".join(parts)


def _headline(results: Results, roles: Sequence[str]) -> str:
    spreads, first = results.loss_spread, results.by_data[0] if results.by_data else None
    rows: list[str] = []

    def row(
        label: str,
        figure: str,
        values: Trio[Any],
        form: str,
        *,
        factor: float = 1,
        part: str = "",
        errors: Trio[Any] | None = None,
        strong: bool = False,
    ) -> None:
        """One figure of every model; `part` is an attribute of `values`, where those are not the figures themselves."""
        found = {role: _part(getattr(values, role), part) for role in roles}
        if all(value is None for value in found.values()):
            return
        cells = []
        for role, value in found.items():
            error = _part(getattr(errors, role, None), "standard_error")
            plus = "" if error is None else f'<span class="pm">± {factor * error:{form}}</span>'
            shown = NOTHING if value is None else f"{factor * value:{form}}"
            cells.append(f'<td data-figure="{figure}" data-role="{role}"><span class="value">{shown}</span>{plus}</td>')
        mark = ' class="strong"' if strong else ""
        rows.append(f"<tr{mark}><th scope='row'>{label}</th>{''.join(cells)}</tr>")

    row("cross-entropy, nats per token", "cross_entropy", results.cross_entropy, ".4f", errors=spreads, strong=True)
    row("minus the control", "difference", _to_control(results), "+.4f")
    row("median token", "median", spreads, ".4f", part="median")
    row("95 % of tokens below", "percentile_95", spreads, ".2f", part="percentile_95")
    row("99.9 % of tokens below", "percentile_99_9", spreads, ".2f", part="percentile_99_9")
    row("bits per byte", "bits_per_byte", results.bits_per_byte, ".4f")
    row(
        "accuracy, %",
        "accuracy",
        results.accuracy,
        ".2f",
        factor=100,
        errors=results.accuracy_standard_error,
    )
    if first is not None:
        calibration = first.calibration
        row("next token right, %", "top_1", calibration, ".2f", factor=100, part="top_1_accuracy")
        row("calibration error", "calibration", calibration, ".4f", part="expected_calibration_error")
        row("entropy of the prediction, nats", "entropy", calibration, ".4f", part="entropy")
    return f'<table id="scores"><thead><tr><th></th>{_heads(roles)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _part(value: Any, name: str) -> float | None:
    """The figure itself, or an attribute of what holds it."""
    found: float | None = getattr(value, name) if name and value is not None and hasattr(value, name) else value
    return found


def _to_control(results: Results) -> Trio[float]:
    control = results.cross_entropy.control
    others = {role: getattr(results.cross_entropy, role) for role in ("original", "ln_free")}
    return Trio[float](**{role: v - control for role, v in others.items() if v is not None and control is not None})


def _differences(data: DataScores, *, several: bool) -> str:
    rows = "".join(
        f'<tr><th scope="row">{TITLES[d.model]} minus {TITLES[d.than]}</th><td data-difference="{d.model}-{d.than}">'
        f"{d.mean:+.4f}</td><td>{d.low:+.4f} to {d.high:+.4f}</td></tr>"
        for d in data.differences
    )
    one = data.differences[0]
    on = f" on {text(data.data)}" if several else ""
    return (
        f'<table><thead><tr><th scope="col">difference{on}, nats per token</th><th scope="col">mean</th>'
        f'<th scope="col">{100 * one.confidence:.0f} % interval</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="note">Paired bootstrap over {one.units:,} {text(one.unit)}: the same draws for both models.</p>'
    )


def _data_sets(results: Results, roles: Sequence[str]) -> str:
    rows = []
    for data in results.by_data:
        cells = "".join(_data_cell(data, role) for role in roles)
        rows.append(f'<tr><th scope="row">{text(data.data)}</th><td>{data.tokens:,}</td>{cells}</tr>')
    return (
        '<h3>By data set</h3><div class="scroll"><table><thead><tr><th></th><th scope="col">tokens</th>'
        f"{_heads(roles)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">Cross-entropy in nats per token; below it the median and the 99.9th percentile.</p>'
    )


def _data_cell(data: DataScores, role: str) -> str:
    value, spread = getattr(data.cross_entropy, role), getattr(data.loss_spread, role)
    if value is None:
        return f"<td>{NOTHING}</td>"
    below = f'<span class="pm">{spread.median:.2f}, {spread.percentile_99_9:.1f}</span>' if spread else ""
    return f"<td>{value:.4f}{below}</td>"


def _constants_table(record: RunRecord) -> str:
    if not record.constants:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><code>{text(c.site)}</code></th><td data-site="{text(c.site)}">{c.ordinary:.4g}</td>'
        f"<td>{c.end_of_text:.4g}</td><td>{c.first:.4g}</td></tr>"
        for c in record.constants
    )
    return (
        "<details><summary>All constants</summary><table><thead><tr><th scope='col'>site</th>"
        "<th scope='col'>constant</th><th scope='col'>end-of-text, dropped</th><th scope='col'>position 0, dropped</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _worst(data: DataScores) -> str:
    if not data.worst:
        return ""
    ranked_by = TITLES[data.worst[0].ranked_by]
    parts = [
        f'<p class="note">{text(data.data)}: the windows with the highest mean loss under the {ranked_by} model, around '
        "the token that cost it most (marked). Control characters are shown as symbols.</p>"
    ]
    for number, sample in enumerate(data.worst, start=1):
        losses = ", ".join(
            f"{TITLES[role]} {value:.3f}" for role in ROLES if (value := getattr(sample.loss, role)) is not None
        )
        parts.append(
            f'<div class="sample"><p><strong>{number}.</strong> Mean over {sample.tokens:,} tokens: {losses}.</p>'
            f"<p class='soft'>Marked token: {sample.token_loss:.2f} nats, position {sample.position + 1:,} of the window "
            f"at token {sample.start:,}.</p>"
            f"<pre>{text(sample.before[-400:])}<mark>{text(sample.token, spaces=True)}</mark>{text(sample.after[:160])}"
            "</pre></div>"
        )
    return "".join(parts)


def _odd_text(results: Results) -> str:
    if not results.odd_text:
        return ""
    roles = _shown(results)
    rows = []
    for odd in results.odd_text:
        cells = "".join(
            f'<td>{getattr(odd.loss, role):.3f}<span class="pm">worst {getattr(odd.worst, role):.3f}</span></td>'
            if getattr(odd.loss, role) is not None
            else f"<td>{NOTHING}</td>"
            for role in roles
        )
        rows.append(f'<tr><th scope="row">{text(odd.kind)}</th>{cells}</tr>')
    one = results.odd_text[0]
    samples = "".join(
        f"<h3>{text(odd.kind)}</h3><pre>{text(odd.sample, spaces=True)}</pre>" for odd in results.odd_text
    )
    return (
        f"<table><thead><tr><th></th>{_heads(roles)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<p class="note">{one.sequences} sequences of {one.context:,} tokens of each kind; mean loss in nats per token, '
        "and that of the worst sequence. A model whose residual stream explodes shows here first.</p>"
        f"<details><summary>How the worst sequences begin</summary>{samples}</details>"
    )


def _continuations(results: Results) -> str:
    parts = []
    for one in results.continuations:
        columns = "".join(
            f'<div><h3 class="{role}">{TITLES[role]}</h3><pre>{text(written)}</pre></div>'
            for role in _shown(results)
            if (written := getattr(one.texts, role)) is not None
        )
        parts.append(f'<pre>{text(one.prompt)}</pre><div class="columns">{columns}</div>')
    if not parts:
        return ""
    return (
        "".join(parts)
        + f'<p class="note">Sampled at temperature {results.continuations[0].temperature:g}, same seed.</p>'
    )


def _published(results: Results, model: str | None) -> str:
    own, losses = results.cross_entropy, []
    if own.ln_free is not None:
        cells = "".join(
            f"<td>{NOTHING if v is None else format(v, '.4f')}</td>" for v in (own.original, own.control, own.ln_free)
        )
        gap = NOTHING if results.gap is None else f"{results.gap:+.4f}"
        losses.append(
            f'<tr class="strong"><th scope="row">{text(model or "this run")}</th><td class="words">this run</td>'
            f'<td class="words">{text(results.settings.data)}</td>{cells}<td>{gap}</td></tr>'
        )
    losses += [
        f'<tr><th scope="row">{one.model}</th><td class="words">{one.source}, {one.tokens} tokens</td>'
        f'<td class="words">{one.data}</td><td>{one.original:.{d}f}</td><td>{one.control:.{d}f}</td>'
        f"<td>{one.ln_free:.{d if one.ln_free < 100 else 2}f}</td><td>{one.gap:+.3f}</td></tr>"
        for one in LOSSES
        for d in (3 if one.source == HEIMERSHEIM else 4,)  # as many digits as the paper gives
    ]
    accuracies = "".join(
        f'<tr><th scope="row">{one.model}</th><td class="words">{one.source}</td><td class="words">{one.measure}</td>'
        + "".join(f"<td>{NOTHING if v is None else v}</td>" for v in (one.original, one.control, one.ln_free))
        + "</tr>"
        for one in ACCURACIES
    )
    sources = "; ".join(f'{name}, <a href="{url}">{escape(title)}</a>' for name, (title, url) in SOURCES.items())
    heads = f"{_heads(ROLES)}"
    return (
        '<p class="note">Cross-entropy in nats per token, as the papers report it. Losses compare within one model and one '
        "data set; the gap, LN-free minus control, carries a little further.</p>"
        '<div class="scroll"><table id="published"><thead><tr><th>model</th><th class="words">source</th>'
        f'<th class="words">data</th>{heads}<th>gap</th></tr></thead><tbody>{"".join(losses)}</tbody></table></div>'
        f'<p class="note">{escape(LOSS_NOTE)}</p>'
        '<h3>HellaSwag, %</h3><div class="scroll"><table id="accuracies"><thead><tr><th>model</th><th class="words">source</th>'
        f'<th class="words">measure</th>{heads}</tr></thead><tbody>{accuracies}</tbody></table></div>'
        f'<p class="note">Sources: {sources}.</p>'
    )


def _recipe(record: RunRecord) -> str:
    from ln_removal.config.recipe import dump_toml

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
    facts += [(TITLES[role], getattr(results.models, role)) for role in _shown(results)]
    facts += sorted(results.versions.items())
    listed = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    described = f"<p>{text(recipe.description)}</p>" if recipe is not None and recipe.description else ""
    toml = f'<pre id="recipe">{text(dump_toml(recipe).strip())}</pre>' if recipe is not None else ""
    happened = "".join(f"<li>{text(line)}</li>" for line in incident_lines(record.directory / METRICS_FILE))
    incidents = f'<h3>Incidents</h3><ul id="incidents">{happened}</ul>' if happened else ""
    return f"{described}<dl>{listed}</dl>{incidents}{toml}"
