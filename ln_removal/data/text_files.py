"""How one file becomes documents: text, JSON or parquet, compressed or not, in UTF-8 or in UTF-16 with a byte-order mark.

One document, one line or one parquet batch is in memory at a time. Only a JSON file that is one array is read as a whole.
"""

from __future__ import annotations

import codecs
import importlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from ln_removal.errors import UserError

try:
    from lzma import LZMAError
except ImportError:
    LZMAError = OSError  # type: ignore[misc, assignment]

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = frozenset(
    [kind + compression for kind in TEXT_SUFFIXES + JSON_SUFFIXES for compression in ("", *COMPRESSIONS)] + [".parquet"]
)

_PLAIN = " ".join(TEXT_SUFFIXES + JSON_SUFFIXES)
WHAT_IS_READ = f"{_PLAIN}, the same compressed ({' '.join(COMPRESSIONS)}, as in .jsonl.gz), and .parquet"

WHOLE_FILE_BYTES = 1 << 20
"""Text files up to this size are one document; larger ones are cut into pieces."""

PIECE_BYTES = 64 << 10
"""A piece ends at the first blank line after this many bytes..."""

MAXIMUM_PIECE_BYTES = 256 << 10
"""...or, when there is none, at the last line that ends before this many bytes."""

PARQUET_ROWS = 512
BINARY_PROBE_BYTES = 8192
UTF16_BYTES = 64 << 10

READ_ERRORS = (OSError, EOFError, zlib.error, LZMAError)
"""What reading a file raises that is missing, unreadable, cut off or not compressed as its ending says."""

_ANY_JSON = {".json", *(".json" + compression for compression in COMPRESSIONS)}
_ARRAY_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\]|$)")
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


def ending(file: Path) -> str:
    """The ending in lower case, with the one before it where it names a compression: `.txt`, `.jsonl.gz`, or empty."""
    stem, last = os.path.splitext(file.name.lower())
    return os.path.splitext(stem)[1] + last if last in COMPRESSIONS else last


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader]:
    """A file as a stream of UTF-8: decompressed as its ending says, and recoded if it begins with UTF-16's byte-order mark.

    A byte-order mark of UTF-8 is left where it is. Opening and reading raise `READ_ERRORS`.
    """
    with _decompressed(file) as stream:
        mark = stream.peek(4)[:4]
        is_utf16 = mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and mark != codecs.BOM_UTF32_LE
        yield io.BufferedReader(_FromUtf16(stream)) if is_utf16 else stream


def _decompressed(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file.open("rb"), "zstd"))
    # Imported only when needed: Python can be built without some of them.
    modules = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
    if suffix in modules:
        return io.BufferedReader(importlib.import_module(modules[suffix]).open(file))
    return file.open("rb")


