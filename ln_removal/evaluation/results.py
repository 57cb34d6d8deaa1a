"""results.json: what a removal run, or an evaluation of its models, measured.

Three models are told apart everywhere: `original` (before any training), `control` (the same fine-tuning with LayerNorm
kept) and `ln_free`. A model that was not there, or not scored, is null.

    {
      "format": "ln-removal results 1",
      "models":        {"original": "tiny", "control": "out/control", "ln_free": "out/model"},
      "cross_entropy": {"original": 3.31, "control": 3.26, "ln_free": 3.29},    nats per token, validation set
      "bits_per_byte": {...},                                                   the same over the bytes of the text
      "accuracy":      {...},                                                   share of questions answered rightly
      "accuracy_standard_error": {...},
      "loss_spread":   {"original": {"standard_error": ..., "median": ...,      of the per-token losses
                                     "percentile_95": ..., "percentile_99_9": ...}, ...},
      "gap": 0.03,                                                              cross_entropy.ln_free - .control
      "tokens": 403210,                                                         validation tokens scored, each model
      "seconds": 412.0,                                                         wall-clock time of the command
      "device": "cpu",
      "settings": {"data": ..., "context": ..., "precision": ...,
                   "questions": ..., "question_set": ..., "protocol": ...},
      "by_data": [{"data": ..., "differences": [...], "by_position": {...}, "worst": [...], ...}, ...],
      "residual_std": {...}, "odd_text": [...], "continuations": [...],
      "versions": {"ln_removal": ..., "torch": ..., "transformers": ..., "python": ...}
    }

The figures at the top are those of the first data set. `by_data` says more of each one (`data_scores.DataScores`), the
first included; it and what follows it may be empty, as in files of earlier versions.

`accuracy` is acc_norm, the length-normalised choice that is usually quoted for HellaSwag; it is null when no questions
were asked.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from ln_removal.data.tokens import write_json_atomically
from ln_removal.errors import UserError
from ln_removal.evaluation.data_scores import (
    ROLES,
    TITLES,
    Continuation,
    DataScores,
    LossSpread,
    OddText,
    ResidualStd,
    Schema,
    Trio,
)
from ln_removal.precision import Precision

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ln_removal.evaluation.hellaswag import ChoiceResult
    from ln_removal.evaluation.loss import LossResult

__all__ = [
    "ROLES",
    "TITLES",
    "LossSpread",
    "Results",
    "Settings",
    "Trio",
    "collect",
    "read",
    "render",
    "versions",
    "write",
]

WORST_SHOWN = 2
"""Worst windows of a data set that the printed table shows; results.json and the report have more."""


class Settings(Schema):
    """How the figures were taken.

    Attributes:
        data: the validation set, in words. context: tokens in a window. precision: of the forward passes.
        questions: how many were asked of each model; 0 for none. question_set, protocol: empty then.
    """

    data: str
    context: int
    precision: Precision = "float32"
    questions: NonNegativeInt = 0
    question_set: str = ""
    protocol: str = ""


class Results(Schema):
    """The content of results.json; the module's docstring explains the fields."""

    format: Literal["ln-removal results 1"] = "ln-removal results 1"
    models: Trio[str]
    cross_entropy: Trio[float]
    bits_per_byte: Trio[float] = Trio[float]()
    accuracy: Trio[float] = Trio[float]()
    accuracy_standard_error: Trio[float] = Trio[float]()
    loss_spread: Trio[LossSpread] = Trio[LossSpread]()
    gap: float | None = None
    tokens: NonNegativeInt
    seconds: NonNegativeFloat
    device: str
    settings: Settings
    by_data: tuple[DataScores, ...] = ()
    residual_std: Trio[ResidualStd] = Trio[ResidualStd]()
    odd_text: tuple[OddText, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    versions: dict[str, str] = Field(default_factory=lambda: versions())

    @property
    def stride_note(self) -> str:
        """`, stride 512` where windows overlapped, which lowers the loss; empty where they did not."""
        first = self.by_data[0] if self.by_data else None
        return f", stride {first.stride:,}" if first is not None and first.stride < first.context else ""

    @model_validator(mode="after")
    def _gap_is_the_difference(self) -> Results:
        difference = _minus(self.cross_entropy.ln_free, self.cross_entropy.control)
        same = self.gap == difference or (
            self.gap is not None
            and difference is not None
            and (math.isclose(self.gap, difference, abs_tol=1e-6) or (math.isnan(self.gap) and math.isnan(difference)))
        )
        if not same:
            raise ValueError(f"gap is {self.gap}, cross_entropy.ln_free - cross_entropy.control is {difference}")
        return self


def collect(
    losses: Mapping[str, LossResult],
    choices: Mapping[str, ChoiceResult] | None = None,
    *,
    models: Mapping[str, str],
    settings: Settings,
    seconds: float,
    device: str,
    by_data: Sequence[DataScores] = (),
    residual_std: Mapping[str, ResidualStd] | None = None,
    odd_text: Sequence[OddText] = (),
    continuations: Sequence[Continuation] = (),
) -> Results:
    """Put measurements together.

    Args:
        losses, choices: by role: `original`, `control`, `ln_free`; any may be missing.
        models: the name or directory of each model, by role.
        settings: how the figures were taken.
        seconds: wall-clock time of the whole run or evaluation.
        device: where it ran, such as "cpu" or "NVIDIA H100".
        by_data, residual_std, odd_text, continuations: as in `Results`, residual_std by role.
    """
    from ln_removal.evaluation.side_by_side import spread_of

    choices = choices or {}
    assert {*losses, *choices, *models} <= {*ROLES}, "roles are original, control and ln_free"

    cross_entropy = {role: loss.cross_entropy for role, loss in losses.items()}
    return Results(
        models=Trio[str](**models),
        cross_entropy=Trio[float](**cross_entropy),
        bits_per_byte=Trio[float](**{role: loss.bits_per_byte for role, loss in losses.items()}),
        accuracy=Trio[float](**{role: choice.acc_norm for role, choice in choices.items()}),
        accuracy_standard_error=Trio[float](
            **{role: choice.acc_norm_standard_error for role, choice in choices.items()}
        ),
        loss_spread=Trio[LossSpread](**{role: spread_of(loss) for role, loss in losses.items()}),
        gap=_minus(cross_entropy.get("ln_free"), cross_entropy.get("control")),
        tokens=max((loss.tokens for loss in losses.values()), default=0),
        seconds=seconds,
        device=device,
        settings=settings,
        by_data=tuple(by_data),
        residual_std=Trio[ResidualStd](**(residual_std or {})),
        odd_text=tuple(odd_text),
        continuations=tuple(continuations),
    )


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import ln_removal

    found = {"ln_removal": ln_removal.__version__, "python": platform.python_version()}
    return {**found, **{name: metadata.version(name) for name in ("torch", "transformers")}}


def write(results: Results, path: Path | str) -> None:
    """Write results.json, whole or not at all.

    Raises:
        UserError: when the file cannot be written.
    """
    try:
        write_json_atomically(Path(path), results.model_dump())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another directory") from error


def read(path: Path | str) -> Results:
    """Read results.json.

    Raises:
        UserError: when it cannot be read or does not follow the schema.
    """
    try:
        return Results.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read results from {path}: {error.strerror or error}; run ln-evaluate first") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UserError(
            f"{path} does not hold results in this version's format ({place}: {first['msg']}; {error.error_count()} "
            "faults); run ln-evaluate again"
        ) from error


