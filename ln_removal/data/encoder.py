"""Train a tokenizer for source code, and turn text into token ids fast, on all cores, in order.

A byte-level BPE cuts text into words by a regular expression and encodes each word by itself. The tokenizers library spends
nearly all its time on the cutting, and text repeats its words. So this module cuts with the `regex` package, which is several
times faster, and keeps a dictionary of encoded words; the library's BPE encodes a word when it first comes up.

The two regular expression engines may know different versions of Unicode. A text with characters that are not among
`STABLE` goes through the library as a whole, and so does everything when a tokenizer is not of the kind described.

`EncoderPool` encodes the first megabytes in this process, because most corpora of a test or a trial end there. Then worker
processes take over, one for each core, each an interpreter of its own that runs `work`. They are not made by multiprocessing:
it would import the script that calls this library once more in each worker, or fork a process with running threads.

The tokenizer for code differs from GPT-2's, which splits code into many short pieces. It lets a word take one leading symbol
(`.append`, `_name`, `(self`), a run of symbols take the line break after it, and a line break take the indentation that
follows: fewer tokens for the same text, at the same vocabulary.
"""

from __future__ import annotations

import array
import json
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from tokenizers.models import Model
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

CODE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
"""Words with one leading symbol; up to three digits; symbols with a line break and its indentation; white space."""

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

BYTES_ALONE = 8 << 20
"""Text encoded in this process before workers are started: about a second's work, several times what a start takes."""

BATCHES_A_WORKER = 2
"""Batches given to each worker and not yet taken back."""

MOST_WORKERS = 32
"""With more, the process that reads and writes cannot keep up."""

Batch = TypeVar("Batch")

_START = "import sys; sys.path[:] = {path!r}; from ln_removal.data.encoder import work; work()"


def train_code_tokenizer(texts: Iterable[str], vocab_size: int, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train on `texts` and wrap the result for transformers.

    Args:
        texts: documents; consumed once.
        vocab_size: entries including the 256 bytes and the end-of-text token.
        model_max_length: positions of the model it will serve.

    Returns:
        A fast tokenizer whose end-of-text token `<|endoftext|>` has id 0 and serves as bos, eos and unk.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(CODE_PATTERN), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


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


class EncoderPool:
    """Use it as a context manager; leaving it ends the workers.

    Args:
        tokenizer_json, eot_token_id, dtype: as for `Encoder`.
        workers: how many; default: the cores of this process. 1 encodes everything in this process.
    """

    def __init__(self, tokenizer_json: str, *, eot_token_id: int, dtype: str, workers: int | None = None) -> None:
        self._setup = (tokenizer_json, str(eot_token_id), dtype)
        self._here = Encoder(tokenizer_json, eot_token_id=eot_token_id, dtype=dtype)
        self._count = min(MOST_WORKERS, _cores()) if workers is None else workers
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="encoder")

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def in_order(
        self, batches: Iterable[Batch], texts_of: Callable[[Batch], list[str]]
    ) -> Iterator[tuple[Batch, list[bytes]]]:
        """Every batch with the encoded documents of its texts (see `Encoder.encode`), in the order given.

        An error of `batches` is raised after the batches before it have been given out.
        """
        pending: deque[tuple[Batch, Future[list[bytes]]]] = deque()
        remaining = iter(batches)
        alone = 0
        failure: Exception | None = None
        while True:
            try:
                batch = next(remaining)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001  # raised below
                failure = error
                break
            texts = texts_of(batch)
            if self._count == 1 or alone < BYTES_ALONE:
                alone += sum(map(len, texts))
                yield batch, self._here.encode(texts)
                continue
            if not self._workers:
                self._start()
            pending.append((batch, self._threads.submit(self._encode, texts)))
            if len(pending) > BATCHES_A_WORKER * self._count:
                done, encoded = pending.popleft()
                yield done, encoded.result()
        for done, encoded in pending:
            yield done, encoded.result()
        if failure is not None:
            raise failure

    def _start(self) -> None:
        for _ in range(self._count):
            worker = _Worker(self._setup)
            self._workers.append(worker)
            self._idle.put(worker)

    def _encode(self, texts: list[str]) -> list[bytes]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that encodes; one request at a time."""

    def __init__(self, setup: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Each worker is one thread's work; threads of the library would only be in each other's way.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        self._answers = self._process.stdout
        self._put([part.encode() for part in setup])

    def encode(self, texts: list[str]) -> list[bytes]:
        """As `Encoder.encode`.

        Raises:
            RuntimeError: the process has ended.
        """
        self._put([text.encode() for text in texts])
        try:
            return _receive(self._answers)
        except EOFError:
            raise self._ended() from None

    def close(self) -> None:
        """End the process."""
        for pipe in (self._requests, self._answers):
            with suppress(BrokenPipeError):  # It has ended already, with something unsent in the buffer.
                pipe.close()
        self._process.wait()

    def _put(self, parts: list[bytes]) -> None:
        try:
            _send(self._requests, parts)
        except BrokenPipeError:
            # An OSError would be taken for one of writing the shards.
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"a process that encodes text ended with exit code {self._process.wait()}")


def work() -> None:
    """What a worker runs: encode what comes in on standard input until it is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides; it closes the pipe.
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer_json, eot_token_id, dtype = (part.decode() for part in _receive(requests))
        encoder = Encoder(tokenizer_json, eot_token_id=int(eot_token_id), dtype=dtype)
        while True:
            _send(answers, encoder.encode([part.decode() for part in _receive(requests)]))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # Nothing to flush to a pipe that nobody reads.


def _send(pipe: IO[bytes], parts: list[bytes]) -> None:
    """Number of parts and their lengths (unsigned 64-bit), then the parts."""
    sizes = array.array("Q", [len(parts), *map(len, parts)])
    pipe.write(sizes.tobytes() + b"".join(parts))
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    (count,) = struct.unpack("=Q", _exactly(pipe, 8))
    sizes = array.array("Q", _exactly(pipe, 8 * count))
    data = _exactly(pipe, sum(sizes))
    parts, start = [], 0
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return parts


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
