"""Turn a corpus into token shards: batched, in parallel with reading, with bounded memory, resumable.

A reader thread fills a short queue with batches of documents, processes encode them (`EncoderPool`), and the main thread
appends them to the shards. Every few million tokens the shards are synced and their lengths are written to `progress.json`.
A preparation that was interrupted truncates its shards to those lengths and goes on from there.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from ln_removal.data.corpora import GENERATED, SPLITS, Corpus, Document, LocalFiles, Remarking, TokenDocument
from ln_removal.data.encoder import EncoderPool
from ln_removal.data.sampler import read_ahead
from ln_removal.data.tokens import (
    INDEX,
    SHARD_NAME,
    EncodedPart,
    Group,
    ShardWriter,
    TokenDataset,
    TokenIndex,
    dtype_for,
    ids_sha256,
    is_same_tokenizer,
    parse_index,
)
from ln_removal.errors import UserError
from ln_removal.files.atomic import free_bytes, is_full, readable, write_json_atomically
from ln_removal.files.signals import deferred

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROGRESS = "progress.json"
CONTENT = "content_sha256"
"""Key of the index: the hash of the content of local files, see `LocalFiles.content_sha256`."""

LOCK = "prepare.lock"
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
BATCH_BYTES_A_TOKEN = 64
"""What a token of a pre-tokenised document counts as in a batch. 16,384 make one, so that a model that writes them is seen to."""

QUEUED_BATCHES = 4

SECONDS_BETWEEN_CHECKPOINTS = 30.0
"""Of a corpus that comes slowly, at most the work of so many seconds is lost."""

Batch = list[Document | TokenDocument]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Limits:
    """Training tokens at which to stop, those of a full shard, and those between two checkpoints."""

    max_tokens: int | None
    shard_tokens: int
    checkpoint_tokens: int

    def reached(self, index: TokenIndex) -> bool:
        return self.max_tokens is not None and index.total("train", "tokens") >= self.max_tokens


@dataclass(frozen=True)
class PrepareProgress:
    """What the progress callback receives after every batch."""

    documents: int
    tokens: int
    bytes: int


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
    workers: int | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> TokenDataset:
    """Tokenize `corpus` into `out`, or finish an interrupted preparation of the same corpus there.

    Args:
        corpus: what to read.
        tokenizer: a fast tokenizer with an end-of-text token, appended to every document.
        out: directory for shards and index; created when missing.
        tokenizer_name: the name users know it by.
        tokenizer_sha256: its fingerprint (`ln_removal.models.loading.tokenizer_fingerprint`).
        max_tokens: stop once the train split has this many tokens.
        shard_tokens: tokens after which a shard is closed and the next one opened (a document is never split).
        checkpoint_tokens: tokens between two points from which an interrupted run resumes; 30 seconds make one too.
        workers: processes that encode; default: one a core, and none for a corpus of a few megabytes.
        progress: called after every batch.

    Returns:
        The opened data set. When `out` already holds this corpus, complete, it is opened and nothing is read.

    Raises:
        UserError: `out` holds another corpus or cannot be written, another process is preparing it, the tokenizer has no
            end-of-text token, or the corpus gave no document for one of the splits. Shards that cannot be resumed are removed.
        Interrupted: Ctrl-C or SIGTERM; the tokens so far are kept.
    """
    out = Path(out)
    index = _empty_index(corpus, tokenizer, tokenizer_name, tokenizer_sha256, max_tokens)
    limits = _Limits(max_tokens, shard_tokens, checkpoint_tokens)
    try:
        if not (out / INDEX).exists():  # without a lock: the ranks of a run open a complete directory at the same time
            out.mkdir(parents=True, exist_ok=True)
            with FileLock(out / LOCK, blocking=False, fallback_to_soft=False):
                if not (out / INDEX).exists():  # or another process has completed it since
                    encoders = EncoderPool(
                        tokenizer.backend_tokenizer.to_str(),
                        eot_token_id=index.eot_token_id,
                        dtype=index.dtype,
                        workers=workers,
                    )
                    _prepare_locked(corpus, encoders, out, index, limits, progress)
        existing = TokenDataset.open(out)
        _same_or_error(out, existing.index, index, corpus)
        return existing
    except Timeout:
        raise UserError(f"another process is preparing {out}; wait for it, or choose another --out") from None
    except OSError as error:
        if is_full(error):
            raise UserError(_out_of_room(out, index, max_tokens)) from error
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _empty_index(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, name: str, sha256: str, max_tokens: int | None
) -> TokenIndex:
    eot = tokenizer.eos_token_id
    if not isinstance(eot, int):
        raise UserError(f"the tokenizer {name} has no end-of-text token; use GPT-2's or one that has an eos token")
    lasting = str(Path(name).resolve()) if Path(name).is_dir() else name  # it may be read from another directory
    return TokenIndex(
        corpus=json.loads(json.dumps({**corpus.identity(), "max_tokens": max_tokens})),
        tokenizer={"name": lasting, "sha256": sha256, "ids_sha256": ids_sha256(tokenizer)},
        vocab_size=len(tokenizer),
        eot_token_id=eot,
        dtype=dtype_for(len(tokenizer)),
    )


def _out_of_room(out: Path, index: TokenIndex, max_tokens: int | None) -> str:
    """What to say when the disk is full: how much is needed, how much is free, what is kept."""
    width = np.dtype(index.dtype).itemsize
    so_far = f"{readable(index.total('train', 'tokens') * width)} of training tokens"
    needed = f"{so_far} do not fit, and what the rest of the corpus needs is not known"
    if max_tokens is not None:
        needed = f"{max_tokens:,} training tokens need {readable(max_tokens * width)}, {so_far} are there"
    free = free_bytes(out)
    room = "" if free is None else f", {readable(free)} are free"
    again = "the same command goes on from the last point saved" if (out / PROGRESS).exists() else "start again"
    return f"the disk of {out} is full: {needed}{room}; free some space, then {again}, or choose another --out"


def _prepare_locked(
    corpus: Corpus,
    encoders: EncoderPool,
    out: Path,
    index: TokenIndex,
    limits: _Limits,
    progress: Callable[[PrepareProgress], None] | None,
) -> None:
    """Write the shards and the index, from the last checkpoint on where there is one; `out` is locked by this process."""
    try:
        consumed = _resume(out, index, corpus)
        shards = ShardWriter(out, index, limits.shard_tokens)
        try:
            if not limits.reached(index):
                _encode_rest(corpus, encoders, shards, limits, progress, consumed)
        finally:
            shards.close()
        _check_splits(corpus, index, limits.max_tokens)
        shards.complete()
    except (UserError, OSError):
        _remove_unfinished(out)
        raise
    (out / PROGRESS).unlink(missing_ok=True)
    if index.without_text:
        logger.warning("%s: no text in %s of the documents read; they gave no tokens", corpus.name, index.without_text)
    for remark in corpus.remarks() if isinstance(corpus, Remarking) else []:
        logger.warning("%s", remark)


def _encode_rest(
    corpus: Corpus,
    encoders: EncoderPool,
    shards: ShardWriter,
    limits: _Limits,
    progress: Callable[[PrepareProgress], None] | None,
    consumed: int,
) -> None:
    """Append the corpus from document `consumed` on, until it ends, the limit is reached or a signal comes."""
    index, since_checkpoint, saved = shards.index, 0, time.monotonic()
    batches = _batches(corpus, consumed)
    if corpus.name != GENERATED:  # of which a batch takes so long that none should be written for nothing
        batches = read_ahead(batches, QUEUED_BATCHES)
    with deferred("batch") as stop, closing(batches) as read, encoders:
        for batch, encoded in encoders.in_order(read, _texts):
            for part in _parts(batch, encoded, index):
                shards.append(part)
                since_checkpoint += part.tokens
            consumed += len(batch)
            index.without_text += sum(isinstance(document, TokenDocument) and not document.tokens for document in batch)
            if progress is not None:
                progress(_progress(index))
            late = time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS
            if late or since_checkpoint >= limits.checkpoint_tokens:
                _checkpoint(shards, consumed)
                since_checkpoint, saved = 0, time.monotonic()
            if limits.reached(index):
                return
            if stop:
                _checkpoint(shards, consumed)
                raise stop.interrupted(f"{_progress(index).tokens:,} tokens are kept in {shards.directory}")


def _remove_unfinished(out: Path) -> None:
    """Remove shards that cannot be resumed, and their directory where nothing else is in it; whole or resumable ones stay."""
    if (out / PROGRESS).exists() or (out / INDEX).exists():
        return
    for leftover in out.glob("*.bin"):
        if SHARD_NAME.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    (out / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        out.rmdir()


def _checkpoint(shards: ShardWriter, consumed: int) -> None:
    """Save what an interrupted preparation needs to go on after `consumed` documents."""
    shards.sync()
    write_json_atomically(shards.directory / PROGRESS, {"consumed": consumed, "index": asdict(shards.index)})


def _check_splits(corpus: Corpus, index: TokenIndex, max_tokens: int | None) -> None:
    """Raises UserError when a split has no tokens."""
    for split in SPLITS:
        if index.total(split, "tokens") == 0:
            more = "add text to it" if max_tokens is None else f"raise max_tokens ({max_tokens:,})"
            raise UserError(f"{corpus.name}: the corpus gave no {split} document; {more}, or choose another corpus")


def _batches(corpus: Corpus, skip: int) -> Generator[Batch, None, None]:
    batch: Batch = []
    size = 0
    for document in corpus.documents(skip):
        batch.append(document)
        size += len(document.text) if isinstance(document, Document) else BATCH_BYTES_A_TOKEN * len(document.tokens)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts(batch: Batch) -> list[str]:
    return [document.text for document in batch if isinstance(document, Document)]


def _parts(batch: Batch, encoded: list[bytes], index: TokenIndex) -> Iterator[EncodedPart]:
    """The tokens of a batch, one result for each group in it.

    Args:
        encoded: the tokens of each text of the batch, end-of-text token included, as they are written.
    """
    width = np.dtype(index.dtype).itemsize
    texts = iter(encoded)
    groups: dict[Group, list[bytes]] = {}
    sizes: dict[Group, int] = {}
    for document in batch:
        group = (document.split, document.source)
        rows = groups.setdefault(group, [])
        if isinstance(document, Document):
            rows.append(next(texts))
            sizes[group] = sizes.get(group, 0) + len(document.text.encode())
        else:
            _check_range(document.tokens, index)
            rows.append(np.array(document.tokens, dtype=index.dtype).tobytes())
    for group, rows in groups.items():
        data = b"".join(rows)
        yield EncodedPart(group, data, len(data) // width, len(rows), sizes.get(group, 0))


def _check_range(tokens: list[int], index: TokenIndex) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < index.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise UserError(
            f"a pre-tokenised row holds token {wrong}, the tokenizer {index.tokenizer['name']} has "
            f"{index.vocab_size} entries; choose the tokenizer the data set was made with"
        )


def _resume(out: Path, index: TokenIndex, corpus: Corpus) -> int:
    """Take the shards of an interrupted preparation over into `index`; returns the documents already consumed."""
    path = out / PROGRESS
    consumed = 0
    if not path.exists() and isinstance(corpus, LocalFiles):
        index.corpus[CONTENT] = corpus.content_sha256()
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            before = parse_index(saved["index"])
            consumed = int(saved["consumed"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {out} and prepare again") from error
        _same_or_error(out, before, index, corpus)
        if CONTENT in before.corpus:
            index.corpus[CONTENT] = before.corpus[CONTENT]
        width = np.dtype(index.dtype).itemsize
        for shard in before.shards:
            file = out / shard.file
            if not file.is_file() or file.stat().st_size < shard.tokens * width:
                raise UserError(f"{file} is shorter than {path.name} says; delete {out} and prepare again")
        index.shards, index.without_text = before.shards, before.without_text
    # Shards begun after the last checkpoint. Only files with a shard's name: the directory may hold others.
    known = {shard.file for shard in index.shards}
    for leftover in out.glob("*.bin"):
        if leftover.name not in known and SHARD_NAME.fullmatch(leftover.name):
            leftover.unlink()
    return consumed


def _same_or_error(out: Path, found: TokenIndex, wanted: TokenIndex, corpus: Corpus) -> None:
    """Raises UserError where `found` was made from another text or with another tokenizer than is wanted.

    Where a corpus lies, when its files were changed, and what the model that wrote it is called may differ, as long as the
    content or the weights are the same.
    """
    different = [
        key
        for key in sorted(found.corpus.keys() | wanted.corpus.keys())
        if key != CONTENT and found.corpus.get(key) != wanted.corpus.get(key)
    ]
    if different == ["model"] and "weights_sha256" in wanted.corpus:
        different = []
    if different and {*different} <= {"path", "files_sha256"} and isinstance(corpus, LocalFiles):
        content = found.corpus.get(CONTENT)
        if content and content == corpus.content_sha256():
            different = []
        elif "path" not in different:
            what = "content" if content else "sizes or times"
            raise UserError(
                f"{out} holds tokens of other text: the {what} of the files in {corpus.path} changed after they were prepared; "
                "choose another --out, or delete it"
            )
    if different:
        key = different[0]
        theirs, ours = found.corpus.get(key), wanted.corpus.get(key)
        raise UserError(
            f"{out} holds tokens of another corpus: its {key} is {theirs!r}, wanted {ours!r}; choose another --out, "
            "or delete it"
        )
    if not is_same_tokenizer(found.tokenizer, wanted.tokenizer) or found.dtype != wanted.dtype:
        theirs, ours = (f"{index.tokenizer['name']} ({index.tokenizer['sha256'][:8]})" for index in (found, wanted))
        raise UserError(
            f"{out} holds tokens of another tokenizer: found {theirs}, wanted {ours}; choose another --out, or delete it"
        )


def _progress(index: TokenIndex) -> PrepareProgress:
    total = {
        name: sum(int(getattr(shard, name)) for shard in index.shards) for name in ("documents", "tokens", "bytes")
    }
    return PrepareProgress(**total)


@contextmanager
def prepare_bar(label: str, *, total: int | None, enabled: bool) -> Iterator[Callable[[PrepareProgress], None]]:
    """A bar on standard error; what it yields is the `progress` of `prepare`.

    Args:
        label: shown before the bar.
        total: tokens at which the preparation stops; None when only the end of the corpus will tell.
        enabled: False shows nothing.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        logging_redirect_tqdm() if enabled else nullcontext(),  # else a warning would stand on the line of the bar
        tqdm(desc=label, unit="tok", unit_scale=True, total=total, file=sys.stderr, disable=not enabled) as bar,
    ):

        def show(progress: PrepareProgress) -> None:
            size = f", {progress.bytes / 1e6:,.0f} MB" if progress.bytes else ""
            bar.set_postfix_str(f"{progress.documents:,} documents{size}", refresh=False)
            bar.update(progress.tokens - bar.n)

        yield show