def render(results: Results, console: Console) -> None:
    """Print the table original / control / LN-free, with the differences that matter."""
    from rich.table import Table

    shown = [role for role in ROLES if getattr(results.models, role) is not None]
    table = Table(title="LayerNorm removal: scores", title_justify="left")
    table.add_column("")
    for role in shown:
        table.add_column(TITLES[role], justify="right")
    differences = [role for role in ("control", "original") if role in shown and "ln_free" in shown]
    for role in differences:
        table.add_column(f"LN-free - {TITLES[role]}", justify="right")

    def row(name: str, values: Trio[float], form: str, errors: Trio[float] | None = None) -> None:
        cells = []
        for role in shown:
            value, error = getattr(values, role), getattr(errors, role, None)
            cells.append(
                ("-" if value is None else format(value, form)) + (f" ± {error:{form}}" if error is not None else "")
            )
        for role in differences:
            difference = _minus(values.ln_free, getattr(values, role))
            cells.append("-" if difference is None else format(difference, "+" + form))
        if any(getattr(values, role) is not None for role in shown):
            table.add_row(name, *cells)

    def part(name: str) -> Trio[float]:
        spreads = {role: getattr(results.loss_spread, role) for role in ROLES}
        return Trio[float](**{role: getattr(spread, name) for role, spread in spreads.items() if spread is not None})

    row("cross-entropy (nats per token)", results.cross_entropy, ".4f", part("standard_error"))
    row("  median token", part("median"), ".4f")
    row("  95 % of tokens below", part("percentile_95"), ".2f")
    row("  99.9 % of tokens below", part("percentile_99_9"), ".2f")
    if results.by_data:
        calibrations = {role: getattr(results.by_data[0].calibration, role) for role in ROLES}

        def calibration(name: str) -> Trio[float]:
            return Trio[float](**{role: getattr(c, name) for role, c in calibrations.items() if c is not None})

        row("calibration error", calibration("expected_calibration_error"), ".4f")
        row("entropy of the prediction", calibration("entropy"), ".4f")
    row("bits per byte", results.bits_per_byte, ".4f")
    row("accuracy (%)", _percent(results.accuracy), ".2f", _percent(results.accuracy_standard_error))
    console.print(table)
    for more in _further_tables(results, shown):
        console.print(more)
    settings = results.settings
    window = f"context {settings.context}{results.stride_note}"
    notes = [f"{results.tokens:,} tokens of {settings.data}, {window}, {settings.precision}"]
    if settings.questions:
        notes.append(f"{settings.questions:,} questions of {settings.question_set}, protocol {settings.protocol}")
    notes.append(f"{results.seconds:.0f} s on {results.device}")
    if results.gap is not None:
        notes.append(f"gap (LN-free - control): {results.gap:+.4f} nats per token")
    for note in notes:
        console.print(note, markup=False, highlight=False)
    for data in results.by_data:
        for one in data.differences:
            console.print(
                f"{data.data}: {TITLES[one.model]} - {TITLES[one.than]} {one.mean:+.4f}, {100 * one.confidence:.0f} % "
                f"interval {one.low:+.4f} to {one.high:+.4f} ({one.units} {one.unit})",
                markup=False,
                highlight=False,
            )
        for sample in data.worst[:WORST_SHOWN]:
            losses = ", ".join(
                f"{TITLES[role]} {value:.2f}" for role in shown if (value := getattr(sample.loss, role)) is not None
            )
            text = (
                repr(sample.before[-60:])[1:-1]
                + " >>"
                + repr(sample.token)[1:-1]
                + "<< "
                + repr(sample.after[:20])[1:-1]
            )
            console.print(f"{data.data}: worst window, {losses}: {text}", markup=False, highlight=False)
    for written in results.continuations:
        for role in shown:
            if (text := getattr(written.texts, role)) is not None:
                console.print(f"--- {TITLES[role]}\n{written.prompt}{text}", markup=False, highlight=False)


