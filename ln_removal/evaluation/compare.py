"""Compare models on the same text: one data set or one set of stress texts, read by several models in turn.

The result has their figures, the differences with bootstrap intervals, and the worst samples.

Shape legend: M scored tokens, N windows or sequences, T positions, U units of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.data.sampler import Window
from ln_removal.data.tokens import Tokens
from ln_removal.evaluation.bootstrap import CONFIDENCE, Units, bootstrap_means, units_of
from ln_removal.evaluation.loss import LossResult
from ln_removal.evaluation.results import (
    ROLES,
    Calibration,
    DataScores,
    Difference,
    LossSpread,
    OddText,
    PositionLoss,
    Trio,
    WorstSample,
    spread_of,
)
from ln_removal.evaluation.statistics import by_position, token_statistics
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ln_removal.data.tokens import TokenDataset

WORST_SAMPLES = 6
TOKENS_BEFORE, TOKENS_AFTER = 120, 40
PAIRS = (("ln_free", "control"), ("ln_free", "original"), ("control", "original"))

SAMPLE_TOKENS = 60
"""Tokens of the worst sequence that are shown."""


@dataclass(frozen=True)
class _Read:
    """What is kept of one model's reading: nothing of size M."""

    summary: LossResult
    calibration: Calibration
    by_position: tuple[PositionLoss, ...]
    unit_sums: npt.NDArray[Any]  # (U,)
    window_means: npt.NDArray[Any]  # (N,)
    costliest: list[tuple[int, float]]  # for each window: the input before its costliest token, and that token's loss


