"""What a corpus is: a deterministic stream of documents, each in one split and from one named source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


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
