"""Stress text: token sequences unlike the text that a model was fine-tuned on, which can make its residual stream explode.

Three samples of 10,000, with form feeds and tabs that OpenWebText does not have, raised the mean loss of the published
LayerNorm-free GPT-2 XL on the Pile from about 2.5 to 130 nats per token (Baroni et al. 2025, arXiv 2507.02559). These sequences
provoke such losses on purpose: `stress_sequences` makes them for scoring, and a `Mixture` puts some of them among the
training sequences (the recipe's data.odd_text).

Shape legend: N sequences of a kind, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.data.tokens import Tokens
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("form feeds", "tabs", "white space", "repeated token", "random tokens")
"""The kinds of sequence that `stress_sequences` makes, in this order."""

LONGEST_RUN = 96
"""Most characters in a run that is drawn. The first sequence of a kind is a single run without end."""

_BETWEEN = ("", "", "\n", "\r\n", " ", "1", "x")
"""What may stand between two runs."""


@dataclass(frozen=True)
class Mixture:
    """`sequences` (N, T + 1) of which one stands in for a training sequence with probability `share`."""

    sequences: Tokens
    share: float

    def draw(self, seed: int, number: int) -> Tokens | None:
        """What stands in for training sequence `number` of a run, or None; a pure function, so resuming is exact."""
        generator = np.random.Generator(np.random.Philox(key=[seed, number], counter=[1, 0, 0, 0]))
        if generator.random() >= self.share:
            return None
        row: Tokens = self.sequences[int(generator.integers(len(self.sequences)))]
        return row


def stress_sequences(
    tokenizer: PreTrainedTokenizerBase, *, context: int, count: int, seed: int = 0
) -> dict[str, Tokens]:
    """Sequences of unusual tokens; the same tokenizer and arguments give the same ones.

    - `form feeds` and `tabs` are runs of that character, of random lengths, sometimes with a line break, a space or a single
      character between them. The first sequence is this one character from end to end.
    - `white space` has runs of spaces, line breaks, carriage returns, vertical tabs and no-break spaces instead.
    - `repeated token` is one token from end to end, drawn anew for each sequence.
    - `random tokens` are drawn uniformly from the vocabulary without its special tokens.

    The first three kinds are text that the tokenizer has encoded, so they hold the tokens that a model gets for such text. A
    sequence does not depend on how many are asked for.

    Args:
        tokenizer: of the models that will read them.
        context: T, tokens in a sequence.
        count: N, sequences of each kind.
        seed: of all draws.

    Returns:
        For each of `KINDS` an (N, T) array of token ids.

    Raises:
        UserError: context or count below 1, or a tokenizer that has no ordinary token, or none for white space.
    """
    if context < 1 or count < 1:
        raise UserError(
            f"stress text needs a context and a count of at least 1, found {context} and {count}; raise them"
        )
    ordinary = _ordinary_tokens(tokenizer)

    def runs(characters: str) -> Callable[[np.random.Generator, int], Tokens]:
        return lambda random, number: _runs(tokenizer, characters, context, random, plain=number == 0)

    makers: dict[str, Callable[[np.random.Generator, int], Tokens]] = {
        "form feeds": runs("\f"),
        "tabs": runs("\t"),
        "white space": runs(" \n\r\v\u00a0"),
        "repeated token": lambda random, _: np.full(context, random.choice(ordinary)),
        "random tokens": lambda random, _: random.choice(ordinary, size=context),
    }
    assert tuple(makers) == KINDS
    return {
        kind: np.stack([make(np.random.default_rng([seed, at, number]), number) for number in range(count)])
        for at, (kind, make) in enumerate(makers.items())
    }


def repeated_sequences(
    tokenizer: PreTrainedTokenizerBase, *, context: int, count: int, period: int, seed: int = 0
) -> Tokens:
    """Random tokens that are said again and again, which only a model that copies from its context can predict.

    Copying is the work of induction heads (Olsson et al. 2022, arXiv 2209.11895).

    Args:
        tokenizer: its vocabulary without special tokens is drawn from, uniformly.
        context: T, tokens in a sequence.
        count: N, how many sequences.
        seed: of all draws. A sequence does not depend on how many are asked for.
        period: tokens before the first one comes again.

    Returns:
        (N, T) token ids.
    """
    ordinary = _ordinary_tokens(tokenizer)
    rows = []
    for number in range(count):
        random = np.random.default_rng([seed, len(KINDS), number])
        rows.append(np.resize(random.choice(ordinary, size=period), context))
    return np.stack(rows)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The ids of the vocabulary without its special tokens, sorted.

    Raises:
        UserError: there is none.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int64)
    if not len(ordinary):
        raise UserError("the tokenizer has only special tokens; use that of a language model")
    return ordinary


def _runs(
    tokenizer: PreTrainedTokenizerBase, characters: str, context: int, random: np.random.Generator, *, plain: bool
) -> Tokens:
    """(T,) tokens of runs of `characters`; `plain` is one character without anything between."""
    text = ""
    ids: list[int] = []
    characters_wanted = context
    while len(ids) < context:
        while len(text) < characters_wanted:
            character = characters[0] if plain else characters[random.integers(len(characters))]
            text += character * int(LONGEST_RUN ** random.random())  # as many short runs as long ones
            text += "" if plain else _BETWEEN[random.integers(len(_BETWEEN))]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(
                f"the tokenizer gives no token for {characters[0]!r}; use a byte-level one, such as GPT-2's"
            )
        # A token can stand for a whole run. Longer text keeps its beginning, so the draws stay the same.
        characters_wanted = max(characters_wanted + 1, characters_wanted * context // len(ids) + LONGEST_RUN)
    return np.array(ids[:context], dtype=np.int64)
