"""Token sequences unlike the text that a model was fine-tuned on: what can make a LayerNorm-free residual stream explode.

Three samples of 10,000, with form feeds and tabs that OpenWebText does not have, took the published LayerNorm-free GPT-2
XL from about 2.5 to 130 nats per token on the Pile (Baroni et al. 2025). These sequences ask for that on purpose.

Shape legend: N sequences of a kind, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ln_removal.data.tokens import Tokens
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("form feeds", "tabs", "white space", "repeated token", "random tokens")
"""What `odd_sequences` makes, in this order."""

LONGEST_RUN = 96
"""Characters in a run that is drawn; the first sequence of a kind is one run."""

_BETWEEN = ("", "", "\n", "\r\n", " ", "1", "x")
"""What may stand between two runs."""


def odd_sequences(tokenizer: PreTrainedTokenizerBase, *, context: int, count: int, seed: int = 0) -> dict[str, Tokens]:
    """Sequences of unusual tokens, the same ones for the same tokenizer and arguments.

    - `form feeds`, `tabs`: runs of that character, of random lengths, sometimes with a line break, a space or a single
      character between them; the first sequence is one character from end to end.
    - `white space`: the same with runs of spaces, line breaks, carriage returns, vertical tabs, no-break spaces.
    - `repeated token`: one token, drawn anew for each sequence, from end to end.
    - `random tokens`: every token drawn uniformly from the vocabulary, special tokens left out.

    The first three are text as the tokenizer cuts it, so they hold the tokens that such text would give a model. A
    sequence of a kind does not depend on how many are asked for.

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
        raise UserError(f"odd text needs a context and a count of at least 1; found {context} and {count}")
    special = set(tokenizer.all_special_ids)
    ordinary = np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int64)
    if not len(ordinary):
        raise UserError("the tokenizer has only special tokens; use that of a language model")

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
