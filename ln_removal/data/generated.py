"""Text that a model writes itself, as a corpus: for a model whose training text nobody has.

Every document begins behind an end-of-text token, or behind the token that the model's tokenizer puts in front of texts. That is the
model's only input at first. The document is drawn token by token from the model's own probabilities, until it draws an end-of-text
token or has no position left.

Shape legend: B documents written together, P positions of the model, V entries of the tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from ln_removal.data.corpora import GENERATED, VALIDATION_FRACTION, TokenDocument, check_fraction, hash_split
from ln_removal.errors import UserError
from ln_removal.models.checks import begins_texts
from ln_removal.models.loading import load_model, positions_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ln_removal.models.loading import LoadedModel

SEED = 0

MOST_TOGETHER = {"cpu": 64, "cuda": 256}
"""B at most. Measured on a CPU with the embedded model: docs/LOG.md."""

CPU_CACHE_BYTES = 1 << 30
"""Keys and values of a batch on a CPU. On a GPU they may take a quarter of its memory."""

CHECK_EVERY = 16
"""After so many tokens it is looked which documents have ended. The check waits for the device."""

STILL_WRITTEN = 0.75
"""Ended documents leave the batch when no more than this share of it is still written."""

MOST_EMPTY_IN_A_ROW = 64

LONGEST_DOCUMENT = 2048
"""Tokens of a document at most, whatever the model could read: each takes a forward pass."""


class GeneratedText:
    """The `generated` corpus: what a model writes when it is given nothing but an end-of-text token.

    The numbers that decide document n are drawn with a generator of its own, seeded with (SEED, n). So a document does not depend
    on how many were written before. Documents are always written in the same batches, because rounding in a matrix product
    depends on the size of the batch: on one machine a resumed preparation gets the same documents to the last token.

    A model sometimes ends a document at once. Such a document counts, but it has no tokens, not even the end-of-text token: a
    pair of end-of-text tokens is nothing that a model should learn from. A document that fills the context gets its
    end-of-text token too, so that the next one is not read as its continuation.

    Args:
        model: `tiny`, a directory or a Hub id: a model of any family that `load_model` takes, with LayerNorm or without.
        max_tokens: the training tokens at which the preparation stops; without a number the corpus would not end.
        validation_fraction: share of the documents held out for validation (see `hash_split`).
        device: "auto" takes a CUDA GPU when there is one.

    Raises:
        UserError: `max_tokens` is missing, or the share is not one.
    """

    name = GENERATED

    def __init__(
        self,
        model: str | Path,
        *,
        max_tokens: int | None = None,
        validation_fraction: float = VALIDATION_FRACTION,
        device: str = "auto",
    ) -> None:
        if max_tokens is None:
            raise UserError(
                f"{model} can write without end; say how many training tokens to keep: --max-tokens N (data.max_tokens in a recipe)"
            )
        self.model = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else str(model)
        self.validation_fraction = check_fraction(validation_fraction)
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

    @cached_property
    def _loaded(self) -> LoadedModel:
        return load_model(self.model, device=self._device)

    def identity(self) -> dict[str, object]:
        return {
            "name": self.name,
            "model": self.model,
            "weights_sha256": _weights_sha256(self._loaded.model),
            "seed": SEED,
            "validation_fraction": self.validation_fraction,
        }

    def documents(self, skip: int = 0) -> Iterator[TokenDocument]:
        """Yield the documents after the first `skip`, without end.

        Of the skipped ones, at most those of one batch are written again.

        Raises:
            UserError: the tokenizer has no end-of-text token, or the model writes nothing behind it.
        """
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        eot = tokenizer.eos_token_id
        if not isinstance(eot, int):
            raise UserError(
                f"the tokenizer of {self.model} has no end-of-text token, behind which a document could begin; give one to it "
                "with tokenizer.eos_token and save it again"
            )
        together, empty = documents_together(model), 0
        first_input = begins_texts(tokenizer)
        for first in count(skip - skip % together, together):
            numbers = range(first, first + together)
            written = write_documents(model, numbers, eot_token_id=eot, entries=len(tokenizer), first_input=first_input)
            for number, tokens in zip(numbers, written, strict=True):
                empty = 0 if tokens else empty + 1
                if empty == MOST_EMPTY_IN_A_ROW:
                    raise UserError(
                        f"{self.model} ended {empty} documents in a row at once: it seems to have been trained without "
                        "end-of-text tokens in front of documents, so it cannot write a corpus; prepare a text of your own"
                    )
                if number >= skip:
                    split = hash_split(number, f"{self.name}:{number}", self.validation_fraction)
                    yield TokenDocument(tokens, split, self.name)


def documents_together(model: PreTrainedModel) -> int:
    """B: as many documents as a batch may have on the model's device. It is the same in every process on a machine."""
    config, kind = model.config, model.device.type
    position = 2 * config.num_hidden_layers * config.hidden_size * next(model.parameters()).itemsize
    room = torch.cuda.get_device_properties(model.device).total_memory // 4 if kind == "cuda" else CPU_CACHE_BYTES
    return max(1, min(MOST_TOGETHER.get(kind, MOST_TOGETHER["cpu"]), room // (position * _positions(model))))


@torch.inference_mode()
def write_documents(
    model: PreTrainedModel,
    numbers: Sequence[int],
    *,
    eot_token_id: int,
    entries: int,
    first_input: int | None = None,
) -> list[list[int]]:
    """The documents with these numbers, as tokens that end with the end-of-text token; empty for one that ended at once.

    Each token is drawn by inverse transform from the whole distribution at temperature 1.

    Args:
        model: a language model in evaluation mode.
        numbers: (B,) of the documents; they seed what is drawn.
        eot_token_id: the token at which a document ends.
        entries: V, of the tokenizer. A model may have more rows, which stand for nothing and are not drawn.
        first_input: default: the end-of-text token.
    """
    device, positions = model.device, _positions(model)
    draws = [np.random.default_rng((SEED, number)).random(positions) for number in numbers]
    uniform = torch.from_numpy(np.stack(draws)).to(device)  # (B, P)
    written = torch.full((len(numbers), positions), eot_token_id, device=device)
    rows = torch.arange(len(numbers), device=device)  # of `written`: those in the batch
    tokens = torch.full_like(written[:, :1], eot_token_id if first_input is None else first_input)
    layers = [_Layer(positions) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    for position in range(positions):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1, :entries]
        cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # (B, V)
        wanted = uniform[rows, position, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=entries - 1)
        written[rows, position] = tokens[:, 0]
        if (position + 1) % CHECK_EVERY:
            continue
        going = (written[rows, : position + 1] != eot_token_id).all(dim=1).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= STILL_WRITTEN * len(rows):
            rows, tokens = rows[going], tokens[going]
            for layer in layers:
                layer.keep(going)
    return [_document(row, eot_token_id) for row in written.tolist()]


def _document(written: list[int], eot: int) -> list[int]:
    """What was written before the first end-of-text token, and that token; nothing if there is nothing before it."""
    end = written.index(eot) if eot in written else len(written)
    return [*written[:end], eot] if end else []


def _positions(model: PreTrainedModel) -> int:
    return min(positions_of(model.config), LONGEST_DOCUMENT)


def _weights_sha256(model: PreTrainedModel) -> str:
    """A hash of every tensor of the model, with its name and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Layer(DynamicLayer):
    """Keys and values of a layer, in memory for all positions.

    transformers' own layer copies everything for each new token, which takes longer than the model itself.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()
        self._positions, self._used = positions, 0
        self._all: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of shape (B, heads, new positions, width of a head); returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self._all = [
                states.new_empty(batch, heads, self._positions, width) for states in (key_states, value_states)
            ]
        begin, self._used = self._used, self._used + key_states.shape[2]
        for whole, states in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, begin : self._used] = states
        self.keys, self.values = (whole[:, :, : self._used] for whole in self._all)
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Keep only these documents of the batch."""
        self._all = [whole[rows] for whole in self._all]
