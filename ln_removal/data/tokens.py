"""Token shards on disk: append-only binary files of uint16 or uint32 plus one index, read through memory maps.

A directory of tokens holds `train-stdlib-00000.bin`, `validation-stdlib-00000.bin`, ... and `index.json`. The index is written
last and atomically: a directory without it is an unfinished preparation. Every document ends with the end-of-text token.

Shape legend: N windows, T positions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ln_removal.data.corpora import SPLITS, Split
from ln_removal.errors import UserError
from ln_removal.files.atomic import checksum, write_json_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "ln-removal tokens 1"
INDEX = "index.json"
SHARD_NAME = re.compile(r"(train|validation)-.*-\d{5,}\.bin")

Tokens = npt.NDArray[np.int64]

PROBE = (
    "It's 1,234.5 o'clock -- they'll say: \"We've DONE it!\" (isn't that so?)  Two  spaces,\ttabs\t\tand ends. \n\n\r\n  x\n",
    "def f(self, x_1=0x1F):\n    return [a**2 for a in range(10)]  # $100%\n\t}\n",
    " leading, camelCaseWords, ALLCAPS, 3rd 2nd20202020, e\u0301 \u00e9 \ufb01 \u2126 \u00a0 \u3000 \u200b\u00ad",
    "\u00c4rger stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\uff0c\u4e16\u754c",
    "\u0627\u0644\u0633 \u0939\u093f\u0928 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2014 \u201cq\u201d",
)
"""Texts on which normalizers and pre-tokenizers differ."""

TOKENS_AT_ONCE = 1 << 24
"""Tokens of a shard that are compared with the end-of-text token at once."""


@dataclass
class Shard:
    """One file of tokens. `bytes` counts the UTF-8 bytes of the text behind them (0 where the text is not known)."""

    file: str
    split: Split
    source: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    sha256: str = ""


@dataclass
class TokenIndex:
    """What `index.json` holds. `without_text` counts documents that have no text and gave no token (a null, for instance)."""

    corpus: dict[str, object]
    tokenizer: dict[str, str]
    vocab_size: int
    eot_token_id: int
    dtype: str
    shards: list[Shard] = field(default_factory=list)
    without_text: int = 0
    format: str = FORMAT

    def total(self, split: Split, attribute: str) -> int:
        return sum(int(getattr(shard, attribute)) for shard in self.shards if shard.split == split)


Group = tuple[Split, str]
"""Split and source: what a shard holds."""


class EncodedPart(NamedTuple):
    """Documents of one group as they are written to its shard, and what they count as."""

    group: Group
    data: bytes
    tokens: int
    documents: int
    text_bytes: int


def dtype_for(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenSplit:
    """One split of a prepared corpus: memory-mapped shards read as one long sequence of tokens."""

    def __init__(self, directory: Path, index: TokenIndex, split: Split) -> None:
        self.name = split
        self.shards = [shard for shard in index.shards if shard.split == split and shard.tokens > 0]
        self.tokens = index.total(split, "tokens")
        self.documents = index.total(split, "documents")
        self.bytes = index.total(split, "bytes")
        self.eot_token_id = index.eot_token_id
        self.vocab_size = index.vocab_size
        self._directory = directory
        self._dtype = np.dtype(index.dtype)

    @cached_property
    def maps(self) -> list[npt.NDArray[Any]]:
        """The shards as read-only memory maps, in the order of `shards`."""
        return [np.memmap(self._directory / shard.file, dtype=self._dtype, mode="r") for shard in self.shards]

    @cached_property
    def document_starts(self) -> list[Tokens]:
        """Where the documents of each shard begin: 0, and behind every end-of-text token but the shard's last token."""
        return [np.concatenate([np.zeros(1, np.int64), self._ends(data[:-1]) + 1]) for data in self.maps]

    @cached_property
    def document_lengths(self) -> list[Tokens]:
        """Tokens of each document of `document_starts`, with its end-of-text token."""
        return [np.diff(starts, append=len(data)) for starts, data in zip(self.document_starts, self.maps, strict=True)]

    def _ends(self, data: npt.NDArray[Any]) -> Tokens:
        """Where the end-of-text tokens are. A part at a time, because the comparison of a whole shard would fill the memory."""
        parts = range(0, len(data), TOKENS_AT_ONCE)
        ends = [start + np.flatnonzero(data[start : start + TOKENS_AT_ONCE] == self.eot_token_id) for start in parts]
        return np.concatenate([np.zeros(0, np.int64), *ends])

    def beginnings(self, count: int, longest: int) -> Tokens | None:
        """The first tokens of `count` documents, the same number of each, so that no padding is needed.

        They are as many as `count` documents have, at most `longest`. The documents are spread evenly over those that have so
        many.

        Returns:
            (count, n) with n <= longest; None if there are not so many documents of at least two tokens.
        """
        lengths = np.concatenate([np.zeros(0, np.int64), *self.document_lengths])
        if count > len(lengths) or (length := min(longest, int(np.sort(lengths)[-count]))) < 2:
            return None
        shards = np.repeat(np.arange(len(self.maps)), [len(starts) for starts in self.document_starts])
        starts = np.concatenate(self.document_starts)
        enough = np.flatnonzero(lengths >= length)
        chosen = enough[(2 * np.arange(count) + 1) * len(enough) // (2 * count)]
        return np.stack([self.read(int(shards[place]), int(starts[place]), length) for place in chosen])

    def read(self, shard: int, start: int, count: int) -> Tokens:
        """`count` tokens of one shard from `start`, as int64 of shape (count,)."""
        return np.asarray(self.maps[shard][start : start + count], dtype=np.int64)

    def windows(self, length: int, *, limit_tokens: int | None = None, batch: int = 1) -> Iterator[Tokens]:
        """Non-overlapping windows in order, in batches of shape (n <= batch, length); a remainder shorter than `length` is left out.

        Args:
            length: tokens in a window.
            limit_tokens: stop after this many tokens.
            batch: windows in one array.
        """
        remaining = None if limit_tokens is None else max(1, limit_tokens // length)
        pending: list[Tokens] = []
        for shard, data in enumerate(self.maps):
            for start in range(0, len(data) - length + 1, length):
                if remaining == 0:
                    break
                pending.append(self.read(shard, start, length))
                remaining = None if remaining is None else remaining - 1
                if len(pending) == batch:
                    yield np.stack(pending)
                    pending = []
        if pending:
            yield np.stack(pending)


class TokenDataset:
    """A prepared corpus. Open one with `TokenDataset.open(directory)`."""

    def __init__(self, directory: Path, index: TokenIndex) -> None:
        self.directory = directory
        self.index = index
        self._splits: dict[Split, TokenSplit] = {}

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def eot_token_id(self) -> int:
        return self.index.eot_token_id

    @property
    def tokenizer(self) -> dict[str, str]:
        """`name`, `sha256` and `ids_sha256` of the tokenizer that made the tokens; old ones lack the last."""
        return self.index.tokenizer

    @property
    def corpus_name(self) -> str:
        """The corpus as a user would name it: its path for local files, else its name."""
        corpus = self.index.corpus
        return str(corpus.get("path") or corpus.get("name") or self.directory)

    def split(self, name: Split) -> TokenSplit:
        """The same object each time, so that its documents are looked for once."""
        if name not in self._splits:
            self._splits[name] = TokenSplit(self.directory, self.index, name)
        return self._splits[name]

    @classmethod
    def open(cls, directory: Path | str) -> TokenDataset:
        """Open a directory written by `ln-prepare`.

        Raises:
            UserError: when it is not there, not finished, of another format, or a shard is missing or of another size.
        """
        directory = Path(directory)
        path = directory / INDEX
        if not path.is_file():
            raise UserError(_what_else(directory))
        index = read_index(path)
        width = np.dtype(index.dtype).itemsize
        for shard in index.shards:
            file = directory / shard.file
            size = file.stat().st_size if file.is_file() else -1
            if size != shard.tokens * width:
                found = "missing" if size < 0 else f"{size} bytes long"
                raise UserError(
                    f"{file} is {found}, the index says {shard.tokens * width} bytes; delete {directory} and run "
                    "ln-prepare again"
                )
        return cls(directory, index)

    def verify(self) -> None:
        """Compare every shard with its checksum (reads all the data).

        Raises:
            UserError: naming the first shard that differs.
        """
        for shard in self.index.shards:
            if checksum(self.directory / shard.file) != shard.sha256:
                raise UserError(f"{self.directory / shard.file} does not match its checksum; run ln-prepare again")


def _what_else(directory: Path) -> str:
    """What to say about a directory without an index."""
    if not directory.exists():
        return f"{directory}: there is no such directory; make it with ln-prepare CORPUS --out {directory}"
    folder = directory if directory.is_dir() else directory.parent
    files = sorted(file.name for file in folder.glob("*.bin"))
    if any(SHARD_NAME.fullmatch(name) for name in files):
        return (
            f"{folder}: an unfinished preparation (there is no {INDEX}); run the ln-prepare command again that began it, with "
            f"--out {folder}"
        )
    if files:
        return (
            f"{folder}: no tokens of ln-prepare (there is no {INDEX}), but {', '.join(files[:3])}; nanoGPT and llm.c write such "
            "files, which do not say what their tokenizer is or where the documents came from, so they are not read; prepare "
            "the same text with ln-prepare CORPUS --out OTHER (nanoGPT's OpenWebText is the corpus openwebtext)"
        )
    if not directory.is_dir():
        return (
            f"{directory} is a file; give the directory that ln-prepare wrote, or make one with ln-prepare {directory}"
        )
    return f"{directory}: no tokens (there is no {INDEX}); run ln-prepare CORPUS --out {directory}"


def ids_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the ids that a tokenizer gives to text: equal for two tokenizers that are only written in different ways.

    It is taken over the vocabulary and the merges without the added tokens, which ordinary text does not have, the id of the
    end-of-text token, and the ids of `PROBE`, which show what normalizer and pre-tokenizer do.
    """
    from tokenizers import Tokenizer

    written = tokenizer.backend_tokenizer.to_str()
    state = json.loads(written)
    added = {token["content"] for token in state["added_tokens"]}
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = sorted((token, number) for token, number in vocabulary.items() if token not in added)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"].get("merges") or ()]
    own = Tokenizer.from_str(written)  # calls of the tokenizer switch truncation and padding on and off
    own.no_truncation()
    own.no_padding()
    eot = tokenizer.eos_token_id
    texts = PROBE if eot is None else (*PROBE, f"a{own.id_to_token(eot)}b")
    kept = [vocabulary, merges, [own.encode(text, add_special_tokens=False).ids for text in texts], eot]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def is_same_tokenizer(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two entries `tokenizer` of an index stand for tokenizers that give the same ids. Older ones have only `sha256`."""
    ids = one.get("ids_sha256")
    return one["sha256"] == other["sha256"] or (ids is not None and ids == other.get("ids_sha256"))


def read_index(path: Path) -> TokenIndex:
    """Parse an index file.

    Raises:
        UserError: when it is not valid JSON or not in this version's format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise UserError(
                f"{path} is in the format {raw['format']!r}, this version reads {FORMAT!r}; run ln-prepare again"
            )
        return parse_index(raw)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its directory and run ln-prepare again") from error


def parse_index(raw: dict[str, Any]) -> TokenIndex:
    """A TokenIndex from its JSON form.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not one.
    """
    index = TokenIndex(**{**raw, "shards": [Shard(**shard) for shard in raw["shards"]]})
    if index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {index.dtype!r}, expected uint16 or uint32")
    if not {"name", "sha256"} <= index.tokenizer.keys():
        raise ValueError("the tokenizer has no name or no sha256")
    for shard in index.shards:
        if Path(shard.file).name != shard.file or shard.split not in SPLITS:
            raise ValueError(f"the shard {shard.file!r} is not a file of this directory")
    numbers = [index.vocab_size, index.eot_token_id, index.without_text]
    numbers += [number for shard in index.shards for number in (shard.tokens, shard.documents, shard.bytes)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a count is not a whole number")
    return index


def write_index(directory: Path, index: TokenIndex) -> None:
    """Write `index.json`: from here on the directory counts as complete."""
    write_json_atomically(directory / INDEX, asdict(index))


def given_tokens(out: Path, directory: Path | str | None) -> TokenDataset | None:
    """The tokens named by the user, now or when the run was begun; None when the run prepares its own.

    Raises:
        UserError: as `TokenDataset.open`.
    """

    if directory is not None:
        return TokenDataset.open(directory)
    return TokenDataset.open(out / "tokens") if (out / "tokens").is_symlink() else None


class ShardWriter:
    """Appends documents to the shards of a directory.

    For each group one shard is open. Once it is full it is closed, and its checksum is entered in the index.

    Args:
        directory: of the shards.
        index: gets new shards and their counts; it may list shards of an interrupted preparation, which are continued.
        shard_tokens: tokens from which a shard is full. A document is never split.
    """

    def __init__(self, directory: Path, index: TokenIndex, shard_tokens: int) -> None:
        self.directory = directory
        self.index = index
        self._shard_tokens = shard_tokens
        self._open = {(shard.split, shard.source): self._opened(shard) for shard in index.shards if not shard.sha256}

    def append(self, part: EncodedPart) -> None:
        """Append one group's documents.

        Raises:
            OSError: the disk is full; the counts in the index say what was to be written.
        """
        opened = self._open.get(part.group)
        if opened is not None and opened.shard.tokens >= self._shard_tokens:
            opened.close()
            opened.shard.sha256 = checksum(opened.path)
            opened = None
        if opened is None:
            opened = self._open[part.group] = self._opened(self._new_shard(part.group))
        opened.append(part)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        for opened in self._open.values():
            opened.sync()

    def close(self) -> None:
        """Close the files; they can be continued later."""
        for opened in self._open.values():
            opened.close()

    def complete(self) -> None:
        """Enter the checksums of the shards that are not full, and write the index."""
        for opened in self._open.values():
            opened.shard.sha256 = checksum(opened.path)
        write_index(self.directory, self.index)

    def _opened(self, shard: Shard) -> _OpenShard:
        return _OpenShard(self.directory / shard.file, shard, np.dtype(self.index.dtype).itemsize)

    def _new_shard(self, group: Group) -> Shard:
        split, source = group
        # Two sources may have the same safe name, so their shards are numbered together.
        safe = _safe(source)
        number = sum(shard.split == split and _safe(shard.source) == safe for shard in self.index.shards)
        shard = Shard(file=f"{split}-{safe}-{number:05d}.bin", split=split, source=source)
        self.index.shards.append(shard)
        return shard


class _OpenShard:
    """A shard that is being written; what lies beyond its count of tokens is cut off first."""

    def __init__(self, path: Path, shard: Shard, width: int) -> None:
        self.path = path
        self.shard = shard
        self._file: BinaryIO = path.open("ab")
        self._file.truncate(shard.tokens * width)
        self._file.seek(0, os.SEEK_END)

    def append(self, part: EncodedPart) -> None:
        self.shard.tokens += part.tokens  # first: when the disk is full it is said how much did not fit
        self.shard.documents += part.documents
        self.shard.bytes += part.text_bytes
        self._file.write(part.data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()


def _safe(source: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in source)