class SideBySide:
    """Collects what models say of the same validation tokens.

    Args:
        name: of the data set, for the results.
        data: prepared tokens.
        context, stride, max_tokens: as in `statistics.token_statistics`.
    """

    def __init__(
        self,
        name: str,
        data: TokenDataset,
        *,
        context: int,
        stride: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.data = data
        self.context = context
        self.stride = stride
        self.max_tokens = max_tokens
        self._split = data.split("validation")
        self._read: dict[str, _Read] = {}
        self._windows: list[Window] = []
        self._units: Units | None = None

    def add(
        self, role: str, model: nn.Module, *, precision: Precision = "float32", progress: bool | str = False
    ) -> LossResult:
        """Let a model read the tokens; each role once.

        Raises:
            UserError: as `statistics.token_statistics`.
        """
        assert role in ROLES and role not in self._read, role
        found = token_statistics(
            model,
            self._split,
            context=self.context,
            stride=self.stride,
            max_tokens=self.max_tokens,
            precision=precision,
            progress=progress,
        )
        if self._units is None:
            self._windows = list(found.windows)
            self._units = units_of(found.windows, self._split, eot_token_id=self.data.eot_token_id)
        sizes = np.array([window.scored for window in found.windows])
        self._read[role] = _Read(
            summary=found.summary(self._split),
            calibration=found.calibration(),
            by_position=by_position(found),
            unit_sums=self._units.sums(found.loss),
            window_means=found.window_sums() / sizes,
            costliest=[
                (window.skip + (at := int(np.argmax(found.loss[place]))), float(found.loss[place][at]))
                for window, place in found.window_slices()
            ],
        )
        return self._read[role].summary

    def scores(self, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> DataScores:
        """The figures of all models that have read.

        Args:
            tokenizer: that made the tokens, to show samples.
            seed: of the bootstrap.
        """
        assert self._units is not None, "no model has read anything"
        summaries = {role: read.summary for role, read in self._read.items()}
        any_summary = next(iter(summaries.values()))
        intervals, differences = self._bootstrap(self._units, seed)
        return DataScores(
            data=self.name,
            tokens=any_summary.tokens,
            windows=any_summary.windows,
            context=self.context,
            stride=self.stride or self.context,
            cross_entropy=Trio[float](**{role: loss.cross_entropy for role, loss in summaries.items()}),
            bits_per_byte=Trio[float](**{role: loss.bits_per_byte for role, loss in summaries.items()}),
            loss_spread=Trio[LossSpread](**{role: spread_of(loss) for role, loss in summaries.items()}),
            interval=Trio[tuple[float, float]](**intervals),
            differences=differences,
            calibration=Trio[Calibration](**{role: read.calibration for role, read in self._read.items()}),
            by_position=Trio[tuple[PositionLoss, ...]](**{role: read.by_position for role, read in self._read.items()}),
            worst=self._worst(tokenizer),
        )

    def _bootstrap(self, units: Units, seed: int) -> tuple[dict[str, tuple[float, float]], tuple[Difference, ...]]:
        """The interval of each mean and of each paired difference; none from a single unit."""
        if len(units.counts) < 2:
            return {}, ()
        roles = list(self._read)
        pairs = [(model, than) for model, than in PAIRS if model in self._read and than in self._read]
        rows = [self._read[role].unit_sums for role in roles]
        rows += [self._read[model].unit_sums - self._read[than].unit_sums for model, than in pairs]
        found = bootstrap_means(np.stack(rows), units.counts, seed=seed)
        intervals = {role: (interval.low, interval.high) for role, interval in zip(roles, found, strict=False)}
        return intervals, tuple(
            Difference(
                model=model,
                than=than,
                mean=interval.value,
                low=interval.low,
                high=interval.high,
                confidence=CONFIDENCE,
                unit=units.name,
                units=len(units.counts),
            )
            for (model, than), interval in zip(pairs, found[len(roles) :], strict=True)
        )

    def _worst(self, tokenizer: PreTrainedTokenizerBase) -> tuple[WorstSample, ...]:
        """The windows with the highest mean loss of the LN-free model, or of the one that there is."""
        ranked_by = next(role for role in reversed(ROLES) if role in self._read)
        read = self._read[ranked_by]
        order = np.argsort(read.window_means, kind="stable")[::-1]  # a loss that is not a number comes first
        samples = []
        for number in order[:WORST_SAMPLES]:
            window = self._windows[number]
            position, token_loss = read.costliest[number]
            tokens = self._split.read(window.shard, window.start, window.count + 1).tolist()
            samples.append(
                WorstSample(
                    ranked_by=ranked_by,
                    loss=Trio[float](**{role: float(r.window_means[number]) for role, r in self._read.items()}),
                    tokens=window.scored,
                    shard=window.shard,
                    start=window.start,
                    position=position,
                    token_loss=token_loss,
                    before=str(tokenizer.decode(tokens[max(0, position + 1 - TOKENS_BEFORE) : position + 1])),
                    token=str(tokenizer.decode(tokens[position + 1 : position + 2])),
                    after=str(tokenizer.decode(tokens[position + 2 : position + 2 + TOKENS_AFTER])),
                )
            )
        return tuple(samples)


def odd_losses(
    model: nn.Module,
    sequences: Mapping[str, Tokens],
    *,
    precision: Precision = "float32",
) -> dict[str, npt.NDArray[Any]]:
    """Loss of every token but the first of each sequence, nats: for each kind an array (N, T - 1).

    Args:
        model: a language model, where it is to run.
        sequences: from `odd_sequences`; T is at least 2 and at most the model's positions.
        precision: of the forward passes.
    """
    import torch

    from ln_removal.evaluation.loss import BATCH_TOKENS, position_losses, scoring

    device = next(model.parameters()).device
    losses: dict[str, npt.NDArray[Any]] = {}
    with scoring(model, device, precision):
        for kind, rows in sequences.items():
            assert rows.shape[1] > 1, "a single token predicts nothing"
            batch = max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // rows.shape[1])
            parts = []
            for start in range(0, len(rows), batch):
                ids = torch.from_numpy(rows[start : start + batch]).to(device)
                part = position_losses(model, ids[:, :-1], ids[:, 1:].flatten())
                parts.append(part.view(len(ids), -1).cpu().numpy())
            losses[kind] = np.concatenate(parts)
    return losses


def compare_odd_text(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Mapping[str, Tokens],
    losses: Mapping[str, Mapping[str, npt.NDArray[Any]]],
) -> tuple[OddText, ...]:
    """Models side by side on odd text, one entry a kind.

    Args:
        tokenizer: that made the sequences.
        sequences: from `odd_sequences`. losses: by role, from `odd_losses`.
    """
    ranked_by = next(role for role in reversed(ROLES) if role in losses)
    found = []
    for kind, rows in sequences.items():
        means = {role: by_kind[kind].mean(axis=1, dtype=np.float64) for role, by_kind in losses.items()}
        worst = int(np.argmax(means[ranked_by]))
        found.append(
            OddText(
                kind=kind,
                sequences=len(rows),
                context=rows.shape[1],
                loss=Trio[float](**{role: float(values.mean()) for role, values in means.items()}),
                median=Trio[float](**{role: float(np.median(by_kind[kind])) for role, by_kind in losses.items()}),
                worst=Trio[float](**{role: float(values.max()) for role, values in means.items()}),
                ranked_by=ranked_by,
                sample=str(tokenizer.decode(rows[worst][:SAMPLE_TOKENS].tolist())),
            )
        )
    return tuple(found)
