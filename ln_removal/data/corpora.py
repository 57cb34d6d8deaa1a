"""What a corpus is, and corpora from files of this machine: text, jsonl, parquet, or a directory of them.

A corpus is a deterministic stream of documents, each in one split and from one named source. Local documents come in the
order of the files' paths. Whatever the size, one document, one line or one parquet batch is in memory at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, runtime_checkable

from ln_removal.errors import UserError
from ln_removal.files.atomic import checksum

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES

VALIDATION_FRACTION = 0.005

GENERATED = "generated"
"""The corpus that a model writes itself; see data/generated.py, which needs torch."""

WHOLE_FILE_BYTES = 1 << 20
"""Text files up to this size are one document; larger ones are cut into pieces."""

PIECE_BYTES = 64 << 10
"""A piece ends at the first blank line after this many bytes..."""

MAXIMUM_PIECE_BYTES = 256 << 10
"""...or, when there is none, at the last line that ends before this many bytes."""

LARGEST_HASHED = 100 << 30
"""The content of more bytes than this is not hashed."""

PARQUET_ROWS = 512
SOURCE = "local"


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `source` names the part of the corpus it comes from, so that parts can be weighted when sampling."""

    text: str
    split: Split
    source: str


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """One row of a data set that was published already tokenised: `tokens` are taken as they are."""

    tokens: list[int]
    split: Split
    source: str


@runtime_checkable
class Corpus(Protocol):
    """A stream that gives the same documents in the same order every time, so that preparation can resume."""

    name: str

    def documents(self, skip: int = 0) -> Iterator[Document | TokenDocument]:
        """Yield the documents after the first `skip`.

        Raises:
            UserError: when the corpus is missing, empty, unreadable or out of reach.
        """
        ...

    def identity(self) -> dict[str, object]:
        """What determines the content (name, options, interpreter or revision): stored in the index, compared on resume."""
        ...


def hash_split(index: int, key: str, fraction: float) -> Split:
    """The split of a document by a hash of its key.

    The first document is always for training and the second always for validation, so that two documents are enough for
    a corpus to have both splits.

    Args:
        index: position of the document in the corpus, from 0.
        key: what names the document whatever stands before it in the corpus, such as `part/file.jsonl:17`.
        fraction: share of the validation split, 0 to 1.
    """
    if index < 2:
        return "validation" if index == 1 else "train"
    draw = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    return "validation" if draw < fraction else "train"


def check_fraction(fraction: float) -> float:
    """`fraction` itself when it is a usable share of validation documents; UserError otherwise."""
    if not 0 < fraction <= 1:
        raise UserError(
            f"the share of validation documents (validation_fraction) is {fraction}; give a number above 0 and at most 1 "
            "(0.005 is half a percent)"
        )
    return fraction


