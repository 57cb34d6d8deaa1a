"""Cross-entropy of a causal language model on a token split: its mean, its standard error and percentiles of the tokens' losses.

A mean alone does not show the few tokens on which an LN-free model can fail. Three samples of 10,000 took the mean of the
published LN-free GPT-2 XL on the Pile from about 2.5 to 130 nats (Baroni et al. 2025).

Shape legend: B batch, T positions, V vocabulary, M scored positions, F numbers kept of each position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ln_removal.data.documents import plan_documents
from ln_removal.data.sampler import Window, evenly, plan_windows
from ln_removal.errors import UserError
from ln_removal.models.families import known_family
from ln_removal.models.precision import Precision, autocast, fused_gelu

if TYPE_CHECKING:
    from ln_removal.config.recipe import WindowKind
    from ln_removal.data.tokens import TokenSplit

Measure = Callable[[Tensor, Tensor], Tensor]
"""Takes logits (m, V), which it may overwrite, and targets (m,) of m positions; returns what is kept of each: (m,), or (F, m)."""

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Elements of the logits that exist at once. Small chunks stay in the cache of a CPU; a GPU needs larger ones to be busy."""

CHUNK_POSITIONS = 256
"""Positions in such a chunk, at least. Each chunk reads the unembedding, which is larger than the caches for a large vocabulary."""

BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}
"""Tokens in one forward pass when the batch size is "auto": few on a CPU, so that the activations stay in its caches."""


WINDOW_CHECK_TOKENS = 16_384
"""Tokens that `loss_by_windows` reads: a second or two on a CPU, for a small model."""

WINDOW_CHECK_DOCUMENTS = 20
"""With fewer documents the difference says little."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss of one model on one split. Losses are in nats per token.

    Attributes:
        cross_entropy: mean over all scored tokens.
        standard_error: of the mean, taken over windows because tokens in a window are not independent; None for a single
            window.
        bits_per_byte: cross_entropy / ln 2 * tokens / bytes, with the tokens and bytes of the whole split; None where
            the number of bytes is not known.
        median, percentile_95, percentile_99_9: of the per-token losses.
        tokens, windows: how many were scored.
    """

    cross_entropy: float
    standard_error: float | None
    bits_per_byte: float | None
    median: float
    percentile_95: float
    percentile_99_9: float
    tokens: int
    windows: int


