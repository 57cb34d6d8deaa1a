"""Documents by themselves (`data.windows = "document"`): packed into rows for training, one after the other for evaluation.

A row begins with a document's start and holds whole documents; those of a row do not see one another (models/attention.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ln_removal.data.sampler import Sampler, Window, evenly
from ln_removal.data.tokens import Tokens, TokenSplit
from ln_removal.errors import UserError


@dataclass(frozen=True)
class _Packed:
    """The rows of one epoch in training order, each made of several pieces: documents, or beginnings of long ones.

    Attributes:
        rows: (windows, 2) first piece of each row, and the one behind its last.
        shard, start, tokens: (pieces,) where a piece is read, and how much.
        bos: (pieces,) whether the end-of-text token stands in front of it.
    """

    rows: Tokens
    shard: Tokens
    start: Tokens
    tokens: Tokens
    bos: npt.NDArray[np.bool_]


class DocumentSampler(Sampler):
    """Rows of whole documents, each with its end-of-text token, that fit into T + 1 tokens; what is left over is padding.

    A document of more than T + 1 tokens is cut there, and its rest is not read. Which lengths share a row is the same in every
    epoch, so that sequence k of the run needs no replay; which documents have these places is drawn anew.
    `bos_rows` is the share of the documents that begin with the end-of-text token, wherever they stand in a row.
    """

    def _plan(self) -> None:
        longest = self._context + 1
        shards, starts, lengths = [], [], []
        for shard, repeats in enumerate(self._repeats):
            usable = np.flatnonzero(self._split.document_lengths[shard] > 1)  # a single token has no target
            for _ in range(repeats):
                starts.append(self._split.document_starts[shard][usable])
                lengths.append(np.minimum(self._split.document_lengths[shard][usable], longest))
                shards.append(np.full(len(usable), shard))
        if not sum(map(len, lengths)):
            raise UserError(
                f"the corpus is too small: its {self._split.tokens} training tokens have no document of two tokens or more; "
                "add text"
            )
        length = np.concatenate(lengths)
        order = np.argsort(length, kind="stable")
        self._shard, self._start = np.concatenate(shards)[order], np.concatenate(starts)[order]
        self._length = length[order]
        # Of the documents of one length always as many have the token in front, so the lengths of the pieces stay the same.
        counts = np.bincount(self._length, minlength=longest + 1)
        with_bos = np.diff(np.floor(np.cumsum(counts) * self._bos_rows).astype(np.int64), prepend=0)
        rank = np.arange(len(self._length)) - (np.cumsum(counts) - counts)[self._length]
        self._bos = rank < with_bos[self._length]
        self._size = np.minimum(self._length + self._bos, longest)
        packed = pack(np.bincount(self._size, minlength=longest + 1).tolist(), longest)
        self._row_sizes = np.concatenate([np.full(rows, len(sizes)) for rows, sizes in packed])
        self._places = np.argsort(np.concatenate([np.tile(sizes, rows) for rows, sizes in packed]), kind="stable")
        self.windows_per_epoch = len(self._row_sizes)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> _Packed:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        # Documents of one length trade places: drawn[n] stands where document n would, with the token in front or without.
        drawn = np.lexsort((generator.random(len(self._length)), self._length))
        by_size = np.argsort(self._size, kind="stable")
        role = np.empty(len(drawn), np.int64)
        role[self._places] = by_size
        piece = drawn[role]
        last = np.cumsum(self._row_sizes)
        rows = np.stack([last - self._row_sizes, last], axis=1)[generator.permutation(len(last))]
        bos = self._bos[role]
        return _Packed(rows, self._shard[piece], self._start[piece], self._size[role] - bos, bos)

    def _pieces(self, number: int) -> tuple[_Packed, range]:
        epoch, entry = divmod(number, self.windows_per_epoch)
        packed = self._epoch(epoch)
        return packed, range(*packed.rows[entry].tolist())

    def _row(self, number: int) -> Tokens:
        packed, pieces = self._pieces(number)
        row = np.full(self._context + 1, self._split.eot_token_id, dtype=np.int64)
        at = 0
        for piece in pieces:
            if packed.bos[piece]:
                row[at] = self._first_token
                at += 1
            count = int(packed.tokens[piece])
            row[at : at + count] = self._split.read(int(packed.shard[piece]), int(packed.start[piece]), count)
            at += count
        return row

    def _layout(self, number: int) -> Tokens:
        packed, pieces = self._pieces(number)
        sizes = packed.tokens[pieces.start : pieces.stop] + packed.bos[pieces.start : pieces.stop]
        ends = np.cumsum(sizes)
        return np.concatenate([np.repeat(ends - sizes, sizes), np.arange(ends[-1], self._context + 1) + 1])


def pack(counts: Sequence[int], length: int) -> list[tuple[int, tuple[int, ...]]]:
    """Pack pieces into rows of `length` tokens: the longest pieces first, each into the row where it leaves the least room.

    It works on the numbers of pieces and not on the pieces, so millions of them take no longer (Krell et al. 2021, arXiv
    2107.02027, section 3).

    Args:
        counts: how many pieces have 0, 1, ..., `length` tokens.

    Returns:
        (n, sizes): n rows that hold pieces of these sizes. All of them together hold all pieces.
    """
    rows_with: dict[int, list[tuple[int, tuple[int, ...]]]] = {length: []}
    rooms = [length]  # the keys, in order
    for size in range(length, 0, -1):
        left = counts[size]
        while left:
            room = rooms[bisect_left(rooms, size)]
            rows, sizes = rows_with[room].pop() if rows_with[room] else (left, ())  # new ones where none has room
            pieces = min(room // size, left)
            used = min(rows, left // pieces)
            if room < length and rows > used:
                rows_with[room].append((rows - used, sizes))
            if room < length and not rows_with[room]:
                del rows_with[room]
                rooms.remove(room)
            after = room - pieces * size
            if after not in rows_with:
                rows_with[after] = []
                insort(rooms, after)
            rows_with[after].append((used, sizes + (size,) * pieces))
            left -= used * pieces
    return [group for groups in rows_with.values() for group in groups]


def plan_documents(split: TokenSplit, context: int, max_tokens: int | None = None) -> list[Window]:
    """The documents to score: each from its start, up to `context` inputs, once.

    With `max_tokens` below what is there: as many documents, evenly spread, as have about so many tokens, at least one.
    """
    windows = [
        Window(shard, start, min(context, length - 1))
        for shard, (starts, lengths) in enumerate(zip(split.document_starts, split.document_lengths, strict=True))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        if length > 1
    ]
    tokens = sum(window.count for window in windows)
    if max_tokens is None or max_tokens >= tokens:
        return windows
    return evenly(windows, max(1, len(windows) * max_tokens // tokens))
