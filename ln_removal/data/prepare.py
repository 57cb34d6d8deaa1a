"""Turn a corpus into token shards: batched, in parallel with reading, with bounded memory, resumable.

A reader thread fills a short queue with batches of documents; the main thread encodes a batch (the tokenizers library uses
every core and releases the interpreter lock) and appends to the shards. Every few million tokens the shards are synced and
their lengths written to `progress.json`; an interrupted preparation truncates its shards to those lengths and goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ln_removal.data.corpora import Corpus, Document, Split, TokenDocument
from ln_removal.data.read_ahead import read_ahead
from ln_removal.data.tokens import (
    INDEX,
    Shard,
    TokenDataset,
    TokenIndex,
    checksum,
    dtype_for,
    write_index,
    write_json_atomically,
)
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROGRESS = "progress.json"
LOCK = "prepare.lock"
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
QUEUED_BATCHES = 4

Batch = list[Document | TokenDocument]


@dataclass(frozen=True)
class PrepareProgress:
    """What the progress callback receives after every batch."""

    documents: int
    tokens: int
    bytes: int


class _ShardWriter:
    """The shard in progress of one (split, source)."""

    def __init__(self, directory: Path, shard: Shard, width: int) -> None:
        self.shard = shard
        self.path = directory / shard.file
        self._file: BinaryIO = self.path.open("ab")
        self._file.truncate(shard.tokens * width)
        self._file.seek(0, os.SEEK_END)

    def append(self, data: bytes, *, tokens: int, documents: int, text_bytes: int) -> None:
        self._file.write(data)
        self.shard.tokens += tokens
        self.shard.documents += documents
        self.shard.bytes += text_bytes

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    out: Path | str,
    *,
    tokenizer_name: str,
    tokenizer_sha256: str,
    max_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    checkpoint_tokens: int = 5_000_000,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> TokenDataset:
    """Tokenize `corpus` into `out`, or finish an interrupted preparation of the same corpus there.

    Args:
        corpus: what to read.
        tokenizer: a fast tokenizer with an end-of-text token, appended to every document.
        out: directory for shards and index; created when missing.
        tokenizer_name: the name users know it by.
        tokenizer_sha256: its fingerprint (`ln_removal.models.tokenizer_fingerprint`).
        max_tokens: stop once the train split has this many tokens.
        shard_tokens: tokens after which a shard is closed and the next one opened (a document is never split).
        checkpoint_tokens: tokens between two points from which an interrupted run resumes.
        progress: called after every batch.

    Returns:
        The opened data set. When `out` already holds this corpus, complete, it is opened and nothing is read.

    Raises:
        UserError: `out` holds another corpus or cannot be written, another process is preparing it, the tokenizer has no
            end-of-text token, or the corpus gave no training document.
    """
    out = Path(out)
    eot = tokenizer.eos_token_id
    if not isinstance(eot, int):
        raise UserError(f"the tokenizer {tokenizer_name} has no end-of-text token; use GPT-2's or one that has an eos token")
    index = TokenIndex(
        corpus=json.loads(json.dumps({**corpus.identity(), "max_tokens": max_tokens})),
        tokenizer={"name": tokenizer_name, "sha256": tokenizer_sha256},
        vocab_size=len(tokenizer),
        eot_token_id=eot,
        dtype=dtype_for(len(tokenizer)),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            return _prepare_locked(
                corpus, tokenizer, out, index, max_tokens, shard_tokens, checkpoint_tokens, progress
            )
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _prepare_locked(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    index: TokenIndex,
    max_tokens: int | None,
    shard_tokens: int,
    checkpoint_tokens: int,
    progress: Callable[[PrepareProgress], None] | None,
) -> TokenDataset:
    if (out / INDEX).exists():
        existing = TokenDataset.open(out)
        _same_or_error(out, existing.index, index)
        return existing
    consumed = _resume(out, index)
    width = np.dtype(index.dtype).itemsize
    writers = {(shard.split, shard.source): _ShardWriter(out, shard, width) for shard in index.shards if not shard.sha256}
    since_checkpoint = 0
    try:
        for batch in read_ahead(_batches(corpus, consumed), QUEUED_BATCHES):
            for group, data, tokens, text_bytes in _encode(batch, tokenizer, index):
                writer = writers.get(group)
                if writer is not None and writer.shard.tokens >= shard_tokens:
                    writer.close()
                    writer.shard.sha256 = checksum(writer.path)
                    writer = None
                if writer is None:
                    writer = writers[group] = _open_next(out, index, group, width)
                documents = sum((document.split, document.source) == group for document in batch)
                writer.append(data, tokens=tokens, documents=documents, text_bytes=text_bytes)
                since_checkpoint += tokens
            consumed += len(batch)
            if progress is not None:
                progress(_progress(index))
            if since_checkpoint >= checkpoint_tokens:
                _checkpoint(out, index, writers, consumed)
                since_checkpoint = 0
            if max_tokens is not None and index.total("train", "tokens") >= max_tokens:
                break
    finally:
        for writer in writers.values():
            writer.close()
    for split in ("train", "validation"):
        if index.total(split, "tokens") == 0:
            raise UserError(f"{corpus.name}: the corpus gave no {split} document; add text to it, or choose another corpus")
    for writer in writers.values():
        writer.shard.sha256 = checksum(writer.path)
    write_index(out, index)
    (out / PROGRESS).unlink(missing_ok=True)
    return TokenDataset.open(out)


def _batches(corpus: Corpus, skip: int) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for document in corpus.documents(skip):
        batch.append(document)
        size += len(document.text) if isinstance(document, Document) else 4 * len(document.tokens)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: Batch, tokenizer: PreTrainedTokenizerFast, index: TokenIndex
) -> Iterator[tuple[tuple[Split, str], bytes, int, int]]:
    """Encode a batch: for each (split, source) in it, its tokens as bytes with their count and the bytes of text."""
    texts = [document.text for document in batch if isinstance(document, Document)]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)) if texts else iter(())
    groups: dict[tuple[Split, str], list[list[int]]] = {}
    sizes: dict[tuple[Split, str], int] = {}
    for document in batch:
        group = (document.split, document.source)
        rows = groups.setdefault(group, [])
        if isinstance(document, Document):
            rows.append([*next(encoded).ids, index.eot_token_id])
            sizes[group] = sizes.get(group, 0) + len(document.text.encode())
        else:
            _check_range(document.tokens, index)
            rows.append(document.tokens)
    for group, rows in groups.items():
        count = sum(map(len, rows))
        data = np.fromiter(chain.from_iterable(rows), dtype=index.dtype, count=count)
        yield group, data.tobytes(), count, sizes.get(group, 0)


def _check_range(tokens: list[int], index: TokenIndex) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < index.vocab_size:
        raise UserError(
            f"a pre-tokenised row holds token {max(tokens)}, the tokenizer {index.tokenizer['name']} has "
            f"{index.vocab_size} entries; choose the tokenizer the data set was made with"
        )


def _open_next(out: Path, index: TokenIndex, group: tuple[Split, str], width: int) -> _ShardWriter:
    split, source = group
    number = sum((shard.split, shard.source) == group for shard in index.shards)
    safe = "".join(character if character.isalnum() else "-" for character in source)
    shard = Shard(file=f"{split}-{safe}-{number:05d}.bin", split=split, source=source)
    index.shards.append(shard)
    return _ShardWriter(out, shard, width)


def _checkpoint(out: Path, index: TokenIndex, writers: dict[tuple[Split, str], _ShardWriter], consumed: int) -> None:
    for writer in writers.values():
        writer.sync()
    write_json_atomically(out / PROGRESS, {"consumed": consumed, "index": asdict(index)})


def _resume(out: Path, index: TokenIndex) -> int:
    """Take the shards of an interrupted preparation over into `index`; returns the documents already consumed."""
    path = out / PROGRESS
    if not path.exists():
        for leftover in out.glob("*.bin"):
            leftover.unlink()
        return 0
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        shards = [Shard(**shard) for shard in saved["index"].pop("shards")]
        before = TokenIndex(**saved["index"], shards=shards)
        consumed = int(saved["consumed"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {out} and prepare again") from error
    _same_or_error(out, before, index)
    width = np.dtype(index.dtype).itemsize
    for shard in shards:
        file = out / shard.file
        if not file.is_file() or file.stat().st_size < shard.tokens * width:
            raise UserError(f"{file} is shorter than {path.name} says; delete {out} and prepare again")
    known = {shard.file for shard in shards}
    for leftover in out.glob("*.bin"):
        if leftover.name not in known:
            leftover.unlink()
    index.shards = shards
    return consumed


def _same_or_error(out: Path, found: TokenIndex, wanted: TokenIndex) -> None:
    for what in ("corpus", "tokenizer", "vocab_size"):
        ours, theirs = getattr(wanted, what), getattr(found, what)
        if what == "tokenizer":
            ours, theirs = ours["sha256"], theirs["sha256"]
        if ours != theirs:
            raise UserError(
                f"{out} holds tokens of another {what}: found {theirs}, wanted {ours}; choose another --out, or delete it"
            )


def _progress(index: TokenIndex) -> PrepareProgress:
    total = {
        name: sum(int(getattr(shard, name)) for shard in index.shards) for name in ("documents", "tokens", "bytes")
    }
    return PrepareProgress(**total)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {out}; wait for it, or choose another --out") from None
        yield
