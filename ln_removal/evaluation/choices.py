"""Log-probabilities of several endings of one context, computed in one forward pass that reads the context once.

A row holds context + ending 1 + ending 2 + ... An attention mask lets each ending attend to the context and to itself, and
its position ids continue from the context, so every ending is scored as if it were the only one:

    tokens     c0 c1 c2 a0 a1 b0 b1 b2
    positions   0  1  2  3  4  3  4  5
    b1 sees     x  x  x        x  x

Shape legend: B rows of a batch, T positions, M scored tokens, E endings of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ln_removal.errors import UserError
from ln_removal.evaluation.loss import BATCH_TOKENS, position_losses, scoring
from ln_removal.models.loading import positions_of
from ln_removal.models.precision import Precision

CONTEXT, PADDING = 0, -1  # segments of a row; ending e is segment e + 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a context and of its endings; error messages use `name`."""

    name: str
    context: list[int]
    endings: list[list[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """What is computed in one row: a context, different endings, and for each ending the (prompt, ending) pairs it answers."""

    context: list[int]
    endings: list[list[int]]
    answers: list[list[tuple[int, int]]]

    @property
    def length(self) -> int:
        """Positions in the row. The last token of an ending is only predicted, so it takes none."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def ending_log_probs(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int | Literal["auto"] = "auto",
    packed: bool | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> list[npt.NDArray[np.float64]]:
    """Summed log-probability, in nats, of every ending after its context.

    A context that does not fit is cut at its left end, for each ending by as much as that ending needs. This is lm-eval's
    rule: it keeps the last n_positions + 1 tokens of context and ending, of which the last is only predicted.

    Args:
        model: a Hugging Face causal language model; with norms, with freezable norms, or without.
        prompts: contexts and endings; none of them empty.
        batch_tokens: positions in one forward pass, padding included, or "auto".
        packed: whether all endings of a prompt share a row. Default: they do where model and attention implementation
            accept a mask (GPT-2 with sdpa or eager attention).
        device: where to compute. Default: where the model is.
        precision: "bfloat16" runs the forward pass under autocast.
        progress: show a progress bar on standard error; a string is its label.

    Returns:
        For each prompt an array (E,).

    Raises:
        UserError: an ending is longer than the model's context, or a score is not finite.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) if batch_tokens == "auto" else batch_tokens
    rows = pack(prompts, _positions(model), together=takes_tree_mask(model) if packed is None else packed)
    scores = [np.full(len(prompt.endings), np.nan) for prompt in prompts]
    label = progress if isinstance(progress, str) else "endings"
    total = sum(len(prompt.endings) for prompt in prompts)
    with scoring(model, device, precision), tqdm(total=total, desc=label, unit="ending", disable=not progress) as bar:
        for batch in batches(rows, budget):
            values = iter(_batch_log_probs(model, batch, device))
            for answered in (slot for row in batch for slot in row.answers):
                value = next(values)
                for prompt, ending in answered:
                    scores[prompt][ending] = value
                bar.update(len(answered))
    for prompt_, found in zip(prompts, scores, strict=True):
        if not np.isfinite(found).all():
            raise UserError(
                f"{prompt_.name}: the model's log-probabilities are not finite ({found.tolist()}); its weights are "
                "damaged or overflow in this precision, try float32"
            )
    return scores


def takes_tree_mask(model: Any) -> bool:
    """Whether `model` accepts an attention mask (B, 1, T, T) and position ids."""
    learned_positions = hasattr(getattr(model, "transformer", None), "wpe")
    return learned_positions and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")


def pack(prompts: Sequence[Prompt], n_positions: int, *, together: bool) -> list[Row]:
    """Rows that answer all prompts. The longest come first, so that a lack of memory shows in the first batch.

    Equal endings of a prompt are computed once, which also makes their scores exactly equal. With `together`, endings
    share a row where the same part of the context fits in front of them.
    """
    rows: list[Row] = []
    for number, prompt in enumerate(prompts):
        assert all([prompt.context, *prompt.endings]), f"{prompt.name}: an empty context or ending"
        groups: dict[tuple[int, int], dict[tuple[int, ...], list[tuple[int, int]]]] = {}
        for index, ending in enumerate(prompt.endings):
            kept = min(len(prompt.context), n_positions + 1 - len(ending))
            if kept < 1:
                raise UserError(
                    f"{prompt.name}: ending {index} has {len(ending)} tokens, the model reads {n_positions}; leave the "
                    "question out or use a model with a longer context"
                )
            answers = groups.setdefault((kept, 0 if together else index), {})
            answers.setdefault(tuple(ending), []).append((number, index))
        for (kept, _), answers in groups.items():
            rows.append(Row(prompt.context[-kept:], [list(ending) for ending in answers], list(answers.values())))
    return sorted(rows, key=lambda row: -row.length)


def batches(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Batches of successive rows whose padded size is at most `budget` positions; one row at least."""
    start = 0
    while start < len(rows):
        count = max(1, budget // rows[start].length)
        yield rows[start : start + count]
        start += count


def _batch_log_probs(model: nn.Module, rows: list[Row], device: torch.device) -> npt.NDArray[np.float64]:
    """Summed log-probabilities of the endings of `rows`, in order; rows that do not fit into memory are computed in halves."""
    try:
        inputs, positions, targets = _tensors(model, rows, device)
        losses = position_losses(model, targets=targets, positions=positions, **inputs).double().cpu().numpy()
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    else:
        lengths = [len(ending) for row in rows for ending in row.endings]
        summed: npt.NDArray[np.float64] = -np.add.reduceat(losses, np.cumsum([0, *lengths[:-1]]))
        return summed
    middle = len(rows) // 2
    return np.concatenate([_batch_log_probs(model, half, device) for half in (rows[:middle], rows[middle:])])


def _tensors(model: Any, rows: list[Row], device: torch.device) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs (B, T) of the model, the flat positions (M,) that predict the endings, and the ending tokens (M,)."""
    width = max(row.length for row in rows)
    input_ids, position_ids = np.zeros((2, len(rows), width), dtype=np.int64)
    segments = np.full((len(rows), width), PADDING, dtype=np.int64)
    predicting: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        size = len(row.context)
        input_ids[number, :size] = row.context
        position_ids[number, :size] = np.arange(size)
        segments[number, :size] = CONTEXT
        start = size
        for index, ending in enumerate(row.endings):
            stop = start + len(ending) - 1
            input_ids[number, start:stop] = ending[:-1]
            position_ids[number, start:stop] = np.arange(size, size + stop - start)
            segments[number, start:stop] = index + 1
            predicting += [number * width + at for at in (size - 1, *range(start, stop))]
            targets += ending
            start = stop
    inputs = {"input_ids": torch.from_numpy(input_ids).to(device)}
    if any(len(row.endings) > 1 for row in rows):
        inputs["position_ids"] = torch.from_numpy(position_ids).to(device)
        inputs["attention_mask"] = _tree_mask(model, torch.from_numpy(segments).to(device))
    # Rows with one ending are plain text padded on the right, for which the model's own mask and positions are right.
    return inputs, torch.tensor(predicting, device=device), torch.tensor(targets, device=device)


def _tree_mask(model: Any, segments: Tensor) -> Tensor:
    """(B, 1, T, T): a position attends to the positions before it in its own segment and in the context.

    The mask is boolean for sdpa and additive for eager attention. Padding attends to the context too, so no row of the
    softmax is empty.
    """
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = (causal & ((key == CONTEXT) | (key == query)))[:, None]
    if model.config._attn_implementation == "sdpa":
        return allowed
    dtype = next(model.parameters()).dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _positions(model: Any) -> int:
    return positions_of(model.config)
