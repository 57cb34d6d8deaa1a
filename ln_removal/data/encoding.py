"""Text to token ids, faster than the tokenizers library for the tokenizers in use here, and with the same result.

A byte-level BPE cuts text into words by a regular expression and encodes each word by itself. Nearly all the time of the
tokenizers library goes into the cutting, and text repeats its words: so this cuts with the `regex` package (several times
faster) and looks words up in a dictionary of their encodings; the library's BPE encodes a word when it first comes up.

The two regular expression engines may know different versions of Unicode. A text with characters that are not among
`STABLE` goes through the library as a whole, and so does everything when a tokenizer is not of the kind described.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.data.tokenizer_training import CODE_PATTERN

if TYPE_CHECKING:
    from tokenizers.models import Model

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text (Radford et al. 2019, encoder.py): the expression that the library's ByteLevel has built in."""

PATTERNS = (GPT2_PATTERN, CODE_PATTERN)
"""Expressions that both engines are known to read alike."""

STABLE = (
    r"\x00-\u052f"  # Latin, Greek, Cyrillic
    r"\u2000-\u206f\u20a0-\u2bff"  # punctuation, currencies, arrows, mathematics, box drawing
    r"\u3000-\u30ff\u4e00-\u9fa5\uac00-\ud7a3"  # Kana, Han, Hangul
    r"\ufe00-\ufe0f\uff00-\uffdc\U0001f300-\U0001faff"  # variation selectors, full-width forms, emoji
)
"""Characters that have been a letter, a number, white space or none of these in every version of Unicode since 2014."""

WORDS_KEPT = 1 << 18
"""Words in the dictionary at most: some 50 MB. The frequent ones come first."""

LONGEST_WORD_KEPT = 32
LONG_TEXT = 1 << 23
"""Characters from which the words of a text are not put into one list."""


class Encoder:
    """Encodes documents, each followed by the end-of-text token.

    All of a text counts as text: nothing is truncated or padded, whatever the tokenizer was saved with, and an
    `<|endoftext|>` spelled out in it is encoded like other words.

    Args:
        tokenizer_json: the tokenizer, as `tokenizers.Tokenizer.to_str` gives it.
        eot_token_id: appended to every document.
        dtype: of the ids in the result, "uint16" or "uint32".
    """

    def __init__(self, tokenizer_json: str, *, eot_token_id: int, dtype: str) -> None:
        import regex
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._dtype = np.dtype(dtype)
        self._end = np.array([eot_token_id], dtype=dtype).tobytes()
        self._stable = regex.compile(f"[{STABLE}]*")
        pattern = word_pattern(json.loads(tokenizer_json))
        self._cut = None if pattern is None else regex.compile(pattern)
        self._words = _Words(self._tokenizer.model, self._dtype)

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text and of the end-of-text token, as the bytes of an array of `dtype`."""
        encoded = [self._by_words(text) for text in texts]
        rest = [place for place, data in enumerate(encoded) if data is None]
        whole = self._tokenizer.encode_batch_fast([texts[place] for place in rest], add_special_tokens=False)
        for place, encoding in zip(rest, whole, strict=True):
            encoded[place] = np.array(encoding.ids, dtype=self._dtype).tobytes()
        return [data + self._end for data in encoded if data is not None]

    def _by_words(self, text: str) -> bytes | None:
        """The ids of a text, word by word; None for a text that has to go through the library."""
        if self._cut is None or not (text.isascii() or self._stable.fullmatch(text)):
            return None
        words: Iterable[str] = self._cut.findall(text) if len(text) < LONG_TEXT else self._one_by_one(text)
        return b"".join(map(self._words.__getitem__, words))

    def _one_by_one(self, text: str) -> Iterator[str]:
        assert self._cut is not None
        return (match.group() for match in self._cut.finditer(text))


class _Words(dict[str, bytes]):
    """The ids of a word, as the bytes of an array: looked up, or encoded and kept."""

    def __init__(self, model: Model, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._model = model
        self._dtype = dtype
        self._alphabet = _byte_alphabet()

    def __missing__(self, word: str) -> bytes:
        spelled = word.encode().decode("latin-1").translate(self._alphabet)
        ids = [token.id for token in self._model.tokenize(spelled)]
        data = np.array(ids, dtype=self._dtype).tobytes()
        if len(word) <= LONGEST_WORD_KEPT and len(self) < WORDS_KEPT:
            self[word] = data
        return data


def word_pattern(tokenizer: dict[str, Any]) -> str | None:
    """The expression by which a tokenizer cuts text into words.

    Args:
        tokenizer: the contents of a tokenizer.json.

    Returns:
        One of `PATTERNS`; None for a tokenizer that does more to a text than to cut it and to encode its words' bytes.
    """
    model = tokenizer["model"]
    plain = (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and tokenizer.get("normalizer") is None
        and all(token["special"] for token in tokenizer.get("added_tokens") or [])
    )
    pattern = _pattern_of(tokenizer.get("pre_tokenizer") or {})
    return pattern if plain and pattern in PATTERNS else None


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
        if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
            return None
        split, bytes_of = steps
        if split["behavior"] != "Isolated" or split["invert"] or bytes_of["add_prefix_space"] or bytes_of["use_regex"]:
            return None
        pattern: str | None = split["pattern"].get("Regex")
        return pattern
    if pre_tokenizer.get("type") == "ByteLevel":
        return GPT2_PATTERN if pre_tokenizer.get("use_regex", True) and not pre_tokenizer["add_prefix_space"] else None
    return None


def _byte_alphabet() -> dict[int, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is visible, else from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: byte for byte in visible} | {byte: 256 + place for place, byte in enumerate(hidden)}
