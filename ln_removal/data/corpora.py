"""What a corpus is, and corpora from files of this machine: text, JSON, parquet, or a directory of them.

A corpus is a deterministic stream of documents, each in one split and from one named source. Local documents come in the
order of the files' paths. Whatever the size, one document, one line or one parquet batch is in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from ln_removal.data.text_files import SUFFIXES, WHAT_IS_READ, FileReader, ending
from ln_removal.errors import UserError
from ln_removal.files.atomic import checksum

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

VALIDATION_FRACTION = 0.005

GENERATED = "generated"
"""The corpus that a model writes itself; see data/generated.py, which needs torch."""

LARGEST_HASHED = 100 << 30
"""The content of more bytes than this is not hashed."""

SOURCE = "local"
MOST_KINDS_LISTED = 8


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


@runtime_checkable
class Remarking(Protocol):
    """A corpus that notes what it had to change or to pass over."""

    def remarks(self) -> list[str]:
        """One line for each kind of change, about the documents read since `documents` was last called."""
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
        path: `.txt`, `.md`, `.py` (one document a file; larger than 1 MiB: pieces cut at blank lines), `.jsonl`, `.ndjson`
            (one document a line), `.json` (lines or one array), all of these also compressed, `.parquet` (one document a
            row), or a directory with such files at any depth. In a directory, links are followed once; hidden and binary
            files and other endings are passed over, and `remarks` says so.
        field: the field of a JSON object, or the column of a parquet file, that holds the text.
        validation_fraction: share of the documents held out for validation (see `hash_split`).
        max_bytes: stop after about this many bytes of training text (UTF-8).

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
        self._reader = FileReader(field)
        if not self.path.exists():
            raise UserError(
                f"no such file or directory: {path}; give one that exists, or a corpus that ln-prepare --help lists"
            )
        if self.path.is_file() and ending(self.path) not in SUFFIXES:
            raise UserError(
                f"{path} has an ending that is not read; give a file with one of {WHAT_IS_READ}, or a directory"
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
        endings = Counter(_described(path) for path in _walk(self.path))
        return (
            f"{self.path} holds {count} documents; at least 2 are needed, one to train on and one to validate on; read "
            f"are {WHAT_IS_READ} that are not empty, hidden or binary; found {_listed(endings) or 'no files'}"
            + (
                f"; of these were passed over {_listed(passed_over)}"
                if (passed_over := self._reader.passed_over)
                else ""
            )
        )

    def remarks(self) -> list[str]:
        read, again = self._reader, "correct them and prepare again if they matter"
        remarks = []
        if read.replaced.count:
            remarks.append(
                f"{self.name}: bytes that are not UTF-8 were replaced by U+FFFD in {read.replaced.count:,} of the documents "
                f"read, the first in {read.replaced.first}; {again}"
            )
        if read.without_text.count:
            remarks.append(
                f"{self.name}: no text in the field {self.field!r} of {read.without_text.count:,} of the rows read, which were "
                f"passed over, the first in {read.without_text.first}; {again}"
            )
        if not self.path.is_file():
            others = Counter(_described(path) for path in _walk(self.path) if not _is_read(path)) + read.passed_over
            if others:
                remarks.append(f"{self.name}: passed over {_listed(others)}; read are {WHAT_IS_READ}")
        return remarks

    def _files(self) -> Iterator[Path]:
        if self.path.is_file():
            yield self.path
        else:
            yield from filter(_is_read, _walk(self.path))

    def _key(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every document as (key, text); documents of white space only are left out."""
        self._reader = FileReader(self.field)
        for file in self._files():
            key = self._key(file)
            for number, text in enumerate(self._reader.texts(file, required=file == self.path)):
                if text.strip():
                    yield f"{key}:{number}", text


def _is_read(path: Path) -> bool:
    return ending(path) in SUFFIXES and path.is_file()


def _described(path: Path) -> str:
    """What a file counts as in a list of those that are not read."""
    if path.is_file():
        return ending(path) or "without an ending"
    return "broken link" if path.is_symlink() else "special file"


def _listed(files: Counter[str]) -> str:
    """Such as "3 .csv, 1 binary .txt", the most frequent first."""
    listed = [f"{number:,} {kind}" for kind, number in files.most_common(MOST_KINDS_LISTED)]
    rest = files.total() - sum(number for _, number in files.most_common(MOST_KINDS_LISTED))
    return ", ".join([*listed, *([f"{rest:,} others"] if rest else [])])


def _walk(root: Path) -> Iterator[Path]:
    """All files below a directory in the order of their paths, without hidden ones.

    Links are followed, but nothing is given twice: a link to what is in the directory anyway is left out, and so is a folder or a
    file outside of it that an earlier link led to. A link that leads nowhere is given, because it is not read as a file.

    Args:
        root: a resolved path.
    """
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be listed: {error.strerror}; make it readable or leave it out"
        ) from error

    def is_new(path: Path) -> bool:
        real = Path(os.path.realpath(path))
        if real.is_relative_to(root):
            hidden = any(part.startswith(".") for part in real.relative_to(root).parts)
            if not hidden and (real.is_dir() or (real.is_file() and ending(real) in SUFFIXES)):
                return False  # it is read under its own name
        if str(real) in seen:
            return False
        seen.add(str(real))
        return True

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        linked = os.path.realpath(folder) != folder
        given = {
            name: path
            for name in sorted([*folders, *files])
            if not name.startswith(".")
            for path in [Path(folder, name)]
            if not (linked or os.path.islink(path)) or is_new(path)
        }
        below = given.keys() & folders
        folders[:] = sorted(below)
        yield from (path for name, path in given.items() if name not in below)
