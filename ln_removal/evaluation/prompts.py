"""Cross-entropy where researchers read a model: at the start of documents, and where it can copy from its context.

TransformerLens puts the end-of-text token, which it calls BOS, in front of every prompt. A model that was fine-tuned on a
stream of text has hardly seen that token at position 0, so every figure is taken with it and without it, over the same
targets. Copying a sequence that came before is the work of induction heads (Olsson et al. 2022, arXiv 2209.11895).

Shape legend: N prompts of a kind, T tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ln_removal.data.stress_text import repeated_sequences
from ln_removal.data.tokens import Tokens
from ln_removal.evaluation.compare import paired_bootstrap
from ln_removal.evaluation.loss import BATCH_TOKENS, position_losses, scoring
from ln_removal.evaluation.results import ByRole, PromptScores
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ln_removal.data.tokens import TokenSplit

Array = npt.NDArray[Any]

DOCUMENT_START, RANDOM_COPY, TEXT_COPY = KINDS = (
    "document start",
    "second copy, random tokens",
    "second copy, text",
)
"""The kinds of prompt that `prompt_sets` makes, in this order."""

LENGTH = 128
"""Most tokens in a prompt, the one in front not counted. A copied sequence has half of them."""

DOCUMENTS = 256
"""Most document starts that are scored."""

COPIES = 128
"""Most sequences of random tokens, and of text, that are given twice."""

SHORTEST = 16
"""A document of fewer tokens is not used."""

FEW = 32
"""With fewer long documents than this, shorter ones are used as well."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind, and which of their tokens are scored.

    Attributes:
        tokens: (N, T) int64. Shorter prompts are filled up behind `stops`; what stands there is read, but changes no score.
        firsts: (N,) index of the first scored token of each prompt; at least 1.
        stops: (N,) index behind its last scored token.
    """

    tokens: Tokens
    firsts: Tokens
    stops: Tokens

    @property
    def counts(self) -> Tokens:
        """(N,) scored tokens in each prompt."""
        return self.stops - self.firsts


def prompt_sets(
    tokenizer: PreTrainedTokenizerBase,
    split: TokenSplit,
    *,
    positions: int,
    max_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, PromptSet]:
    """Prompts of each of `KINDS`; the same tokenizer, split and arguments give the same ones.

    - `document start`: the first 128 tokens of documents, which are spread evenly over the split. The first of them is not
      scored, because nothing predicts it unless the end-of-text token stands in front.
    - `second copy, random tokens`: 64 random tokens twice. The scored tokens are those of the second copy but its first.
      That one cannot be copied: no earlier token shows what follows the end of the first copy.
    - `second copy, text`: the same with 64 tokens from inside a document.

    A model with fewer than 128 positions gets prompts of as many tokens as it has positions. Where fewer than 32 documents
    are long enough, documents of 16 tokens and more are taken as well, and used whole. The end-of-text token behind a
    document is not part of it.

    Args:
        tokenizer: of the models that will read the prompts.
        split: held-out tokens of the same tokenizer.
        positions: of the model with the fewest.
        max_tokens: fewer prompts are made, so that those of a kind have about this many tokens at most.
        seed: of all draws.

    Returns:
        The prompts by kind. A kind is left out when no document has 16 tokens, or the model too few positions.
    """
    length = min(LENGTH, positions)
    period = length // 2
    most = DOCUMENTS if max_tokens is None else max(1, max_tokens // length)
    count = min(COPIES, most)
    copies = repeated_sequences(tokenizer, context=2 * period, count=count, seed=seed, period=period)
    found = {
        DOCUMENT_START: _document_starts(split, length, min(DOCUMENTS, most)),
        RANDOM_COPY: PromptSet(copies, np.full(count, period + 1), np.full(count, 2 * period)),
        TEXT_COPY: _text_copies(split, period, count, seed),
    }
    return {kind: some for kind, some in found.items() if some is not None and (some.counts > 0).all()}


def prompt_losses(
    model: nn.Module, prompts: Mapping[str, PromptSet], *, eot_token_id: int, precision: Precision = "float32"
) -> dict[tuple[str, bool], Array]:
    """Mean loss of each prompt in nats per scored token: an array (N,) for each kind, without (False) and with (True) BOS.

    Args:
        model: a language model, on the device where it is to run; T is at most its positions.
        prompts: from `prompt_sets`.
        eot_token_id: the token that is put in front: the end-of-text token, or the one with which the model's texts begin.

    Returns:
        float64 means of losses that are computed in float32, or in float64 for a float64 model.
    """
    device = next(model.parameters()).device
    with scoring(model, device, precision):
        return {
            (kind, bos): _mean_losses(model, some, eot_token_id if bos else None, device)
            for kind, some in prompts.items()
            for bos in (False, True)
        }


def compare_prompts(
    prompts: Mapping[str, PromptSet], losses: Mapping[str, Mapping[tuple[str, bool], Array]], *, seed: int = 0
) -> Iterator[PromptScores]:
    """The losses of several models on the same prompts, one entry for each kind without and with BOS.

    Args:
        prompts: from `prompt_sets`.
        losses: by role, from `prompt_losses`.
        seed: of the bootstrap.
    """
    for kind, some in prompts.items():
        for bos in (False, True):
            sums = {role: found[kind, bos] * some.counts for role, found in losses.items()}
            tokens = int(some.counts.sum())
            yield PromptScores(
                kind=kind,
                bos=bos,
                sequences=len(some.counts),
                tokens=tokens,
                loss=ByRole[float](**{role: float(values.sum() / tokens) for role, values in sums.items()}),
                differences=paired_bootstrap(sums, some.counts, "prompts", seed=seed)[1],
            )


def _mean_losses(model: nn.Module, prompts: PromptSet, bos: int | None, device: torch.device) -> Array:
    """(N,) mean loss of each prompt, with the token `bos` in front if it is given."""
    rows, shift = prompts.tokens, 0
    if bos is not None:
        rows, shift = np.concatenate([np.full((len(rows), 1), bos), rows], axis=1), 1
    batch = max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // rows.shape[1])
    columns = np.arange(rows.shape[1] - 1)  # column c predicts token c + 1
    means = []
    for start in range(0, len(rows), batch):
        some = slice(start, start + batch)
        firsts, stops = (edge[some, None] + shift - 1 for edge in (prompts.firsts, prompts.stops))
        scored = torch.from_numpy(np.flatnonzero((columns >= firsts) & (columns < stops))).to(device)
        ids = torch.from_numpy(rows[some]).to(device)
        losses = position_losses(model, ids[:, :-1], ids[:, 1:].flatten()[scored], scored).double().cpu().numpy()
        counts = prompts.counts[some]
        means.append(np.add.reduceat(losses, np.cumsum(counts) - counts) / counts)
    return np.concatenate(means)


def _document_starts(split: TokenSplit, length: int, count: int) -> PromptSet | None:
    documents = _documents(split, length)
    documents = documents[_evenly(len(documents), min(count, len(documents)))]
    return _filled([split.read(shard, start, min(length, size)) for shard, start, size in documents.tolist()])


def _text_copies(split: TokenSplit, period: int, count: int, seed: int) -> PromptSet | None:
    documents = _documents(split, period + 1)  # one more, so that the text begins inside the document
    random = np.random.default_rng([seed, KINDS.index(TEXT_COPY)])
    places = set()
    for shard, start, size in documents[_evenly(len(documents), count)].tolist():
        taken = min(period, size - 1)
        places.add((shard, start + int(random.integers(1, size - taken + 1)), taken))
    rows = [split.read(*place) for place in sorted(places)]
    return _filled([np.tile(row, 2) for row in rows], firsts=[len(row) + 1 for row in rows])


def _documents(split: TokenSplit, wanted: int) -> Tokens:
    """(D, 3) shard, start and tokens of the documents with `wanted` tokens; with SHORTEST of them where few have as many."""
    found = [np.empty((0, 3), np.int64)]
    for shard, (starts, data) in enumerate(zip(split.document_starts, split.maps, strict=True)):
        last = len(data) - int(data[-1] == split.eot_token_id)
        sizes = np.append(starts[1:] - 1, last) - starts
        found.append(np.stack([np.full_like(starts, shard), starts, sizes], axis=1))
    documents = np.concatenate(found)
    long = documents[documents[:, 2] >= wanted]
    return long if len(long) >= FEW else documents[documents[:, 2] >= min(SHORTEST, wanted)]


def _evenly(size: int, count: int) -> Tokens:
    """`count` indices into `size` things, spread evenly; empty where there is none."""
    return np.arange(count) * size // count if size else np.empty(0, np.int64)


def _filled(rows: list[Tokens], firsts: list[int] | None = None) -> PromptSet | None:
    """Rows of different lengths as one array, with zeros behind their ends; None when there is no row."""
    if not rows:
        return None
    stops = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), stops.max()), np.int64)
    for filled, row in zip(tokens, rows, strict=True):
        filled[: len(row)] = row
    return PromptSet(tokens, np.ones_like(stops) if firsts is None else np.array(firsts), stops)
