"""What one data set shows of original, control and LN-free: the schema of `by_data` in results.json, and its parts.

Losses are in nats per token; positions count from 0; texts are as the tokenizer decodes them.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

ROLES = ("original", "control", "ln_free")
TITLES = {"original": "original", "control": "control", "ln_free": "LN-free"}

T = TypeVar("T")


class Schema(BaseModel):
    """A part of results.json: no key but the known ones, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Trio(Schema, Generic[T]):
    """One value for each model; None for a model that was not there or not scored."""

    original: T | None = None
    control: T | None = None
    ln_free: T | None = None


class LossSpread(Schema):
    """How the per-token losses spread, in nats; `standard_error` is that of the mean, over windows."""

    standard_error: float | None
    median: float
    percentile_95: float
    percentile_99_9: float


class PositionLoss(Schema):
    """Mean loss of the targets after the inputs `first` to `last` of a window."""

    first: NonNegativeInt
    last: NonNegativeInt
    loss: float
    tokens: PositiveInt


class Calibration(Schema):
    """Whether the model knows what it knows.

    Attributes:
        expected_calibration_error: sum over 15 equal bins of the top-1 probability of (tokens in the bin / tokens) *
            |share predicted rightly - mean top-1 probability| (Guo et al. 2017).
        top_1_accuracy: share of tokens that the model held for the likeliest.
        confidence: mean top-1 probability. entropy: mean entropy of the prediction, nats.
    """

    expected_calibration_error: float
    top_1_accuracy: float
    confidence: float
    entropy: float


class Difference(Schema):
    """How much higher the loss of `model` is than that of `than`, with its paired bootstrap interval.

    Attributes:
        confidence: share of the resamples inside the interval.
        unit: what was drawn; units: how many there are.
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
    """A window with a high mean loss, and the token in it that cost most.

    Attributes:
        ranked_by: the model whose losses chose it.
        loss: mean over the window's scored tokens, of every model.
        tokens: scored tokens in the window.
        shard, start: where the window begins.
        position: of the costliest token's input in the window; token_loss: what that token cost the model `ranked_by`.
        before, token, after: the text around it.
    """

    ranked_by: str
    loss: Trio[float]
    tokens: PositiveInt
    shard: NonNegativeInt
    start: NonNegativeInt
    position: NonNegativeInt
    token_loss: float
    before: str
    token: str
    after: str


class DataScores(Schema):
    """The figures of one data set.

    Attributes:
        data: its name. tokens, windows: scored. context: inputs in a window.
        stride: tokens between the beginnings of two windows; the context where they do not overlap.
        interval: bootstrap interval (low, high) of each mean, over the units that `differences` names.
    """

    data: str
    tokens: NonNegativeInt
    windows: NonNegativeInt
    context: PositiveInt
    stride: PositiveInt
    cross_entropy: Trio[float]
    bits_per_byte: Trio[float] = Trio[float]()
    loss_spread: Trio[LossSpread] = Trio[LossSpread]()
    interval: Trio[tuple[float, float]] = Trio[tuple[float, float]]()
    differences: tuple[Difference, ...] = ()
    calibration: Trio[Calibration] = Trio[Calibration]()
    by_position: Trio[tuple[PositionLoss, ...]] = Trio[tuple[PositionLoss, ...]]()
    worst: tuple[WorstSample, ...] = ()


class ResidualStd(Schema):
    """Mean standard deviation of the residual stream over its width, layer by layer, on held-out text.

    Attributes:
        ordinary_pre: what block 0, 1, ... reads, and last what ln_f reads; over positions that are neither position 0
            nor end-of-text tokens. ordinary_mid: between attention and MLP of each block.
        first_pre, first_mid: the same at position 0.
        tokens: read.
    """

    ordinary_pre: tuple[float, ...]
    ordinary_mid: tuple[float, ...]
    first_pre: tuple[float, ...]
    first_mid: tuple[float, ...]
    tokens: PositiveInt


class OddText(Schema):
    """Mean loss on token sequences unlike text, and the highest mean of a single sequence.

    Attributes:
        kind: see `odd_text.KINDS`. sequences: of `context` tokens each.
        loss, median, worst: over tokens, over tokens, and of the worst sequence.
        sample: the beginning of the sequence that was worst for the model `ranked_by`.
    """

    kind: str
    sequences: PositiveInt
    context: PositiveInt
    loss: Trio[float]
    median: Trio[float]
    worst: Trio[float]
    ranked_by: str
    sample: str


class Continuation(Schema):
    """What each model wrote after `prompt`, drawn with the same seed."""

    prompt: str
    temperature: float
    seed: NonNegativeInt
    texts: Trio[str]
