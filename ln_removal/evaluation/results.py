"""results.json: what a removal run, or an evaluation of its models, measured.

A model has one of three roles: `original` (before any training), `control` (the same fine-tuning with LayerNorm kept) or
`ln_free`. Where a role has no model, or the model was not scored, the value is null.

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
      "settings": {"data": ..., "context": ..., "windows": ..., "precision": ...,
                   "questions": ..., "question_set": ..., "protocol": ...},
      "by_data": [{"data": ..., "differences": [...], "by_position": {...}, "worst": [...], ...}, ...],
      "prompts": [{"kind": "document start", "bos": true, "loss": {"original": ..., "control": ..., "ln_free": ...},
                   "differences": [...], ...}, ...],
      "residual_std": {...}, "odd_text": [...], "continuations": [...],
      "versions": {"ln_removal": ..., "torch": ..., "transformers": ..., "python": ...}
    }

The values at the top are those of the first data set. `by_data` has more about each data set (`DataScores`), the first
one included. Files of earlier versions lack it and the keys after it. `prompts` holds the losses at the start of documents
and on sequences that are given twice, without and with the end-of-text token (`bos`) in front; the tokens are those of the
first data set. `odd_text` holds the losses on stress texts, `continuations` the samples that the models wrote.

`accuracy` is acc_norm, the length-normalised choice that is usually quoted for HellaSwag; it is null when no questions
were asked.

Losses are in nats per token. Positions count from 0. Texts are as the tokenizer decodes them.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ln_removal.config.recipe import WindowKind
from ln_removal.errors import UserError
from ln_removal.files.atomic import write_json_atomically
from ln_removal.files.resources import package_version
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from ln_removal.evaluation.hellaswag import ChoiceResult
    from ln_removal.evaluation.loss import LossResult

ROLES = ("original", "control", "ln_free")
TITLES = {"original": "original", "control": "control", "ln_free": "LN-free"}

T = TypeVar("T")


class Schema(BaseModel):
    """A part of results.json: no key but the known ones, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ByRole(Schema, Generic[T]):
    """One value for each role; None where there was no such model or it was not scored."""

    original: T | None = None
    control: T | None = None
    ln_free: T | None = None

    def known(self) -> dict[str, T]:
        """The values that are not None, by role, in the order of ROLES."""
        return {role: value for role in ROLES if (value := getattr(self, role)) is not None}


class LossSpread(Schema):
    """Distribution of the per-token losses, in nats. `standard_error` is that of the mean, taken over windows."""

    standard_error: float | None
    median: float
    percentile_95: float
    percentile_99_9: float


class PositionLoss(Schema):
    """Mean loss over the `tokens` targets that the positions `first` to `last` of the windows predict."""

    first: NonNegativeInt
    last: NonNegativeInt
    loss: float
    tokens: PositiveInt


class Calibration(Schema):
    """How well the probability of the likeliest token agrees with how often that token is the right one.

    Attributes:
        expected_calibration_error: sum over 15 equal bins of the top-1 probability of (tokens in the bin / tokens) *
            |share predicted rightly - mean top-1 probability| (Guo et al. 2017).
        top_1_accuracy: share of tokens that were the likeliest one.
        confidence: mean top-1 probability.
        entropy: mean entropy of the predicted distribution, nats.
    """

    expected_calibration_error: float
    top_1_accuracy: float
    confidence: float
    entropy: float


class Difference(Schema):
    """How much higher the loss of the role `model` is than that of the role `than`, with its paired bootstrap interval.

    Attributes:
        mean, low, high: nats per token.
        confidence: share of the resamples inside the interval.
        unit: what was drawn, "documents", "windows" or "prompts".
        units: how many of them there are.
    """

    model: str
    than: str
    mean: float
    low: float
    high: float
    confidence: float
    unit: str
    units: PositiveInt


