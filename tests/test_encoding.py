"""Encoding text: the same tokens as the tokenizers library, whatever the text, and the same in worker processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ln_removal.data import encoder as encoder_module
from ln_removal.data.encoder import (
    CODE_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    PATTERNS,
    STABLE,
    Encoder,
    EncoderPool,
    train_code_tokenizer,
    word_pattern,
)

SOURCE = Path(encoder_module.__file__).read_text(encoding="utf-8")

TEXTS = [
    SOURCE,
    "",
    " ",
    "\n\n\n  \t x",
    "I'll say it's Bob's, they've won; 'twas 1234567 euros   \n",
    "tabs\tand\r\nline ends\r\rand \x0b\x0c form feeds \x1c\x1d \x85 \xa0 spaces   ",
    "naïve café — “quotes” … 你好、世界。 こんにちは 안녕하세요 ✓ 👩‍💻 🎉🎉 ½ ² Ⅷ",
    f"spelled out: {END_OF_TEXT} and {END_OF_TEXT}{END_OF_TEXT}",
    "unstable: ՙ ࢏ ⱟ Ꟛ 𐵀 \U000e0041 \ud7b0",
    "x" * 300,
    "\x00\x01\x02",
]


def gpt2_tokenizer(**pre_tokenizer: Any) -> Tokenizer:
    """A small tokenizer of GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SOURCE, *TEXTS], trainer)
    return tokenizer


def code_tokenizer() -> Tokenizer:
    return train_code_tokenizer([SOURCE, *TEXTS], 700, model_max_length=64).backend_tokenizer