def cross_entropy(
    model: nn.Module,
    split: TokenSplit,
    *,
    context: int,
    windows: WindowKind = "stream",
    batch_size: int | Literal["auto"] = "auto",
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> LossResult:
    """Score `model` on windows of `context` input tokens, or on documents.

    In a stream, successive windows overlap by one token, so every token but the first of a shard is predicted exactly once.
    The last window of a shard may be shorter. A document is read from its start, without the one before it, and its first
    `context` targets are scored. With `max_tokens`, whole windows or documents that are spread evenly over the split are
    scored; they are the same for every model.

    Args:
        model: a Hugging Face causal language model; with norms, with freezable norms installed, or without.
        context: input tokens in a window (at most the model's positions).
        windows: "stream" or "document", as the model was trained.
        batch_size: windows in one forward pass, or "auto".
        max_tokens: score about this many tokens at most; None scores the whole split.
        device: where to compute. Default: where the model is. The model itself is not moved.
        precision: "bfloat16" and "float16" run the forward pass under autocast. Losses are computed in float32, or in
            float64 for a float64 model.
        progress: show a progress bar on standard error; a string is its label.

    Raises:
        UserError: the split is too small to score, or the context is longer than the model's.
    """
    plan = windows_to_score(model, split, context=context, windows=windows, max_tokens=max_tokens)
    losses = score_windows(
        model, split, plan, nll, batch_size=batch_size, device=device, precision=precision, progress=progress
    )
    return summarise(losses, [window.scored for window in plan], tokens=split.tokens, size=split.bytes)


def windows_to_score(
    model: nn.Module,
    split: TokenSplit,
    *,
    context: int,
    windows: WindowKind = "stream",
    max_tokens: int | None = None,
    stride: int | None = None,
) -> list[Window]:
    """`plan_windows` or `plan_documents` of a split, for a model that can read them.

    Raises:
        UserError: the split is too small to score, the context is longer than the model's, the stride longer than the context,
            or there is a stride and the windows are documents.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise UserError(
            f"the context of {context} tokens is longer than the model's {positions} positions; "
            f"evaluate with a context of at most {positions}"
        )
    if context < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"nothing to score: context {context}, at most {max_tokens} tokens; both must be at least 1")
    if stride is not None and not 1 <= stride <= context:
        raise UserError(
            f"the stride of {stride} tokens is not between 1 and the context of {context}; change one of them"
        )
    if windows == "document" and stride is not None:
        raise UserError(
            "documents are scored from their start, without a stride; leave out the stride, or score a stream"
        )
    if windows == "document":
        plan = plan_documents(split, context, max_tokens)
    else:
        plan = plan_windows([shard.tokens for shard in split.shards], context, max_tokens, stride)
    if not plan:
        raise UserError(
            f"the {split.name} split has {split.tokens} tokens, too few to score (2 or more in a shard are needed); "
            "prepare more text"
        )
    return plan


def score_windows(
    model: nn.Module,
    split: TokenSplit,
    windows: Sequence[Window],
    measure: Measure,
    *,
    batch_size: int | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> np.ndarray[Any, Any]:
    """What `measure` returns for every scored target, window after window.

    The longest windows are read first, and those of a batch are padded at their end: no position sees what comes behind it.

    Other arguments are those of `cross_entropy`.

    Returns:
        (M,) or (F, M), float32, or float64 for a float64 model.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    budget = _batch_tokens(model, device)
    ends = np.cumsum([window.scored for window in windows])
    total = int(ends[-1])
    figures: np.ndarray[Any, Any] | None = None
    label = progress if isinstance(progress, str) else "loss"
    with scoring(model, device, precision), tqdm(total=total, desc=label, unit="tok", disable=not progress) as bar:
        for numbers in _batches(windows, budget, None if batch_size == "auto" else batch_size):
            tokens, counted = padded(split, [windows[number] for number in numbers])
            scored = _measured_halving(model, tokens, counted, measure, device).cpu().numpy()
            if figures is None:
                figures = np.empty((*scored.shape[:-1], total), scored.dtype)
            places = [np.arange(ends[number] - windows[number].scored, ends[number]) for number in numbers]
            figures[..., np.concatenate(places)] = scored
            bar.update(scored.shape[-1])
    assert figures is not None, "no window"
    return figures


def padded(split: TokenSplit, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Windows as rows (B, T + 1), zeros behind the shorter ones; and which of their inputs (B, T) are scored."""
    longest = max(window.count for window in windows)
    tokens = np.zeros((len(windows), longest + 1), dtype=np.int64)
    for row, window in zip(tokens, windows, strict=True):
        row[: window.count + 1] = split.read(window.shard, window.start, window.count + 1)
    places = [[window.skip, window.count] for window in windows]
    first, end = torch.tensor(places).unsqueeze(-1).unbind(1)  # (B, 1) each
    index = torch.arange(longest)
    return torch.from_numpy(tokens), (first <= index) & (index < end)


def _batches(windows: Sequence[Window], tokens: int, size: int | None = None) -> Iterator[list[int]]:
    """Numbers of windows, the longest first, in batches of at most so many tokens with their padding, or of `size` windows."""
    order = sorted(range(len(windows)), key=lambda number: -windows[number].count)
    start = 0
    while start < len(order):
        end = start + (size or max(1, tokens // windows[order[start]].count))
        yield order[start:end]
        start = end


def summarise(losses: np.ndarray[Any, Any], counts: list[int], *, tokens: int, size: int) -> LossResult:
    """Mean, standard error, percentiles and bits per byte of per-token losses.

    The standard error is that of a ratio estimate, in which a window weighs as much as it has tokens c_i:
    se^2 = n / (n - 1) * sum_i (c_i / M)^2 (m_i - mean)^2 over the n window means m_i.

    Args:
        losses: (M,) nats, window after window.
        counts: tokens in each window; they sum to M.
        tokens: of the split that the windows come from.
        size: UTF-8 bytes of that split; 0 where they are not known.
    """
    mean = float(losses.mean(dtype=np.float64))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(losses.astype(np.float64), starts)
    error = None
    if len(counts) > 1:
        deviations = (sums - mean * np.asarray(counts)) / losses.size
        error = math.sqrt(len(counts) / (len(counts) - 1) * float(np.square(deviations).sum()))
    median, high, highest = (float(value) for value in np.percentile(losses, [50, 95, 99.9]))
    return LossResult(
        cross_entropy=mean,
        standard_error=error,
        bits_per_byte=mean / math.log(2) * tokens / size if size else None,
        median=median,
        percentile_95=high,
        percentile_99_9=highest,
        tokens=int(losses.size),
        windows=len(counts),
    )


@contextmanager
def scoring(model: nn.Module, device: torch.device, precision: Precision) -> Iterator[None]:
    """A block in evaluation mode, without gradients and with `fused_gelu`, under autocast unless `precision` is "float32".

    Afterwards the model is in training mode again if it was before.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), fused_gelu(model), autocast(device, precision):
            yield
    finally:
        model.train(was_training)


def position_losses(
    model: Any,
    input_ids: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    *,
    measure: Measure | None = None,
    **inputs: Any,
) -> Tensor:
    """Negative log-probability in nats of a target at each chosen position, or what `measure` computes from the logits.

    The unembedding is applied to a chunk of positions at a time, so the logits of the whole batch never exist together.
    This needs a model of a known family, whose logits are `lm_head` of what its body returns. Any other model is called as a whole:
    some scale or bend their logits afterwards.

    Args:
        model: a language model in evaluation mode.
        input_ids: (B, T) tokens.
        targets: (M,) tokens to predict.
        positions: (M,) flat indices b * T + t of the positions that predict the targets; None for all B * T.
        measure: default: `nll`.
        **inputs: further inputs of the model, such as `position_ids` or `attention_mask`.

    Returns:
        (M,) or (F, M), float32, or float64 for a float64 model.
    """
    measure = measure or nll
    if not _has_body(model):
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits.flatten(0, 1)
        return measure(_wide(logits if positions is None else logits[positions]), targets)
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
    if positions is not None:
        hidden = hidden[positions]
    rows = _chunk_positions(model, hidden.device)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([measure(_wide(model.lm_head(some)), theirs) for some, theirs in chunks], dim=-1)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(m,) negative log-probabilities of targets (m,) under logits (m, V), in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _measured_halving(
    model: nn.Module, batch: Tensor, counted: Tensor, measure: Measure, device: torch.device
) -> Tensor:
    """What `measure` returns for the M counted (B, T) targets of windows (B, T + 1), row after row: (M,) or (F, M).

    A batch that does not fit into the GPU's memory is computed in two halves.
    """
    inputs, targets, positions = batch[:, :-1].to(device), batch[:, 1:].flatten(), None
    if not counted.all():  # both are still on the CPU
        chosen = counted.flatten().nonzero().squeeze(1)
        targets, positions = targets[chosen], chosen.to(device)
    try:
        return position_losses(model, inputs, targets.to(device), positions, measure=measure)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Here, outside the handler, the frames of the exception and with them the tensors of the failed batch are freed.
    halves = zip(batch.tensor_split(2), counted.tensor_split(2), strict=True)
    return torch.cat([_measured_halving(model, *half, measure, device) for half in halves], dim=-1)


def _has_body(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    known = hasattr(config, "model_type") and known_family(config) is not None
    return known and hasattr(model, "lm_head") and getattr(model, "base_model", model) is not model


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _batch_tokens(model: nn.Module, device: torch.device) -> int:
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    if _has_body(model):
        return budget
    return min(budget, _chunk_positions(model, device))


def _chunk_positions(model: nn.Module, device: torch.device) -> int:
    return max(CHUNK_POSITIONS, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // _vocabulary(model))


@dataclass(frozen=True, slots=True)
class LossByWindows:
    """Mean loss of a model on the same targets, read in two ways, in nats per token.

    Attributes:
        document: each document read from its start.
        stream: read behind the text that precedes it in the shard.
        standard_error: of the difference, over documents.
        tokens, documents: how many targets there are, and in how many documents.
    """

    document: float
    stream: float
    standard_error: float
    tokens: int
    documents: int


def loss_by_windows(
    model: nn.Module, split: TokenSplit, *, context: int, precision: Precision = "float32"
) -> LossByWindows | None:
    """How well `model` reads documents from their start, and how well in the middle of a stream.

    The targets are the same: those of a document's first inputs, at most half a context of them. In the stream half a context
    stands before them. About WINDOW_CHECK_TOKENS tokens are read, of documents that are spread evenly over the split.

    Returns:
        None if the split has fewer than WINDOW_CHECK_DOCUMENTS documents with so much text before them.
    """
    half = context // 2
    pairs = [
        (Window(shard, start, count), Window(shard, start - half, half + count, skip=half))
        for shard, (starts, lengths) in enumerate(zip(split.document_starts, split.document_lengths, strict=True))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        if start >= half and (count := min(half, length - 1)) > 0
    ]
    if len(pairs) < WINDOW_CHECK_DOCUMENTS:
        return None
    mean = sum(alone.count + behind.count for alone, behind in pairs) / len(pairs)
    pairs = evenly(pairs, max(WINDOW_CHECK_DOCUMENTS, round(WINDOW_CHECK_TOKENS / mean)))
    alone, behind = (
        score_windows(model, split, windows, nll, precision=precision).astype(np.float64)
        for windows in zip(*pairs, strict=True)
    )
    counts = [document.count for document, _ in pairs]
    difference = summarise(alone - behind, counts, tokens=0, size=0)
    assert difference.standard_error is not None
    return LossByWindows(float(alone.mean()), float(behind.mean()), difference.standard_error, len(alone), len(pairs))