class WorstSample(Schema):
    """A window with a high mean loss, and the token in it with the highest loss.

    Attributes:
        ranked_by: the role whose losses chose the window.
        loss: mean over the window's scored tokens, of every model.
        tokens: scored tokens in the window.
        shard, start: where the window begins.
        position: in the window, of the input that predicts the token with the highest loss.
        token_loss: the loss of that token under the model `ranked_by`, nats.
        before, token, after: that token and the text around it.
    """

    ranked_by: str
    loss: ByRole[float]
    tokens: PositiveInt
    shard: NonNegativeInt
    start: NonNegativeInt
    position: NonNegativeInt
    token_loss: float
    before: str
    token: str
    after: str


class DataScores(Schema):
    """The scores on one data set.

    Attributes:
        data: name of the data set.
        tokens, windows: how many were scored.
        context: inputs in a window.
        stride: tokens between the beginnings of two windows; equal to the context where windows do not overlap.
        interval: bootstrap interval (low, high) of each mean, over the units that `differences` names.
    """

    data: str
    tokens: NonNegativeInt
    windows: NonNegativeInt
    context: PositiveInt
    stride: PositiveInt
    cross_entropy: ByRole[float]
    bits_per_byte: ByRole[float] = ByRole[float]()
    loss_spread: ByRole[LossSpread] = ByRole[LossSpread]()
    interval: ByRole[tuple[float, float]] = ByRole[tuple[float, float]]()
    differences: tuple[Difference, ...] = ()
    calibration: ByRole[Calibration] = ByRole[Calibration]()
    by_position: ByRole[tuple[PositionLoss, ...]] = ByRole[tuple[PositionLoss, ...]]()
    worst: tuple[WorstSample, ...] = ()


class PromptScores(Schema):
    """Losses on one kind of prompt.

    Attributes:
        kind: one of `prompts.KINDS`.
        bos: whether the end-of-text token stands in front. The scored tokens are the same in both cases.
        sequences, tokens: how many were scored.
        loss: mean over the scored tokens, nats.
        differences: none where there is a single prompt.
    """

    kind: str
    bos: bool
    sequences: PositiveInt
    tokens: PositiveInt
    loss: ByRole[float]
    differences: tuple[Difference, ...] = ()


class ResidualStd(Schema):
    """Mean standard deviation of the residual stream over its width, layer by layer, on held-out text.

    Attributes:
        ordinary_pre: (L + 1,) at the input of each block and of ln_f, over positions that are neither position 0 nor
            end-of-text tokens.
        ordinary_mid: (L,) between attention and MLP of each block, over the same positions.
        first_pre, first_mid: the same at position 0.
        tokens: how many were read.
    """

    ordinary_pre: tuple[float, ...]
    ordinary_mid: tuple[float, ...]
    first_pre: tuple[float, ...]
    first_mid: tuple[float, ...]
    tokens: PositiveInt


class StressText(Schema):
    """Losses on one kind of stress text: sequences of tokens that are unlike ordinary text.

    Attributes:
        kind: one of `stress_text.KINDS`.
        bos: whether the end-of-text token stands in front.
        sequences: how many were scored.
        context: tokens in a sequence.
        loss, median: over all tokens, nats.
        worst: the highest mean loss of a single sequence, nats per token.
        ranked_by: the role whose worst sequence `sample` is.
        sample: the beginning of that sequence.
    """

    kind: str
    bos: bool = False
    sequences: PositiveInt
    context: PositiveInt
    loss: ByRole[float]
    median: ByRole[float]
    worst: ByRole[float]
    ranked_by: str
    sample: str


class Samples(Schema):
    """What each model wrote after `prompt`, drawn with the same seed."""

    prompt: str
    temperature: float
    seed: NonNegativeInt
    texts: ByRole[str]


class Settings(Schema):
    """How the models were scored.

    Attributes:
        data: name of the first data set.
        context: tokens in a window.
        windows: "stream", or "document" where each document was read by itself.
        precision: of the forward passes.
        questions: how many were asked of each model.
        question_set, protocol: empty when no questions were asked.
    """

    data: str
    context: int
    windows: WindowKind = "stream"
    precision: Precision = "float32"
    questions: NonNegativeInt = 0
    question_set: str = ""
    protocol: str = ""


