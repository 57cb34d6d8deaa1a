"""The attention entropy of every head of one model at one moment, from a run's observations or measured on the spot.

Shape legend: B sequences, T positions, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.analysis.observations import Array, Observations
from ln_removal.attention_entropy import OVERLOAD_SHARE, largest_entropy
from ln_removal.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    from ln_removal.data.tokens import TokenSplit

    Tokens = npt.NDArray[np.int64]

SEQUENCES = 32
"""Sequences that a model is measured on."""

LARGEST_CONTEXT = 1024
"""Context that is measured when none is asked for, or the model's when that is shorter."""

TOKENS_IN_A_PASS = 4096


@dataclass(frozen=True)
class HeadEntropies:
    """Entropy of each head, mean over sequences and queries.

    Attributes:
        name: of the run or model. step: of the run; None for a model as it lies there.
        queries: T. entropy: (L, H), nats; NaN where a head's attention was NaN.
    """

    name: str
    step: int | None
    queries: int
    entropy: Array

    @property
    def title(self) -> str:
        """The name, and below it the step of an observation."""
        return self.name if self.step is None else f"{self.name}\nstep {self.step:,}"

    @property
    def largest(self) -> float:
        """The entropy of a causal head that looks at all of its keys alike, nats."""
        return largest_entropy(self.queries)

    @property
    def overloaded(self) -> npt.NDArray[np.bool_]:
        """(L, H): whether the head's entropy is above 0.9 of the largest possible."""
        return np.asarray(self.entropy > OVERLOAD_SHARE * self.largest)

    @property
    def overload_shares(self) -> Array:
        """(L,): share of each layer's heads in the overload band; a NaN head is not in it."""
        return np.asarray(self.overloaded.mean(axis=1), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """For --json: NaN becomes null."""
        return {
            "name": self.name,
            "step": self.step,
            "queries": self.queries,
            "largest_entropy": self.largest,
            "entropy": nullable(self.entropy),
            "overload_share": self.overload_shares.tolist(),
            "heads_in_overload_band": int(self.overloaded.sum()),
            "heads": int(self.entropy.size),
        }


def observed(run: Observations, step: int | None) -> HeadEntropies:
    """What a run observed at `step`, or last.

    Raises:
        UserError: it was not observed at that step.
    """
    index = run.at(step)
    return HeadEntropies(run.name, int(run.steps[index]), run.queries, run.entropy[index])


def measure(
    models: Sequence[str],
    names: Sequence[str],
    *,
    tokens: str | None,
    text: str | None,
    context: int | None = None,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> list[HeadEntropies]:
    """Load each model in turn and measure its heads, all on sequences of the same length.

    Args:
        models: `tiny`, directories, Hub ids. names: what to call them.
        tokens: a directory of prepared tokens, of which the validation split is read, or None
        text: a text file, which each model's own tokenizer encodes, or None.
        context: positions in a sequence; default: the smallest of the models' contexts, at most LARGEST_CONTEXT.
        sequences: read at most so many, spread evenly over the tokens.
        device: "cpu" or "cuda".

    Raises:
        UserError: a model or the text does not load, is too short for one sequence, or the tokens are another tokenizer's.
    """
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models import load_config, load_model, load_tokenizer, sizes_of

    assert (tokens is None) != (text is None), "either tokens or text"
    positions = {name: int(sizes_of(load_config(name))["n_positions"]) for name in models}
    shortest = min(positions, key=lambda name: positions[name])
    if context is not None and context > positions[shortest]:
        raise UserError(
            f"--context {context} is longer than the {positions[shortest]} positions of {shortest}; ask for at most that"
        )
    length = context or min(LARGEST_CONTEXT, positions[shortest])
    data = None if tokens is None else TokenDataset.open(tokens)
    if data is not None:
        for model in models:
            check_same_tokenizer(load_tokenizer(model), model, data)
    measured = []
    for model, name in zip(models, names, strict=True):
        loaded = load_model(model, device=device)
        if data is not None:
            batch = _spread(data.split("validation"), length, sequences)
        else:
            assert text is not None
            batch = _encode(loaded.tokenizer, text, length, sequences)
        measured.append(HeadEntropies(name, None, length, _mean_entropy(loaded.model, batch)))
    return measured


def nullable(values: Array) -> Any:
    """Nested lists of an array, with None where a value is not finite (JSON has no NaN)."""
    if values.ndim == 0:
        return float(values) if np.isfinite(values) else None
    return [nullable(row) for row in values]


def _mean_entropy(model: Any, tokens: Tokens) -> Array:
    """(L, H) over all of `tokens` (B, T), a few sequences at a time."""
    import torch

    from ln_removal.attention_entropy import head_entropy, record_attention

    sequences, length = tokens.shape
    in_a_pass = max(1, TOKENS_IN_A_PASS // length)
    total: Array | None = None
    for start in range(0, sequences, in_a_pass):
        part = torch.from_numpy(tokens[start : start + in_a_pass]).to(model.device)
        with torch.no_grad(), record_attention(model, head_entropy) as heads:
            model.base_model(input_ids=part, use_cache=False)
        entropy: Array = torch.stack(heads).double().cpu().numpy() * len(part)
        total = entropy if total is None else total + entropy
    assert total is not None
    return total / sequences


def _spread(split: TokenSplit, length: int, sequences: int) -> Tokens:
    """At most `sequences` windows of a split, (B, T), spread evenly over it."""
    starts = [(shard, at) for shard, data in enumerate(split.maps) for at in range(0, len(data) - length + 1, length)]
    if not starts:
        raise UserError(
            f"the {split.name} split has {split.tokens} tokens, too few for a sequence of {length}; prepare more text, or ask "
            "for a shorter --context"
        )
    return np.stack([split.read(*starts[index], length) for index in _evenly(len(starts), sequences)])


def _encode(tokenizer: Any, path: str, length: int, sequences: int) -> Tokens:
    """At most `sequences` windows of a text file, (B, T)."""
    from ln_removal.models import quiet_transformers

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot read the text in {path}: {reason}; give a text file in UTF-8") from error
    with quiet_transformers():  # it warns of a text longer than the context
        ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    count = len(ids) // length
    if not count:
        raise UserError(
            f"{path} has {len(ids)} tokens, too few for a sequence of {length}; give a longer text, or a shorter --context"
        )
    return ids[: count * length].reshape(count, length)[_evenly(count, sequences)]


def _evenly(available: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `available`, or all of them."""
    if available <= wanted:
        return list(range(available))
    return [available * index // wanted for index in range(wanted)]
