"""Compare models on the same input: the tokens of a data set, stress texts, and prompts that they continue.

Shape legend: M scored tokens, N windows or sequences, T positions, U units of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ln_removal.data.sampler import Window
from ln_removal.data.tokens import Tokens
from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import CONFIDENCE, Units, bootstrap_means, units_of
from ln_removal.evaluation.loss import BATCH_TOKENS, LossResult, position_losses, scoring
from ln_removal.evaluation.results import (
    ROLES,
    ByRole,
    Calibration,
    DataScores,
    Difference,
    LossSpread,
    PositionLoss,
    StressText,
    WorstSample,
    spread_of,
)
from ln_removal.evaluation.statistics import by_position, token_statistics
from ln_removal.models.loading import positions_of
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ln_removal.config.recipe import WindowKind
    from ln_removal.data.tokens import TokenDataset

Array = npt.NDArray[Any]

WORST_SAMPLES = 6
TOKENS_BEFORE, TOKENS_AFTER = 120, 40
PAIRS = (("ln_free", "control"), ("ln_free", "original"), ("control", "original"))

STRESS_TOKENS_SHOWN = 60
"""Tokens of the worst sequence of a kind of stress text that the results keep."""

TEMPERATURE = 0.8


@dataclass(frozen=True)
class _Reading:
    """What is kept of one model on a data set. Nothing in it has size M."""

    summary: LossResult
    calibration: Calibration
    by_position: tuple[PositionLoss, ...]
    unit_sums: Array  # (U,)
    window_means: Array  # (N,)
    costliest: list[
        tuple[int, float]
    ]  # for each window: the position before its costliest token, and that token's loss


class Comparison:
    """Losses of several models on the same validation tokens, collected one model at a time.

    Args:
        name: of the data set, for the results.
        context, windows, stride, max_tokens: as in `statistics.token_statistics`.
    """

    def __init__(
        self,
        name: str,
        data: TokenDataset,
        *,
        context: int,
        windows: WindowKind = "stream",
        stride: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.data = data
        self.context = context
        self.windows = windows
        self.stride = stride
        self.max_tokens = max_tokens
        self._split = data.split("validation")
        self._readings: dict[str, _Reading] = {}
        self._windows: list[Window] = []
        self._units: Units | None = None

    def add(
        self, role: str, model: nn.Module, *, precision: Precision = "float32", progress: bool | str = False
    ) -> LossResult:
        """Score a model on the tokens; each role once.

        Raises:
            UserError: as `statistics.token_statistics`.
        """
        assert role in ROLES and role not in self._readings, role
        found = token_statistics(
            model,
            self._split,
            context=self.context,
            windows=self.windows,
            stride=self.stride,
            max_tokens=self.max_tokens,
            precision=precision,
            progress=progress,
        )
        if self._units is None:
            self._windows = list(found.windows)
            self._units = units_of(found.windows, self._split, eot_token_id=self.data.eot_token_id)
        sizes = np.array([window.scored for window in found.windows])
        self._readings[role] = _Reading(
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
        return self._readings[role].summary

    def scores(self, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> DataScores:
        """The scores of all models that were added.

        Args:
            tokenizer: the one that made the tokens; it decodes the worst samples.
            seed: of the bootstrap.
        """
        assert self._units is not None, "no model was added"
        readings = self._readings
        summaries = {role: reading.summary for role, reading in readings.items()}
        any_summary = next(iter(summaries.values()))
        intervals, differences = paired_bootstrap(
            {role: reading.unit_sums for role, reading in readings.items()},
            self._units.counts,
            self._units.name,
            seed=seed,
        )
        return DataScores(
            data=self.name,
            tokens=any_summary.tokens,
            windows=any_summary.windows,
            context=self.context,
            stride=self.stride or self.context,
            cross_entropy=ByRole[float](**{role: loss.cross_entropy for role, loss in summaries.items()}),
            bits_per_byte=ByRole[float](**{role: loss.bits_per_byte for role, loss in summaries.items()}),
            loss_spread=ByRole[LossSpread](**{role: spread_of(loss) for role, loss in summaries.items()}),
            interval=ByRole[tuple[float, float]](**intervals),
            differences=differences,
            calibration=ByRole[Calibration](**{role: reading.calibration for role, reading in readings.items()}),
            by_position=ByRole[tuple[PositionLoss, ...]](
                **{role: reading.by_position for role, reading in readings.items()}
            ),
            worst=self._worst(tokenizer),
        )

    def _worst(self, tokenizer: PreTrainedTokenizerBase) -> tuple[WorstSample, ...]:
        """The windows with the highest mean loss under the model of `_last_role`."""
        ranked_by = _last_role(self._readings)
        reading = self._readings[ranked_by]
        order = np.argsort(reading.window_means, kind="stable")[::-1]  # a loss that is NaN comes first
        samples = []
        for number in order[:WORST_SAMPLES]:
            window = self._windows[number]
            position, token_loss = reading.costliest[number]
            tokens = self._split.read(window.shard, window.start, window.count + 1).tolist()
            samples.append(
                WorstSample(
                    ranked_by=ranked_by,
                    loss=ByRole[float](**{role: float(r.window_means[number]) for role, r in self._readings.items()}),
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


def paired_bootstrap(
    sums: Mapping[str, Array], counts: Array, unit: str, *, seed: int
) -> tuple[dict[str, tuple[float, float]], tuple[Difference, ...]]:
    """The interval of each model's mean loss, and the differences of PAIRS with theirs; none from a single unit.

    Args:
        sums: by role, (U,) summed loss of each unit, nats.
        counts: (U,) scored tokens in each unit.
        unit: what the units are, in the plural.
    """
    if len(counts) < 2:
        return {}, ()
    pairs = [(model, than) for model, than in PAIRS if model in sums and than in sums]
    rows = [*sums.values(), *(sums[model] - sums[than] for model, than in pairs)]
    found = bootstrap_means(np.stack(rows), counts, seed=seed)
    intervals = {role: (interval.low, interval.high) for role, interval in zip(sums, found, strict=False)}
    return intervals, tuple(
        Difference(
            model=model,
            than=than,
            mean=interval.value,
            low=interval.low,
            high=interval.high,
            confidence=CONFIDENCE,
            unit=unit,
            units=len(counts),
        )
        for (model, than), interval in zip(pairs, found[len(sums) :], strict=True)
    )


def _last_role(found: Mapping[str, object]) -> str:
    """The LN-free model's role if it is among `found`, else the control's, else the original's."""
    return next(role for role in reversed(ROLES) if role in found)


