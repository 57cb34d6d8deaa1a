"""Tables of scores for the terminal, and what they share with the model card and the report.

`score_rows` builds the table original / control / LN-free. The terminal, the model card and the report each choose rows of
it and label them. `prompt_table` is the same in all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ln_removal.evaluation.results import (
    TITLES,
    ByRole,
    DataScores,
    PromptScores,
    Results,
    StressText,
    difference_of,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ln_removal.evaluation.hellaswag import ModelsOnQuestions

WORST_SHOWN = 2
"""Worst windows of a data set that the printed table shows; results.json and the report have more."""

PROMPTS_TITLE = "Prompts: cross-entropy (nats per token)"

VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: "\u2421"}
"""Symbols in the place of control characters, for `str.translate`."""

HARMED = 0.1
"""Nats per token that the end-of-text token in front may add to the LN-free model's difference to the control."""

Score = Literal[
    "cross_entropy",
    "difference",
    "median",
    "percentile_95",
    "percentile_99_9",
    "bits_per_byte",
    "accuracy",
    "top_1",
    "calibration",
    "entropy",
]

_LABELS: dict[Score, str] = {
    "cross_entropy": "cross-entropy (nats per token)",
    "median": "  median token",
    "percentile_95": "  95 % of tokens below",
    "percentile_99_9": "  99.9 % of tokens below",
    "calibration": "calibration error",
    "entropy": "entropy of the prediction",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy (%)",
}


@dataclass(frozen=True)
class ScoreRow:
    """One score of every model.

    Attributes:
        form: how its numbers are written, such as ".4f".
        values, errors: by role, shares in per cent; a role without one is left out. Errors are standard errors.
    """

    score: Score
    label: str
    form: str
    values: dict[str, float]
    errors: dict[str, float]

    def value(self, role: str, *, missing: str = "-") -> str:
        """The number of one model, as it is shown."""
        return format(self.values[role], self.form) if role in self.values else missing

    def error(self, role: str) -> str:
        """Its standard error after a plus-minus sign, or nothing."""
        return f"± {format(self.errors[role], self.form)}" if role in self.errors else ""


def shown_roles(results: Results) -> list[str]:
    """The roles that have a model, which are the columns of every table of scores."""
    return list(results.models.known())


def score_rows(results: Results, labels: Mapping[Score, str]) -> list[ScoreRow]:
    """The rows of the table original / control / LN-free; those that no model has are left out.

    Args:
        labels: the scores to show, in this order, and what each row is called.
    """
    spreads = results.loss_spread.known()
    calibrations = results.by_data[0].calibration.known() if results.by_data else {}
    cross_entropy = results.cross_entropy.known()
    control = results.cross_entropy.control
    to_control = {role: loss - control for role, loss in cross_entropy.items() if control is not None}

    def part(found: Mapping[str, Any], name: str, factor: float = 1) -> dict[str, float]:
        values = {role: getattr(one, name) for role, one in found.items()}
        return {role: factor * value for role, value in values.items() if value is not None}

    def percent(values: ByRole[float]) -> dict[str, float]:
        return {role: 100 * share for role, share in values.known().items()}

    measured: dict[Score, tuple[str, dict[str, float]]] = {
        "cross_entropy": (".4f", cross_entropy),
        "difference": ("+.4f", {role: value for role, value in to_control.items() if role != "control"}),
        "median": (".4f", part(spreads, "median")),
        "percentile_95": (".2f", part(spreads, "percentile_95")),
        "percentile_99_9": (".2f", part(spreads, "percentile_99_9")),
        "bits_per_byte": (".4f", results.bits_per_byte.known()),
        "accuracy": (".2f", percent(results.accuracy)),
        "top_1": (".2f", part(calibrations, "top_1_accuracy", 100)),
        "calibration": (".4f", part(calibrations, "expected_calibration_error")),
        "entropy": (".4f", part(calibrations, "entropy")),
    }
    errors: dict[str, dict[str, float]] = {
        "cross_entropy": part(spreads, "standard_error"),
        "accuracy": percent(results.accuracy_standard_error),
    }
    shown = set(shown_roles(results))
    rows = (ScoreRow(key, label, *measured[key], errors.get(key, {})) for key, label in labels.items())
    return [row for row in rows if shown & row.values.keys()]


