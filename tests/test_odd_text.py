"""Odd text: seeded, of the right shape, and of the characters that it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_model import write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ln_removal.data.stress_text import KINDS, repeated_sequences, stress_sequences
from ln_removal.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, texts=["a \n\n\n\n b\t\t\t\tc" + " " * 16 + "\f"] * 50)
    return AutoTokenizer.from_pretrained(directory)


def test_shapes_and_kinds(tokenizer: PreTrainedTokenizerBase) -> None:
    made = stress_sequences(tokenizer, context=300, count=3, seed=1)
    assert tuple(made) == KINDS
    for kind, tokens in made.items():
        assert tokens.shape == (3, 300) and tokens.dtype == np.int64, kind
        assert tokens.min() >= 0 and tokens.max() < len(tokenizer)
        assert not set(tokens.ravel().tolist()) & set(tokenizer.all_special_ids), kind


def test_seeded_and_independent_of_the_count(tokenizer: PreTrainedTokenizerBase) -> None:
    made = stress_sequences(tokenizer, context=40, count=4, seed=7)
    fewer = stress_sequences(tokenizer, context=40, count=2, seed=7)
    other = stress_sequences(tokenizer, context=40, count=4, seed=8)
    for kind in KINDS:
        assert np.array_equal(made[kind][:2], fewer[kind])
        assert not np.array_equal(made[kind], other[kind])


def test_a_longer_context_goes_on_where_a_shorter_one_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    long, short = (stress_sequences(tokenizer, context=context, count=3, seed=0) for context in (256, 32))
    for kind in ("form feeds", "tabs", "white space"):
        # The shorter text ends elsewhere, which may change its last token or two.
        assert np.array_equal(long[kind][:, :28], short[kind][:, :28]), kind


@pytest.mark.parametrize(("kind", "character"), [("form feeds", "\f"), ("tabs", "\t")])
def test_text_of_one_character(tokenizer: Any, kind: str, character: str) -> None:
    rows = stress_sequences(tokenizer, context=200, count=6, seed=0)[kind]
    assert set(tokenizer.decode(rows[0])) == {character}
    for row in rows:
        text = tokenizer.decode(row)
        assert text.count(character) > 0.9 * len(text)


def test_white_space_is_white(tokenizer: Any) -> None:
    rows = stress_sequences(tokenizer, context=200, count=6, seed=0)["white space"]
    texts = [tokenizer.decode(row) for row in rows]
    assert set(texts[0]) == {" "}
    assert len(set("".join(texts))) >= 5, "several kinds of white space"
    assert sum(character.isspace() for character in "".join(texts)) > 0.9 * sum(map(len, texts))


def test_repeated_and_random(tokenizer: PreTrainedTokenizerBase) -> None:
    made = stress_sequences(tokenizer, context=2000, count=5, seed=0)
    assert (made["repeated token"] == made["repeated token"][:, :1]).all()
    assert len(set(made["repeated token"][:, 0].tolist())) > 1
    counts = np.bincount(made["random tokens"].ravel(), minlength=len(tokenizer))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    assert (counts[ordinary] > 0).all(), "10,000 draws from a few hundred tokens miss none"


def test_repeated_sequences_say_the_same_again(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = repeated_sequences(tokenizer, context=100, count=6, seed=0, period=30)
    assert rows.shape == (6, 100)
    assert (rows[:, 30:] == rows[:, :-30]).all()
    assert not np.isin(rows, tokenizer.all_special_ids).any()
    assert len({tuple(row) for row in rows.tolist()}) == 6


def test_impossible_requests(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="at least 1"):
        stress_sequences(tokenizer, context=0, count=1)
    with pytest.raises(UserError, match="at least 1"):
        stress_sequences(tokenizer, context=8, count=0)