def _further_tables(results: Results, shown: Sequence[str]) -> Iterator[Table]:
    """By data set where there are several, and on odd text."""
    from rich.markup import escape
    from rich.table import Table

    def cells(values: Trio[float], form: str) -> list[str]:
        return ["-" if (value := getattr(values, role)) is None else format(value, form) for role in shown]

    def begun(title: str) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for role in shown:
            table.add_column(TITLES[role], justify="right")
        return table

    if len(results.by_data) > 1:
        table = begun("Cross-entropy by data set")
        for data in results.by_data:
            table.add_row(escape(data.data), *cells(data.cross_entropy, ".4f"))
            highest = {role: spread.percentile_99_9 for role in shown if (spread := getattr(data.loss_spread, role))}
            table.add_row("  99.9 % of tokens below", *cells(Trio[float](**highest), ".2f"))
        yield table
    if results.odd_text:
        table = begun(f"Odd text: mean loss and worst of {results.odd_text[0].sequences} sequences")
        for odd in results.odd_text:
            pairs = zip(cells(odd.loss, ".3f"), cells(odd.worst, ".3f"), strict=True)
            table.add_row(odd.kind, *(f"{mean} / {worst}" for mean, worst in pairs))
        yield table


def _percent(values: Trio[float]) -> Trio[float]:
    return Trio[float](**{role: 100 * share for role in ROLES if (share := getattr(values, role)) is not None})


def _minus(first: Any, second: Any) -> float | None:
    return None if first is None or second is None else float(first - second)
