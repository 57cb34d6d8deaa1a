"""Corpora from the Hugging Face Hub, streamed: the ones this project knows, and any other data set by its id.

Nothing is downloaded as a whole: rows are read from the Hub as they are needed, and an interrupted preparation goes on
in the file where it stopped. The row counts in the footers of parquet files say which file that is.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from ln_removal.data.corpora import VALIDATION_FRACTION, Document, Split, TokenDocument, check_fraction, hash_split
from ln_removal.errors import UserError
from ln_removal.files.hub import HUB_SECONDS, first_answer, hub_error, is_unreachable

NANOGPT_TEST_SIZE = 0.0005
NANOGPT_SEED = 2357

VALIDATION_DOCUMENTS = 10_000
"""At most this many documents are taken from a data set's own validation split."""

# What the LN-free papers leave out of the Pile: text close to GPT-2's training data, and books.
FILTERED_PILE_SETS = frozenset({"OpenWebText2", "Books3", "BookCorpus2"})

WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubPart:
    """One split of one Hub data set. Of a data set that has one split and is used once, the split's name may differ."""

    dataset: str
    split: str = "train"
    validation: bool = False  # all of it is held out
    optional: bool = False


@dataclass(frozen=True)
class HubSource:
    """Where a corpus is on the Hub and how its rows become documents.

    Without a part that is held out as a whole, documents are held out by nanoGPT's permutation or by a hash.
    """

    name: str
    summary: str
    parts: tuple[HubPart, ...]
    revision: str | None = None
    config: str | None = None
    data_files: tuple[tuple[str, str], ...] = ()  # (split, pattern); empty: as the data set says
    field: str = "text"
    tokenised: bool = False
    nanogpt_split: bool = False
    documents: int | None = None  # how many there should be
    validation_fraction: float = VALIDATION_FRACTION
    dropped_sets: frozenset[str] = frozenset()  # values of meta.pile_set_name
    articles: bool = False  # rows are lines of articles
    compression: str | None = None


def _only(dataset: str) -> tuple[HubPart, ...]:
    return (HubPart(dataset),)


def _both(dataset: str, *, optional: bool = False) -> tuple[HubPart, ...]:
    return (HubPart(dataset, "validation", validation=True, optional=optional), HubPart(dataset))


_PILE = HubSource(
    "the-pile",
    "the Pile without copyrighted sets",
    _both("monology/pile-uncopyrighted"),
    data_files=(("train", "train/*.jsonl*"), ("validation", "val.jsonl*")),
    compression="zstd",
)

KNOWN_CORPORA: dict[str, HubSource] = {
    source.name: source
    for source in (
        HubSource(
            "openwebtext",
            "OpenWebText, about 9 billion GPT-2 tokens, with nanoGPT's validation split",
            _only("Skylion007/openwebtext"),
            revision="refs/convert/parquet",  # main holds a loading script, which datasets refuses from version 4 on
            data_files=(("train", "plain_text/train/*.parquet"),),
            nanogpt_split=True,
            documents=8_013_769,
        ),
        HubSource(
            "openwebtext-tokenized",
            "OpenWebText in rows of 1,024 GPT-2 tokens",
            _only("apollo-research/Skylion007-openwebtext-tokenizer-gpt2"),
            field="input_ids",
            tokenised=True,
            validation_fraction=NANOGPT_TEST_SIZE,
        ),
        _PILE,
        replace(
            _PILE,
            name="the-pile-filtered",
            summary="the same without OpenWebText2, Books3 and BookCorpus2",
            dropped_sets=FILTERED_PILE_SETS,
        ),
        HubSource(
            "pile-tokenized",
            "the Pile without copyrighted sets in rows of 1,024 GPT-2 tokens",
            _only("apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"),
            field="input_ids",
            tokenised=True,
            validation_fraction=NANOGPT_TEST_SIZE,
        ),
        HubSource(
            "pile-10k",
            "the first 10,000 documents of the Pile, for evaluation: all but one are held out",
            _only("NeelNanda/pile-10k"),
            validation_fraction=1.0,
        ),
        HubSource(
            "pile-filtered-10k",
            "10,000 rows of the Pile without tokens that OpenWebText lacks, for evaluation: all but one are held out",
            _only("lucabaroni/apollo-pile-filtered-10k"),
            field="input_ids",
            tokenised=True,
            validation_fraction=1.0,
        ),
        HubSource(
            "wikitext",
            "WikiText-103, raw, one document an article",
            _both("Salesforce/wikitext"),
            config="wikitext-103-raw-v1",
            articles=True,
        ),
        HubSource(
            "codeparrot",
            "CodeParrot's Python files for data science",
            (
                HubPart("huggingface-course/codeparrot-ds-valid", "validation", validation=True),
                HubPart("huggingface-course/codeparrot-ds-train"),
            ),
            field="content",
        ),
    )
}