class LocalFiles:
    """A file or a directory as a corpus.

    Args:
        path: `.txt`, `.md`, `.py` (one document a file; larger than 1 MiB: pieces cut at blank lines), `.jsonl`,
            `.jsonl.gz`, `.parquet` (one document a row), or a directory with such files at any depth. In a directory,
            hidden and binary files and other endings are passed over.
        field: the field of a jsonl line, or the column of a parquet file, that holds the text.
        validation_fraction: share of the documents held out for validation (see `hash_split`).
        max_bytes: stop after about this many bytes of training text (UTF-8).

    Attributes:
        invalid_utf8: documents in which bytes that are not UTF-8 were replaced, counted while `documents` runs.

    Raises:
        UserError: the path does not exist, or is a file of another kind.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        field: str = "text",
        validation_fraction: float = VALIDATION_FRACTION,
        max_bytes: int | None = None,
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        self.name = self.path.name
        self.field = field
        self.validation_fraction = check_fraction(validation_fraction)
        self.max_bytes = max_bytes
        self.invalid_utf8 = 0
        if not self.path.exists():
            raise UserError(
                f"no such file or directory: {path}; give one that exists, or a corpus that ln-prepare --help lists"
            )
        if self.path.is_file() and not self.path.name.lower().endswith(SUFFIXES):
            raise UserError(
                f"{path} has an ending that is not read; give a file with one of {', '.join(SUFFIXES)}, or a directory"
            )

    def identity(self) -> dict[str, object]:
        digest = hashlib.sha256()
        for file in self._files():
            status = file.stat()
            digest.update(
                f"{self._key(file)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
        return {
            "name": "local files",
            "path": str(self.path),
            "files_sha256": digest.hexdigest(),
            "field": self.field,
            "validation_fraction": self.validation_fraction,
            "max_bytes": self.max_bytes,
        }

    def content_sha256(self) -> str:
        """A hash of the names and the content of all files, for when only their times or their place differ.

        Empty if there are more than LARGEST_HASHED bytes. Beside the reading itself, a gigabyte takes about a second.

        Raises:
            UserError: a file cannot be read.
        """
        files = list(self._files())
        digest = hashlib.sha256()
        try:
            if sum(file.stat().st_size for file in files) > LARGEST_HASHED:
                return ""
            for file in files:
                digest.update(f"{self._key(file)}\0{checksum(file)}\n".encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read: {error.strerror}; remove it or make it readable"
            ) from error
        return digest.hexdigest()

    def documents(self, skip: int = 0) -> Iterator[Document]:
        self.invalid_utf8 = 0
        count = written = 0
        for key, text in self._texts():
            if self.max_bytes is not None and written >= self.max_bytes and count >= 2:
                return
            split = hash_split(count, key, self.validation_fraction)
            if split == "train":
                written += len(text.encode())
            if count >= skip:
                yield Document(text, split, SOURCE)
            count += 1
        if count < 2:
            raise UserError(self._too_small(count))

    def _too_small(self, count: int) -> str:
        if self.path.is_file():
            return (
                f"{self.path} holds {count} documents ({self.path.stat().st_size:,} bytes); at least 2 are needed, one "
                "to train on and one to validate on; add text, or give a directory"
            )
        endings = Counter(path.suffix or path.name for path in _walk(self.path))
        found = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(5)) or "no files"
        return (
            f"{self.path} holds {count} documents; at least 2 are needed, one to train on and one to validate on; read "
            f"are {' '.join(SUFFIXES)} that are not empty, hidden or binary; found {found}"
        )

    def _files(self) -> Iterator[Path]:
        if self.path.is_file():
            yield self.path
        else:
            yield from (path for path in _walk(self.path) if path.name.lower().endswith(SUFFIXES))

    def _key(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every document as (key, text); documents of white space only are left out."""
        for file in self._files():
            key, name = self._key(file), file.name.lower()
            try:
                if name.endswith(TEXT_SUFFIXES):
                    texts = self._text_file(file)
                elif name.endswith(JSONL_SUFFIXES):
                    texts = self._jsonl(file)
                else:
                    texts = self._parquet(file)
                for number, text in enumerate(texts):
                    if text.strip():
                        yield f"{key}:{number}", text
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{file} cannot be read: {error}; remove it or make it readable") from error

    def _text_file(self, file: Path) -> Iterator[str]:
        with file.open("rb") as opened:
            if b"\0" in opened.read(8192):
                if file == self.path:
                    raise UserError(f"{file} is a binary file; give UTF-8 text")
                return
            opened.seek(0)
            if os.fstat(opened.fileno()).st_size <= WHOLE_FILE_BYTES:
                yield self._decode(opened.read())
            else:
                yield from map(self._decode, _pieces(opened))

    def _jsonl(self, file: Path) -> Iterator[str]:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as opened:
            for number, raw in enumerate(opened, start=1):
                line = self._decode(raw)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file}, line {number}: not JSON ({error.msg} at column {error.colno}); correct that line"
                    ) from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too many brackets
                    raise UserError(f"{file}, line {number}: cannot be read as JSON ({error}); correct it") from None
                text = row.get(self.field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    found = ", ".join(map(str, islice(row, 8))) if isinstance(row, dict) else type(row).__name__
                    raise UserError(
                        f"{file}, line {number}: no text in the field {self.field!r} (found: {found}); name the right "
                        "one with --field"
                    )
                yield self._without_surrogates(text)

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            # Buffering ahead would keep everything read so far in memory until the file is closed.
            with parquet.ParquetFile(file, pre_buffer=False) as opened:
                schema = opened.schema_arrow
                if self.field not in schema.names:
                    raise UserError(
                        f"{file} has no column {self.field!r} (found: {', '.join(schema.names)}); name the right "
                        "one with --field"
                    )
                kind = schema.field(self.field).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise UserError(
                        f"{file}: the column {self.field!r} holds {kind}, not strings; name the text column "
                        "with --field"
                    )
                for batch in opened.iter_batches(batch_size=PARQUET_ROWS, columns=[self.field]):
                    for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                        yield self._decode(data or b"")
        except pa.ArrowException as error:
            raise UserError(
                f"{file} is not a whole parquet file: {' '.join(str(error).split())[:200]}; copy or write it again"
            ) from error

    def _decode(self, data: bytes) -> str:
        data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.invalid_utf8 += 1
            return data.decode(errors="replace")

    def _without_surrogates(self, text: str) -> str:
        """JSON can spell half of a surrogate pair, which no encoding of text has."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.invalid_utf8 += 1
            return text.encode(errors="replace").decode()
        return text


def _walk(directory: Path) -> Iterator[Path]:
    """All files below a directory in the order of their paths, without hidden ones and those behind linked folders."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be listed: {error.strerror}; make it readable or leave it out"
        ) from error

    for folder, folders, files in os.walk(directory, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Cut a text into pieces of a little over PIECE_BYTES, at blank lines where possible; joined, they are the text."""
    piece = bytearray()
    while line := file.readline(MAXIMUM_PIECE_BYTES):
        piece += line
        while len(piece) > MAXIMUM_PIECE_BYTES:
            end = piece.rfind(b"\n", PIECE_BYTES, MAXIMUM_PIECE_BYTES) + 1
            end = end or _character_boundary(piece, MAXIMUM_PIECE_BYTES)
            yield bytes(piece[:end])
            del piece[:end]
        if len(piece) >= PIECE_BYTES and not line.strip():
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _character_boundary(data: bytearray, end: int) -> int:
    """The last position up to `end` that is not inside a UTF-8 character (`end` itself when that is nowhere near)."""
    return next((end - back for back in range(4) if data[end - back] & 0xC0 != 0x80), end)