@pytest.fixture(scope="module", params=["gpt2", "code"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return gpt2_tokenizer() if request.param == "gpt2" else code_tokenizer()


def expected(tokenizer: Tokenizer, texts: list[str], dtype: str = "uint16") -> list[bytes]:
    """What the library makes of the texts, with end of text (id 0) behind each."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return [np.array([*plain.encode(text, add_special_tokens=False).ids, 0], dtype).tobytes() for text in texts]


def test_the_library_gives_the_same_tokens(tokenizer: Tokenizer) -> None:
    assert word_pattern(json.loads(tokenizer.to_str())) in PATTERNS
    encoder = Encoder(tokenizer.to_str(), eot_token_id=0, dtype="uint16")
    for _ in range(2):  # the second time from the dictionary
        assert encoder.encode(TEXTS) == expected(tokenizer, TEXTS)
    wide = Encoder(tokenizer.to_str(), eot_token_id=0, dtype="uint32")
    assert wide.encode(TEXTS) == expected(tokenizer, TEXTS, "uint32")


def test_random_texts_give_the_same_tokens(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    pieces = [
        *" \t\n\r'.,_()#=-",
        "  ",
        "\r\n",
        "'s",
        "'LL",
        "x",
        "Def",
        "été",
        "12",
        "3",
        "ⅷ",
        "字",
        "\xa0",
        "🎉",
        "ᐁ",
    ]
    texts = ["".join(draw.choices(pieces, k=40)) for _ in range(3000)]
    encoder = Encoder(tokenizer.to_str(), eot_token_id=0, dtype="uint16")
    assert encoder.encode(texts) == expected(tokenizer, texts)


def test_a_very_long_text_and_very_long_words(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ln_removal.data.encoder.LONG_TEXT", 1000)
    monkeypatch.setattr("ln_removal.data.encoder.WORDS_KEPT", 20)
    texts = [SOURCE, "word" * 500, "short"]
    encoder = Encoder(tokenizer.to_str(), eot_token_id=0, dtype="uint16")
    assert encoder.encode(texts) == expected(tokenizer, texts)
    assert len(encoder._words) == 20, "the dictionary does not grow further"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CODE_PATTERN])
def test_both_engines_cut_around_every_stable_character_alike(pattern: str) -> None:
    stable = regex.compile(f"[{STABLE}]")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    cut = regex.compile(pattern)
    for code in range(0x110000):
        character = "" if 0xD800 <= code < 0xE000 else chr(code)
        if not stable.match(character):
            continue
        text = f"a{character} {character}1{character}{character}\n{character} \n"
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == cut.findall(text), hex(code)


def test_other_kinds_of_tokenizers_go_through_the_library() -> None:
    prefixed = gpt2_tokenizer(add_prefix_space=True)
    lowered = gpt2_tokenizer()
    lowered.normalizer = normalizers.Lowercase()
    added = gpt2_tokenizer()
    added.add_tokens([AddedToken("Bob", special=False)])
    uncut = gpt2_tokenizer(use_regex=False)
    digits = gpt2_tokenizer()
    digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)])
    for tokenizer in (prefixed, lowered, added, uncut, digits):
        assert word_pattern(json.loads(tokenizer.to_str())) is None
        encoder = Encoder(tokenizer.to_str(), eot_token_id=0, dtype="uint16")
        assert encoder.encode(TEXTS) == expected(tokenizer, TEXTS)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers from the first batch on."""
    monkeypatch.setattr(encoder_module, "BYTES_ALONE", 0)


def pool(tokenizer: Tokenizer, workers: int = 2) -> EncoderPool:
    return EncoderPool(tokenizer.to_str(), eot_token_id=0, dtype="uint16", workers=workers)


def test_a_pool_gives_batches_back_in_order(tokenizer: Tokenizer, at_once: None) -> None:
    batches = [[text, str(number)] for number, text in enumerate(TEXTS * 3)]
    with pool(tokenizer) as encoders:
        results = list(encoders.in_order([[], *batches], lambda batch: batch))
        processes = [worker._process for worker in encoders._workers]
    assert [batch for batch, _ in results] == [[], *batches]
    for batch, encoded in results:
        assert encoded == expected(tokenizer, batch)
    assert [process.poll() for process in processes] == [0, 0]


def test_small_corpora_start_no_process(tokenizer: Tokenizer) -> None:
    with pool(tokenizer) as encoders:
        assert len(list(encoders.in_order([TEXTS] * 4, lambda batch: batch))) == 4
        assert not encoders._workers


def test_an_error_of_the_corpus_comes_after_the_batches_before_it(tokenizer: Tokenizer, at_once: None) -> None:
    def batches() -> Iterator[list[str]]:
        for number in range(5):
            yield [f"text {number}"]
        raise OSError("the connection broke")

    with pool(tokenizer) as encoders:
        results = encoders.in_order(batches(), lambda batch: batch)
        assert [next(results)[0] for _ in range(5)] == [[f"text {number}"] for number in range(5)]
        with pytest.raises(OSError, match="the connection broke"):
            next(results)


def test_a_worker_that_dies_ends_the_preparation(tokenizer: Tokenizer, at_once: None) -> None:
    def batches() -> Iterator[list[str]]:
        for number in range(1000):
            yield [f"text {number}"]
            if number == 10:
                for worker in encoders._workers:
                    worker._process.kill()

    with pool(tokenizer) as encoders, pytest.raises(RuntimeError, match="ended with exit code -9"):
        list(encoders.in_order(batches(), lambda batch: batch))


def test_leaving_early_ends_the_workers(tokenizer: Tokenizer, at_once: None) -> None:
    with pool(tokenizer) as encoders:
        for _ in encoders.in_order(([SOURCE] for _ in range(1000)), lambda batch: batch):
            break
        processes = [worker._process for worker in encoders._workers]
    assert [process.returncode for process in processes] == [0, 0]


SCRIPT = """
import sys
sys.path[:0] = [{root!r}]
from ln_removal.data import encoder
encoder.BYTES_ALONE = 0
print("once")
with encoder.EncoderPool(open({tokenizer!r}).read(), eot_token_id=0, dtype="uint16", workers=2) as encoders:
    print(len(list(encoders.in_order([["a"], ["b"]], lambda batch: batch))))
"""


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parent.parent), tokenizer=str(path)))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("once\n2\n", "")