def prompt_table(results: Results, *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the losses on prompts, as they are shown; no rows where there are none.

    The columns are a label, one for each of `shown_roles`, and the difference to the control if there is one, with its
    interval in a column of its own.
    """
    shown = shown_roles(results)
    compared = any(_to_control(one) is not None for one in results.prompts)
    header = ["", *(TITLES[role] for role in shown), *(["LN-free - control"] if compared else [])]
    header += ["95 % interval"] if compared and intervals else []
    rows = []
    for one in results.prompts:
        known = one.loss.known()
        row = [kind_label(one), *(format(known[role], ".3f") if role in known else "-" for role in shown)]
        if compared:
            difference = _to_control(one)
            row.append("-" if difference is None else f"{difference:+.3f}")
        if compared and intervals:
            interval = next((d for d in one.differences if (d.model, d.than) == ("ln_free", "control")), None)
            row.append("-" if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}")
        rows.append(row)
    return header, rows


def prompt_notes(results: Results) -> list[str]:
    """What the rows of `prompt_table` are, and a sentence for each kind that the end-of-text token in front harms."""
    if not results.prompts:
        return []
    notes = [
        "These are the first tokens of held-out documents, and the second copy of a sequence that is given twice, which "
        "induction heads can copy; TransformerLens puts the end-of-text token (BOS) in front of each prompt."
    ]
    differences = {(one.kind, one.bos): _to_control(one) for one in results.prompts}
    for (kind, bos), with_bos in differences.items():
        without = differences.get((kind, False))
        if bos and with_bos is not None and without is not None and not with_bos - without <= HARMED:
            notes.append(
                f"The LN-free model does not read BOS as well as the control ({kind}): its difference to the control is "
                f"{with_bos:+.3f} with BOS and {without:+.3f} without."
            )
    return notes


def kind_label(one: PromptScores | StressText) -> str:
    """The kind of a prompt or of a stress text, and whether the end-of-text token stands in front."""
    return f"{one.kind}, with BOS" if one.bos else one.kind


def _to_control(one: PromptScores) -> float | None:
    return difference_of(one.loss.ln_free, one.loss.control)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left and the others to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---", *("---:" for _ in header[1:])]), *map(line, rows)])


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Table:
    """A table for the terminal, its first column to the left and the others to the right; its text is `as_it_is`.

    `notes` stand below it, each on a line of its own.
    """
    from rich.table import Table

    caption = as_it_is("\n".join(notes)) if notes else None
    table = Table(title=as_it_is(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column(as_it_is(header[0]), overflow="fold")
    for name in header[1:]:
        table.add_column(as_it_is(name), justify="right")
    for cells in rows:
        table.add_row(*map(as_it_is, cells))
    return table


def as_it_is(text: str) -> Text:
    """A text of a user or a model for rich, which shows "[v2]" and ":key:" as they are, and control characters as symbols."""
    from rich.text import Text

    return Text(text.translate(VISIBLE))


def render(results: Results, console: Console) -> None:
    """Print the table original / control / LN-free with the differences, further tables, notes, and what the models wrote."""
    console.print(_score_table(results))
    for table in _further_tables(results):
        console.print(table)
    lines = _notes(results)
    for data in results.by_data:
        lines += _data_lines(data)
    for one in results.continuations:
        lines += [f"--- {TITLES[role]}\n{one.prompt}{text}" for role, text in one.texts.known().items()]
    for line in lines:
        console.print(as_it_is(line))


def _score_table(results: Results) -> Table:
    """The rows of `_LABELS`, and the differences of the LN-free model to the control and to the original."""
    shown = shown_roles(results)
    others = [role for role in ("control", "original") if role in shown and "ln_free" in shown]
    header = ["", *(TITLES[role] for role in shown), *(f"LN-free - {TITLES[role]}" for role in others)]
    rows = []
    for row in score_rows(results, _LABELS):
        values = [f"{row.value(role)} {row.error(role)}".rstrip() for role in shown]
        differences = [difference_of(row.values.get("ln_free"), row.values.get(role)) for role in others]
        rows.append([row.label, *values, *("-" if one is None else format(one, "+" + row.form) for one in differences)])
    return text_table("LayerNorm removal: scores", header, rows)


def _further_tables(results: Results) -> Iterator[Table]:
    """Scores by data set where there are several, on prompts and on stress texts."""
    shown = shown_roles(results)
    header = ["", *(TITLES[role] for role in shown)]

    def cells(values: Mapping[str, float], form: str) -> list[str]:
        return [format(values[role], form) if role in values else "-" for role in shown]

    if len(results.by_data) > 1:
        rows = []
        for data in results.by_data:
            highest = {role: spread.percentile_99_9 for role, spread in data.loss_spread.known().items()}
            rows.append([data.data, *cells(data.cross_entropy.known(), ".4f")])
            rows.append(["  99.9 % of tokens below", *cells(highest, ".2f")])
        yield text_table("Cross-entropy by data set", header, rows)
    if results.prompts:
        yield text_table(PROMPTS_TITLE, *prompt_table(results, intervals=False), prompt_notes(results))
    if results.odd_text:
        rows = []
        for one in results.odd_text:
            pairs = zip(cells(one.loss.known(), ".3f"), cells(one.worst.known(), ".3f"), strict=True)
            rows.append([kind_label(one), *(f"{mean} / {worst}" for mean, worst in pairs)])
        yield text_table(f"Odd text: mean loss and worst of {results.odd_text[0].sequences} sequences", header, rows)


def _notes(results: Results) -> list[str]:
    """How the models were scored, and the gap."""
    settings = results.settings
    window = f"context {settings.context}{results.windows_note}"
    notes = [f"{results.tokens:,} tokens of {settings.data}, {window}, {settings.precision}"]
    if settings.questions:
        notes.append(f"{settings.questions:,} questions of {settings.question_set}, protocol {settings.protocol}")
    notes.append(f"{results.seconds:.0f} s on {results.device}")
    if results.gap is not None:
        notes.append(f"gap (LN-free - control): {results.gap:+.4f} nats per token")
    return notes


def _data_lines(data: DataScores) -> list[str]:
    """The differences on a data set with their intervals, and its worst windows."""
    lines = [
        f"{data.data}: {TITLES[one.model]} - {TITLES[one.than]} {one.mean:+.4f}, {100 * one.confidence:.0f} % "
        f"interval {one.low:+.4f} to {one.high:+.4f} ({one.units} {one.unit})"
        for one in data.differences
    ]
    for sample in data.worst[:WORST_SHOWN]:
        losses = ", ".join(f"{TITLES[role]} {value:.2f}" for role, value in sample.loss.known().items())
        before, token, after = (repr(text)[1:-1] for text in (sample.before[-60:], sample.token, sample.after[:20]))
        lines.append(f"{data.data}: worst window, {losses}: {before} >>{token}<< {after}")
    return lines


def question_tables(found: ModelsOnQuestions) -> list[Table]:
    """What `evaluate-hellaswag` prints: the accuracies, and the comparisons with the first model if there are any."""
    first = next(iter(found.results.values()))
    rows = []
    for name, result in found.results.items():
        pairs = ((result.acc, result.acc_standard_error), (result.acc_norm, result.acc_norm_standard_error))
        cells = (
            f"{100 * share:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "") for share, error in pairs
        )
        rows.append([name, *cells])
    title = f"{found.data}: {first.questions:,} questions, protocol {first.protocol}"
    tables = [text_table(title, ["model", "acc (%)", "acc_norm (%)"], rows)]
    if found.comparisons:
        header = ["model", "rule", "difference", "95 % interval", "only it right", "only the first right", "McNemar p"]
        rows = [
            [
                comparison["second"],
                rule,
                f"{100 * one['difference']:+.2f}",
                f"{100 * one['low']:+.2f} to {100 * one['high']:+.2f}",
                f"{one['only_second']:,}",
                f"{one['only_first']:,}",
                f"{one['p_value']:.3g}",
            ]
            for comparison in found.comparisons
            for rule in ("acc", "acc_norm")
            for one in [comparison[rule]]
        ]
        tables.append(text_table(f"difference to {found.comparisons[0]['first']}, in points", header, rows))
    return tables