def hub_source(name: str) -> HubSource:
    """The source behind `hub:OWNER/NAME` or `hub:OWNER/NAME:CONFIG`.

    Its own validation split is held out where it has one.

    Raises:
        UserError: when the id is not of this form.
    """
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)
    if match is None:
        raise UserError(f"{name!r} is not a Hub data set; write hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    return HubSource(name, "a data set of the Hub", _both(match[1], optional=True), config=match[2])


def nanogpt_validation(documents: int) -> frozenset[int]:
    """The indices that nanoGPT holds out: `train_test_split(test_size=0.0005, seed=2357, shuffle=True)` of `datasets`.

    That is the first ceil(0.0005 n) entries of numpy's `default_rng(2357).permutation(n)`.
    """
    import numpy as np

    permutation = np.random.default_rng(NANOGPT_SEED).permutation(documents)
    return frozenset(permutation[: math.ceil(NANOGPT_TEST_SIZE * documents)].tolist())


class HubCorpus:
    """A data set of the Hub as a corpus. Held-out splits come first.

    Args:
        source: one of `KNOWN_CORPORA`, or what `hub_source` gives.
        field: the column with the text (or the token ids); default: the source's.
        validation_fraction: share of documents held out where the source leaves that to a hash; default: the source's.
        max_bytes: stop after about this many bytes of training text (UTF-8).

    Raises:
        UserError: when an option does not fit the source.
    """

    def __init__(
        self,
        source: HubSource,
        *,
        field: str | None = None,
        validation_fraction: float | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.name = source.name
        self._asked_fraction = validation_fraction is not None
        if source.nanogpt_split or any(part.validation and not part.optional for part in source.parts):
            self._check_no_fraction()
        fraction = source.validation_fraction if validation_fraction is None else check_fraction(validation_fraction)
        self.source = replace(source, field=field or source.field, validation_fraction=fraction)
        self.max_bytes = max_bytes
        if source.tokenised and max_bytes is not None:
            raise UserError(f"{self.name} holds tokens, not text, so max_bytes cannot limit it; use --max-tokens")

    def identity(self) -> dict[str, object]:
        described = {key: value for key, value in asdict(self.source).items() if key != "summary"}
        return {**described, "dropped_sets": sorted(self.source.dropped_sets), "max_bytes": self.max_bytes}

    def documents(self, skip: int = 0) -> Iterator[Document | TokenDocument]:
        self._check_compression()
        opened: dict[str, dict[str, _Stream]] = {}
        position = written = 0
        held_out = False
        for part in self.source.parts:
            if part.dataset not in opened:
                opened[part.dataset] = self._open(part.dataset)
            stream = self._choose_split(opened[part.dataset], part)
            if stream is None:
                continue
            held_out |= part.validation
            if part.validation:
                self._check_no_fraction()
            split_of = self._splitter(stream, part, held_out)
            most = VALIDATION_DOCUMENTS if part.validation else sys.maxsize
            first = self._fast_forward(stream, min(skip - position, most))
            position += first
            for index, value in islice(enumerate(self._values(stream), first), most - first):
                split = split_of(index)
                if split == "train" and self.max_bytes is not None and isinstance(value, str):
                    if written >= self.max_bytes and position >= 2:
                        return
                    written += len(value.encode())
                if position >= skip:
                    if isinstance(value, str) and value:
                        yield Document(value, split, self.name)
                    else:  # a row without text keeps its place, because a resumed preparation counts rows
                        yield TokenDocument(value or [], split, self.name)
                position += 1
        if position < 2:
            raise UserError(f"{self.name} holds {position} documents; at least 2 are needed; choose a larger data set")

    def _check_no_fraction(self) -> None:
        """Raises UserError when a share of validation documents was asked for, which this data set does not leave open."""
        if self._asked_fraction:
            raise UserError(
                f"{self.name} has a validation split of its own; leave out --validation-share (data.validation_share in a "
                "recipe)"
            )

    def _check_compression(self) -> None:
        from fsspec.compression import available_compressions

        if self.source.compression not in available_compressions():
            raise UserError(
                f"{self.name} is compressed with zstandard, and the package for it is missing; run pip install zstandard"
            )

    def _open(self, dataset: str) -> dict[str, _Stream]:
        """The splits of a data set, ready to stream, by the Hub's name for them."""
        from huggingface_hub import HfApi

        source = self.source
        try:
            # Asked before `datasets` is: this answers or fails in a known time, and with the commit pinned `datasets`
            # does not ask the data-set viewer, another server that it waits 100 seconds for.
            api = HfApi()
            info = first_answer(lambda: api.dataset_info(dataset, revision=source.revision, timeout=HUB_SECONDS - 2))
            if info.gated:
                first_answer(lambda: api.auth_check(dataset, repo_type="dataset"))
            from datasets import load_dataset_builder

            data_files = dict(source.data_files) or None
            builder = load_dataset_builder(dataset, name=source.config, revision=info.sha, data_files=data_files)
            files = builder.config.data_files or {}
            return {
                str(name): _Stream(dataset, stream, [str(file) for file in files.get(str(name), [])])
                for name, stream in builder.as_streaming_dataset().items()
            }
        except Exception as error:
            raise self._failure(error, dataset) from error

    def _choose_split(self, streams: dict[str, _Stream], part: HubPart) -> _Stream | None:
        if part.split in streams:
            return streams[part.split]
        if part.optional:
            return None
        uses = sum(part.dataset == other.dataset for other in self.source.parts if not other.optional)
        if uses == len(streams) == 1:
            return next(iter(streams.values()))
        raise UserError(
            f"{part.dataset} has no split {part.split!r} (found: {', '.join(streams)}); choose another data set"
        )

    def _splitter(self, stream: _Stream, part: HubPart, held_out: bool) -> Callable[[int], Split]:
        """The split of the document with a given index in its part."""
        source = self.source
        if part.validation:
            return lambda index: "validation"
        if held_out:
            return lambda index: "train"
        if not source.nanogpt_split:
            return lambda index: hash_split(index, f"{part.dataset}:{index}", source.validation_fraction)
        documents = sum(self._rows_by_file(stream))
        if documents != source.documents:
            logger.warning("%s has %s documents now: the held-out ones are not nanoGPT's", self.name, documents)
        validation = nanogpt_validation(documents)
        return lambda index: "validation" if index in validation else "train"

    def _fast_forward(self, stream: _Stream, count: int) -> int:
        """Make the stream start up to `count` documents later without reading them; how many were passed over."""
        one_row_each = not (self.source.dropped_sets or self.source.articles or self.max_bytes)
        parquet = bool(stream.files) and all(file.endswith(".parquet") for file in stream.files)
        if count <= 0 or not one_row_each or not parquet:
            return 0
        passed = 0
        files = list(stream.files)
        for rows in self._rows_by_file(stream):
            if passed + rows > count:
                break
            passed += rows
            del files[0]
        if not files:
            stream.rows = iter(())
            return passed
        from datasets import load_dataset

        rest = load_dataset("parquet", data_files={"rest": files}, split="rest", streaming=True)
        stream.rows = rest.skip(count - passed)
        return count

    def _rows_by_file(self, stream: _Stream) -> list[int]:
        """The number of rows of each parquet file, from its footer (a few kilobytes of it are read)."""
        if not stream.counts:
            try:
                with ThreadPoolExecutor(8) as pool:
                    stream.counts = list(pool.map(_parquet_rows, stream.files))
            except Exception as error:
                raise self._failure(error, stream.dataset) from error
        return stream.counts

    def _values(self, stream: _Stream) -> Iterator[str | list[int]]:
        """The documents of a stream: a text, or the token ids of a row."""
        rows, dropped = self._rows(stream), self.source.dropped_sets
        if dropped:
            rows = (row for row in rows if (row.get("meta") or {}).get("pile_set_name") not in dropped)
        values = (self._value(row, stream.dataset) for row in rows)
        return _articles(values) if self.source.articles else values

    def _value(self, row: dict[str, Any], dataset: str) -> Any:
        kind = list if self.source.tokenised else str
        value = row.get(self.source.field)
        if value is None and self.source.field in row:
            return kind()
        if not isinstance(value, kind):
            raise UserError(
                f"{dataset}: no {'token ids' if self.source.tokenised else 'text'} in the column {self.source.field!r} "
                f"(found: {', '.join(row)}); name the right one with --field"
            )
        return value

    def _rows(self, stream: _Stream) -> Iterator[dict[str, Any]]:
        try:
            yield from stream.rows
        except Exception as error:
            raise self._failure(error, stream.dataset, started=True) from error

    def _failure(self, error: Exception, dataset: str, *, started: bool = False) -> UserError:
        from huggingface_hub.errors import HfHubHTTPError

        advice = f"run `ln-prepare {self.name}` on another machine and copy its output here, or prepare a local file"
        if started:
            advice = "start the same command again: it goes on where it stopped"
        if isinstance(error, UserError):
            return error
        if isinstance(error, HfHubHTTPError) or is_unreachable(error):
            return hub_error(error, "data set", dataset, advice)
        message = " ".join(str(error).split())[:300]
        hint = "name one as hub:OWNER/NAME:CONFIG, or " if "onfig" in message else ""
        return UserError(f"cannot read the data set {dataset}: {message}; {hint}see huggingface.co/datasets/{dataset}")


@dataclass
class _Stream:
    """A split that is ready to stream and the files it is read from."""

    dataset: str
    rows: Iterable[dict[str, Any]]
    files: list[str]
    counts: list[int] = field(default_factory=list)


def _parquet_rows(url: str) -> int:
    import fsspec
    from pyarrow import parquet

    with fsspec.open(url, "rb", cache_type="none") as file:
        return int(parquet.read_metadata(file).num_rows)


def _articles(lines: Iterable[str | list[int]]) -> Iterator[str]:
    """Join WikiText's lines into articles: one starts at a title between single equal signs."""
    article: list[str] = []
    for line in lines:
        assert isinstance(line, str)
        if WIKITEXT_TITLE.fullmatch(line) and any(earlier.strip() for earlier in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(line.strip() for line in article):
        yield "".join(article)
