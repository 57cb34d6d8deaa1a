"""Choose the windows of tokens to read: at random for a training step, one after the other for evaluation.

The train split is cut into windows of the context length; every epoch shuffles them by a permutation keyed by (seed,
epoch) and shifts the cuts by a random offset. Sequence number k of the run is entry k of that endless list. So a resumed run
needs no replay, and a step sees the same sequences whatever the number of ranks or micro-batches.

Shape legend: N sequences, T positions.

Evaluation reads the windows of `plan_windows` in order. `read_ahead` lets a thread prepare the next items of an iterator.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ln_removal.data.stress_text import Mixture
from ln_removal.data.tokens import Tokens, TokenSplit
from ln_removal.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Epoch:
    """The windows of one epoch in training order: shard and start of each, of shape (windows,)."""

    shard: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]


class WindowSampler:
    """Draws the training sequences of each step.

    Args:
        split: the train split.
        context: T, the number of predicted tokens in a sequence; T + 1 are read.
        sequences_per_step: sequences in the global batch of one step.
        seed: of the shuffle.
        weights: how often the windows of a source come up in an epoch, by source name; 1 when not named, 0 leaves it out.
        mixed_in: stress text that takes the place of some sequences.
        bos_rows: share of the sequences that begin with the end-of-text token. It stands in front of a document's start in
            half of them, and in front of any window in the others.
        copies: share of the sequences that say the same again and again: text in half of them, random tokens in the others. Only
            a model that copies from its context, as induction heads do, can predict them (Olsson et al. 2022, arXiv 2209.11895).

    Raises:
        UserError: when the split has no full window, or `weights` names a source that the corpus does not have.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        context: int,
        sequences_per_step: int,
        seed: int,
        weights: dict[str, int] | None = None,
        mixed_in: Mixture | None = None,
        bos_rows: float = 0.0,
        copies: float = 0.0,
    ) -> None:
        self._split = split
        self._mixed_in = mixed_in
        self._bos_rows = bos_rows
        self._copies = copies
        self._context = context
        self._sequences_per_step = sequences_per_step
        self._seed = seed
        sources = {shard.source for shard in split.shards}
        unknown = sorted(set(weights or {}) - sources)
        if unknown:
            raise UserError(
                f"data.weights names the source {', '.join(unknown)}, this corpus has {', '.join(sorted(sources))}; correct "
                "the name, or weight all sources alike with data.weights = {}"
            )
        self._repeats = [(weights or {}).get(shard.source, 1) for shard in split.shards]
        # One window fewer than would fit, so that every offset of an epoch gives the same number of windows.
        self._counts = [
            max(0, (shard.tokens - 1) // context - 1) * repeats
            for shard, repeats in zip(split.shards, self._repeats, strict=True)
        ]
        self.windows_per_epoch = sum(self._counts)
        if self.windows_per_epoch == 0:
            raise UserError(
                f"the corpus is too small: {split.tokens} training tokens do not fill two windows of {context}; add text, or "
                "lower data.context"
            )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> _Epoch:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        shards: list[npt.NDArray[np.int32]] = []
        starts: list[npt.NDArray[np.int64]] = []
        for shard, (count, repeats) in enumerate(zip(self._counts, self._repeats, strict=True)):
            for _ in range(repeats if count else 0):
                windows = count // repeats
                offset = int(generator.integers(self._context))
                starts.append(np.arange(windows, dtype=np.int64) * self._context + offset)
                shards.append(np.full(windows, shard, dtype=np.int32))
        order = generator.permutation(self.windows_per_epoch)
        return _Epoch(np.concatenate(shards)[order], np.concatenate(starts)[order])

    def sequences(self, step: int, first: int, count: int) -> Tokens:
        """Sequences `first` to `first + count` of the global batch of `step`, shape (count, T + 1)."""
        begin = step * self._sequences_per_step + first
        rows = []
        for number in range(begin, begin + count):
            if self._mixed_in is not None and (other := self._mixed_in.draw(self._seed, number)) is not None:
                rows.append(other)
                continue
            epoch, entry = divmod(number, self.windows_per_epoch)
            windows = self._epoch(epoch)
            rows.append(self._window(number, int(windows.shard[entry]), int(windows.start[entry])))
        return np.stack(rows)

    def _window(self, number: int, shard: int, start: int) -> Tokens:
        """Sequence `number` of the run, (T + 1,): the window itself, a copied sequence, or one that begins as a prompt does."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, number], counter=[2, 0, 0, 0]))
        draw, copied = generator.random(2)
        if copied < self._copies:
            return self._copied(self._split.read(shard, start, self._context), generator)
        if draw >= self._bos_rows:
            return self._split.read(shard, start, self._context + 1)
        if draw < self._bos_rows / 2:
            starts = self._split.document_starts[shard]
            start = int(starts[np.searchsorted(starts, start, side="right") - 1])
        return np.concatenate([[self._split.eot_token_id], self._split.read(shard, start, self._context)])

    def _copied(self, text: Tokens, generator: np.random.Generator) -> Tokens:
        """(T + 1,) tokens that are said again and again: the beginning of `text`, or random ones; half with end-of-text in front."""
        period = int(generator.integers(max(1, self._context // 16), self._context // 2 + 1))
        random, begins = generator.random(2) < 0.5
        first = text[:period]
        if random:
            drawn = generator.integers(self._split.vocab_size - 1, size=period)
            first = drawn + (drawn >= self._split.eot_token_id)  # every token but that one
        row: Tokens = np.resize(first, self._context + 1)
        return np.concatenate([[self._split.eot_token_id], row[:-1]]) if begins else row

    def micro_batches(self, step: int, *, rank: int = 0, ranks: int = 1, micro_batch: int) -> Iterator[Tokens]:
        """The batches of one rank at one step, each of shape (n <= micro_batch, T + 1)."""
        assert self._sequences_per_step % ranks == 0, "checked with the recipe"
        share = self._sequences_per_step // ranks
        for first in range(0, share, micro_batch):
            yield self.sequences(step, rank * share + first, min(micro_batch, share - first))


def read_ahead(items: Iterable[Item], depth: int = 4) -> Generator[Item, None, None]:
    """Yield `items`, read by a thread that stays at most `depth` ahead.

    An exception of the iterator is raised here, at its place in the order. Closing this generator stops the thread.
    """
    ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Item | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001 (handed over, raised by the consumer)
            put("error", error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]  # "item" always carries an Item
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Window:
    """`count` inputs from `start` of a shard; their targets stand one token further. The first `skip` are not scored."""

    shard: int
    start: int
    count: int
    skip: int = 0

    @property
    def scored(self) -> int:
        """Targets that count."""
        return self.count - self.skip


def plan_windows(
    shards: list[int], context: int, max_tokens: int | None = None, stride: int | None = None
) -> list[Window]:
    """The windows to score, given the number of tokens in each shard.

    With a `stride` below the context, windows begin every `stride` tokens and overlap: each scores what the one before
    did not, at least context - stride tokens of text before it. With `max_tokens` below what is there:
    max(1, max_tokens // stride) whole windows, evenly spread (the shorter windows at the ends of shards only where no
    whole one exists).
    """
    step = stride or context
    windows: list[Window] = []
    for shard, tokens in enumerate(shards):
        reached = 0  # inputs of this shard whose targets are scored already
        start = 0
        while reached < tokens - 1:
            count = min(context, tokens - 1 - start)
            windows.append(Window(shard, start, count, reached - start))
            reached = start + count
            start += step
    if max_tokens is None or max_tokens >= sum(window.scored for window in windows):
        return windows
    # The first window of a shard scores its whole context: with overlap, leave it out or positions would be mixed.
    whole = [window for window in windows if window.count == context and window.scored == step]
    windows = whole or windows
    wanted = min(len(windows), max(1, max_tokens // step))
    return [windows[(2 * i + 1) * len(windows) // (2 * wanted)] for i in range(wanted)]