class Results(Schema):
    """The content of results.json; the module's docstring explains the fields."""

    format: Literal["ln-removal results 1"] = "ln-removal results 1"
    models: ByRole[str]
    cross_entropy: ByRole[float]
    bits_per_byte: ByRole[float] = ByRole[float]()
    accuracy: ByRole[float] = ByRole[float]()
    accuracy_standard_error: ByRole[float] = ByRole[float]()
    loss_spread: ByRole[LossSpread] = ByRole[LossSpread]()
    gap: float | None = None
    tokens: NonNegativeInt
    seconds: NonNegativeFloat
    device: str
    settings: Settings
    by_data: tuple[DataScores, ...] = ()
    prompts: tuple[PromptScores, ...] = ()
    residual_std: ByRole[ResidualStd] = ByRole[ResidualStd]()
    odd_text: tuple[StressText, ...] = ()
    continuations: tuple[Samples, ...] = ()
    versions: dict[str, str] = Field(default_factory=lambda: versions())

    @property
    def windows_note(self) -> str:
        """`, each document by itself`, or `, stride 512` where windows overlapped, which lowers the loss; else empty."""
        if self.settings.windows == "document":
            return ", each document by itself"
        first = self.by_data[0] if self.by_data else None
        return f", stride {first.stride:,}" if first is not None and first.stride < first.context else ""

    @model_validator(mode="after")
    def _gap_is_the_difference(self) -> Results:
        difference = difference_of(self.cross_entropy.ln_free, self.cross_entropy.control)
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
    prompts: Iterable[PromptScores] = (),
    residual_std: Mapping[str, ResidualStd] | None = None,
    stress_texts: Sequence[StressText] = (),
    samples: Sequence[Samples] = (),
) -> Results:
    """Put measurements together. All mappings are by role, and any role may be missing.

    Args:
        models: the name or directory of each model.
        seconds: wall-clock time of the whole run or evaluation.
        device: "cpu" or the name of the GPU.
    """
    choices = choices or {}
    assert {*losses, *choices, *models} <= {*ROLES}, "roles are original, control and ln_free"

    cross_entropy = {role: loss.cross_entropy for role, loss in losses.items()}
    return Results(
        models=ByRole[str](**models),
        cross_entropy=ByRole[float](**cross_entropy),
        bits_per_byte=ByRole[float](**{role: loss.bits_per_byte for role, loss in losses.items()}),
        accuracy=ByRole[float](**{role: choice.acc_norm for role, choice in choices.items()}),
        accuracy_standard_error=ByRole[float](
            **{role: choice.acc_norm_standard_error for role, choice in choices.items()}
        ),
        loss_spread=ByRole[LossSpread](**{role: spread_of(loss) for role, loss in losses.items()}),
        gap=difference_of(cross_entropy.get("ln_free"), cross_entropy.get("control")),
        tokens=max((loss.tokens for loss in losses.values()), default=0),
        seconds=seconds,
        device=device,
        settings=settings,
        by_data=tuple(by_data),
        prompts=tuple(prompts),
        residual_std=ByRole[ResidualStd](**(residual_std or {})),
        odd_text=tuple(stress_texts),
        continuations=tuple(samples),
    )


def versions() -> dict[str, str]:
    """Versions of the packages that the results depend on."""
    found = {"ln_removal": package_version(), "python": platform.python_version()}
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


def difference_of(first: float | None, second: float | None) -> float | None:
    """`first - second`, or None where one of them is missing."""
    return None if first is None or second is None else first - second


def spread_of(loss: LossResult) -> LossSpread:
    """The part of a LossResult that describes the distribution of the losses."""
    return LossSpread(
        standard_error=loss.standard_error,
        median=loss.median,
        percentile_95=loss.percentile_95,
        percentile_99_9=loss.percentile_99_9,
    )