class _FromUtf16(io.RawIOBase):
    """The UTF-8 of a UTF-16 stream.

    What is no character in UTF-16 (half of a surrogate pair, a single byte at the end) becomes bytes that are no character in
    UTF-8, so that whoever decodes them finds the fault.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (data := self._stream.read(UTF16_BYTES)):
            self._ready = self._decoder.decode(data).encode("utf-8", "surrogatepass")
        if not self._ready and self._decoder.getstate()[0]:
            self._decoder.reset()
            self._ready = b"\xff"
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def array_items(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, each with the number of the line that it begins in, from 1.

    Raises:
        ValueError, RecursionError: the text is not a JSON array; a json.JSONDecodeError knows the line.
    """
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _after_space(text, text.index("[") + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        item, end = decoder.raw_decode(text, at)
        yield line, item
        at = _after_space(text, end)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if _after_space(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def is_json_array(beginning: bytes) -> bool:
    """Whether a file that begins with these bytes of UTF-8 is one JSON array of objects, not a file of lines."""
    return _ARRAY_START.match(beginning) is not None


@dataclass
class Noted:
    """How often something was found while reading, and where first."""

    count: int = 0
    first: str = ""

    def add(self, file: Path, part: str = "", number: int = 0) -> None:
        """Count one more, found in a file or in a numbered part of it, such as a line."""
        if not self.count:
            self.first = f"{file}, {part} {number}" if part else str(file)
        self.count += 1


class FileReader:
    """Reads files and notes what it had to change or pass over.

    Args:
        field: the field of a JSON object, or the column of a parquet file, that holds the text.

    Attributes:
        replaced: documents in which what is no character was replaced by U+FFFD.
        without_text: rows whose text is null or empty.
        passed_over: files that hold no documents although their ending is one of `SUFFIXES`, by what they are.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self.replaced = Noted()
        self.without_text = Noted()
        self.passed_over: Counter[str] = Counter()

    def texts(self, file: Path, *, required: bool) -> Iterator[str]:
        """The documents of a file; an empty one where a row has no text.

        Args:
            file: has one of `SUFFIXES`.
            required: what cannot be documents is an error, because the user named this very file. Otherwise a binary file and
                a .json file whose first object does not have the field are passed over.

        Raises:
            UserError: the file cannot be read, is not of the kind that its ending says, or a row has no such field.
        """
        kind = ending(file)
        try:
            if kind == ".parquet":
                yield from self._parquet(file)
            elif kind.startswith(JSON_SUFFIXES):
                # A .json file may as well hold settings or a description, the others are always rows.
                yield from self._json(file, required or kind not in _ANY_JSON)
            else:
                yield from self._text(file, required)
        except READ_ERRORS as error:
            raise UserError(f"{file} cannot be read: {error}; remove it or make it readable") from error

    def _text(self, file: Path, required: bool) -> Iterator[str]:
        with opened(file) as stream:
            beginning = probe = stream.read(BINARY_PROBE_BYTES)
            if (
                len(probe) == BINARY_PROBE_BYTES
            ):  # there may be more; of small files this spares a buffer for a large one
                beginning += stream.read(WHOLE_FILE_BYTES + 1 - BINARY_PROBE_BYTES)
        if b"\0" in probe:
            if required:
                raise UserError(f"{file} is a binary file; give text in UTF-8, or in UTF-16 with a byte-order mark")
            self.passed_over[f"binary {ending(file)}"] += 1
        elif len(beginning) <= WHOLE_FILE_BYTES:
            yield self._decode(beginning, file)
        else:
            with opened(file) as stream:
                for piece in _pieces(stream):
                    yield self._decode(piece, file)

    def _json(self, file: Path, required: bool) -> Iterator[str]:
        rows = self._json_rows(file)
        if not required:
            try:
                first = next(rows, None)
            except UserError:
                first = None
            if first is None or not isinstance(first[1], dict) or self.field not in first[1]:
                self.passed_over[f"{ending(file)} without the field {self.field!r}"] += 1
                return
            rows = chain([first], rows)
        for line, row in rows:
            text = self._field_of(row, file, line)
            if not text.strip():
                self.without_text.add(file, "line", line)
            yield self._without_surrogates(text, file, line)

    def _field_of(self, row: Any, file: Path, line: int) -> str:
        if not isinstance(row, dict) or self.field not in row:
            found = ", ".join(map(str, islice(row, 8))) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{file}, line {line}: no text in the field {self.field!r} (found: {found}); name the right one with --field"
            )
        text = "" if row[self.field] is None else row[self.field]
        if not isinstance(text, str):
            raise UserError(
                f"{file}, line {line}: the field {self.field!r} holds no text but {json.dumps(text)[:60]}; correct that line, "
                "or name another field with --field"
            )
        return text

    def _json_rows(self, file: Path) -> Iterator[tuple[int, Any]]:
        """The rows of a file of JSON lines, or the items of its array, with the numbers of their lines."""
        line = 0
        try:
            with opened(file) as stream:
                if is_json_array(stream.peek(64)):
                    yield from array_items(self._decode(stream.read(), file))
                    return
                for line, raw in enumerate(stream, start=1):
                    if (decoded := self._decode(raw, file, "line", line)).strip():
                        yield line, json.loads(decoded)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {line or error.lineno}: not JSON ({error.msg} at column {error.colno}); correct that line"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too many brackets
            place = f", line {line}" if line else ""
            raise UserError(f"{file}{place}: cannot be read as JSON ({error}); correct it") from None

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow as pa
        from pyarrow import parquet

        rows = count(1)
        try:
            # Buffering ahead would keep everything read so far in memory until the file is closed.
            with parquet.ParquetFile(file, pre_buffer=False) as source:
                schema = source.schema_arrow
                if self.field not in schema.names:
                    raise UserError(
                        f"{file} has no column {self.field!r} (found: {', '.join(schema.names)}); name the right "
                        "one with --field"
                    )
                if not _is_text(kind := schema.field(self.field).type):
                    raise UserError(
                        f"{file}: the column {self.field!r} holds {kind}, not strings; name the text column "
                        "with --field"
                    )
                for batch in source.iter_batches(batch_size=PARQUET_ROWS, columns=[self.field]):
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    for data, row in zip(column.cast(pa.large_binary()).to_pylist(), rows, strict=False):
                        text = self._decode(data or b"", file, "row", row)
                        if not text.strip():
                            self.without_text.add(file, "row", row)
                        yield text
        except pa.ArrowException as error:
            raise UserError(
                f"{file} is not a whole parquet file: {' '.join(str(error).split())[:200]}; copy or write it again"
            ) from error

    def _decode(self, data: bytes, file: Path, part: str = "", number: int = 0) -> str:
        data = data.removeprefix(codecs.BOM_UTF8)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.replaced.add(file, part, number)
            return data.decode(errors="replace")

    def _without_surrogates(self, text: str, file: Path, line: int) -> str:
        """JSON can spell half of a surrogate pair, which no encoding of text has."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.replaced.add(file, "line", line)
            return _SURROGATE.sub("\ufffd", text)
        return text


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of those for strings. A column without any value has the type null."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_view = getattr(types, "is_string_view", lambda kind: False)  # newer than the oldest pyarrow that is supported
    storage = getattr(kind, "storage_type", kind)  # of an extension type, such as that for JSON
    return bool(
        types.is_string(storage) or types.is_large_string(storage) or types.is_null(storage) or is_view(storage)
    )


def _pieces(file: io.BufferedReader) -> Iterator[bytes]:
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