def stress_losses(
    model: nn.Module, sequences: Mapping[str, Tokens], *, bos: int | None = None, precision: Precision = "float32"
) -> dict[str, Array]:
    """Loss in nats of every token but the first of each sequence: an array (N, T - 1) for each kind.

    Args:
        model: a language model, on the device where it is to run.
        sequences: (N, T) tokens by kind, from `stress_text`; T - 1 is at most the model's positions.
        bos: this token is put in front of each sequence, which loses its last token in exchange. The first token is not
            scored in this case either, so the arrays are (N, T - 2).
    """
    device = next(model.parameters()).device
    losses: dict[str, Array] = {}
    with scoring(model, device, precision):
        for kind, rows in sequences.items():
            assert rows.shape[1] > 1 + (bos is not None), "nothing is scored"
            if bos is not None:
                rows = np.concatenate([np.full((len(rows), 1), bos), rows[:, :-1]], axis=1)
            batch = max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // rows.shape[1])
            parts = []
            for start in range(0, len(rows), batch):
                ids = torch.from_numpy(rows[start : start + batch]).to(device)
                part = position_losses(model, ids[:, :-1], ids[:, 1:].flatten())
                parts.append(part.view(len(ids), -1).cpu().numpy())
            losses[kind] = np.concatenate(parts)[:, bos is not None :]
    return losses


def compare_stress_texts(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Mapping[str, Tokens],
    losses: Mapping[str, Mapping[str, Array]],
    *,
    bos: bool = False,
) -> tuple[StressText, ...]:
    """The losses of several models on stress texts, one entry for each kind.

    Args:
        tokenizer: the one that made the sequences; it decodes the worst of each kind.
        sequences: (N, T) tokens by kind, from `stress_text`.
        losses: by role, from `stress_losses`.
        bos: whether the end-of-text token stood in front of the sequences.
    """
    ranked_by = _last_role(losses)
    found = []
    for kind, rows in sequences.items():
        means = {role: by_kind[kind].mean(axis=1, dtype=np.float64) for role, by_kind in losses.items()}
        worst = int(np.argmax(means[ranked_by]))
        found.append(
            StressText(
                kind=kind,
                bos=bos,
                sequences=len(rows),
                context=rows.shape[1],
                loss=ByRole[float](**{role: float(values.mean()) for role, values in means.items()}),
                median=ByRole[float](**{role: float(np.median(by_kind[kind])) for role, by_kind in losses.items()}),
                worst=ByRole[float](**{role: float(values.max()) for role, values in means.items()}),
                ranked_by=ranked_by,
                sample=str(tokenizer.decode(rows[worst][:STRESS_TOKENS_SHOWN].tolist())),
            )
        )
    return tuple(found)


@torch.inference_mode()
def sample_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 80,
    temperature: float = TEMPERATURE,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """Continue `prompt` token by token, up to an end-of-text token, `max_new_tokens` or the end of the context.

    Each token is drawn with its own uniform number, by inverse transform over the `top_k` tokens in order of their
    probability. The numbers depend on the seed alone, so models with similar predictions write similar texts.

    Args:
        model: a language model in evaluation mode, on the device where it is to run.
        temperature: 0 takes the likeliest token every time.

    Raises:
        UserError: the prompt gives no token, or leaves no room in the model's context.
    """
    positions = positions_of(model.config)
    ids = encode_prompt(tokenizer, prompt, positions)
    device = next(model.parameters()).device
    uniform = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    written: list[int] = []
    cache = None
    step = torch.tensor([ids], device=device)
    for number in range(min(max_new_tokens, positions - len(ids))):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        chosen = _draw(output.logits[0, -1], uniform[number], temperature, top_k)
        if chosen == tokenizer.eos_token_id:
            break
        written.append(chosen)
        # A model without a cache, such as a Mamba, reads everything again.
        step = torch.tensor([[*ids, *written] if cache is None else [chosen]], device=device)
    return str(tokenizer.decode(written))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, positions: int) -> list[int]:
    """The tokens of a prompt that a model with so many positions can continue.

    Raises:
        UserError: the prompt gives no token, or leaves no room in the model's context.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty; give --prompt some text")
    if len(ids) >= positions:
        raise UserError(f"the prompt has {len(ids)} tokens, the model {positions} positions; shorten it")
    return ids


def _draw(logits: Tensor, uniform: float, temperature: float, top_k: int) -> int:
    """A token from logits (V,): the likeliest at temperature 0, else the one at `uniform` of the cumulative probability."""
    values, tokens = logits.double().cpu().topk(min(top_k, logits.numel()))
    if temperature == 0:
        return int(tokens[0])
    cumulative = (values / temperature).softmax(dim=-1).cumsum(dim=-1)
    return int(tokens[min(int((cumulative < uniform).sum()), len(tokens) - 1)])
