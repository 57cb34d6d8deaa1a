"""What a step of documents trains on: the beginning of every document once an epoch, packed, drawn anew without replay."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.data.documents import DocumentSampler, pack
from ln_removal.data.sampler import trained_targets
from ln_removal.data.stress_text import Mixture
from ln_removal.data.tokens import Shard, TokenIndex, TokenSplit
from ln_removal.errors import UserError

quick = settings(max_examples=40, deadline=None)


def split_of(*shards: list[int], sources: str = "") -> TokenSplit:
    """A split in memory with a shard for each list of document lengths. A document says its number, its place in it, ..., EOT.

    Token 1000 * document + place, so that a row tells what is in it. EOT is -1.
    """
    index = TokenIndex({}, {}, 10**6, -1, "uint32")
    maps, number = [], 0
    for shard, lengths in enumerate(shards):
        data = []
        for length in lengths:
            number += 1
            data += [1000 * number + place for place in range(length - 1)] + [-1]
        maps.append(np.array(data, dtype=np.int64))
        if not data:
            maps.pop()
            continue
        source = sources[shard] if sources else "a"
        index.shards.append(Shard(f"train-{shard}.bin", "train", source, tokens=len(data)))
    split = TokenSplit(Path(), index, "train")
    split.maps = maps
    return split


def sampler_of(split: TokenSplit, context: int, **options: Any) -> DocumentSampler:
    return DocumentSampler(split, **{"context": context, "sequences_per_step": 4, "seed": 0} | options)


def documents_in(row: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """The documents of a row, without its padding."""
    index = np.arange(len(row))
    length = int((starts <= index).sum())
    assert (starts[length:] == index[length:] + 1).all(), "padding stands at the end alone"
    begins = [*np.unique(starts[:length]).tolist(), length]
    assert begins[0] == 0, "a row starts with a document"
    return [row[begin:end].tolist() for begin, end in pairwise(begins)]


@quick
@given(
    st.lists(st.lists(st.integers(1, 30), max_size=25), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 3)
)
def test_an_epoch_has_the_beginning_of_every_document_once(shards: list[list[int]], context: int, epoch: int) -> None:
    split = split_of(*shards)
    expected = [
        [1000 * number + place for place in range(length - 1)] + [-1]
        for number, length in enumerate((length for lengths in shards for length in lengths), 1)
    ]
    expected = [document[: context + 1] for document in expected if len(document) > 1]
    if not expected:
        with pytest.raises(UserError, match="no document"):
            sampler_of(split, context)
        return
    sampler = sampler_of(split, context)
    count = sampler.windows_per_epoch
    sampler = sampler_of(split, context, sequences_per_step=count)
    rows, starts = sampler.sequences(epoch, 0, count), sampler.document_starts(epoch, 0, count)
    assert starts is not None and rows.shape == starts.shape == (count, context + 1)
    found = [document for row, begins in zip(rows, starts, strict=True) for document in documents_in(row, begins)]
    assert sorted(found) == sorted(expected)


def test_which_documents_share_a_row_changes_from_epoch_to_epoch_and_replay_is_not_needed() -> None:
    split = split_of([5, 6, 7, 3, 9, 4] * 20)
    sampler = sampler_of(split, 20)
    count = sampler.windows_per_epoch
    epochs = [
        [documents_in(*pair) for pair in zip(_rows(sampler, epoch, count), _starts(sampler, epoch, count), strict=True)]
        for epoch in range(2)
    ]
    together = [{frozenset(document[0] for document in row) for row in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 2
    fresh = sampler_of(split, 20)
    assert np.array_equal(_rows(fresh, 1, count), _rows(sampler, 1, count))
    assert not np.array_equal(_rows(sampler_of(split, 20, seed=1), 1, count), _rows(sampler, 1, count))


def _rows(sampler: DocumentSampler, epoch: int, count: int) -> np.ndarray:
    return sampler.sequences(0, epoch * count, count)


def _starts(sampler: DocumentSampler, epoch: int, count: int) -> np.ndarray:
    starts = sampler.document_starts(0, epoch * count, count)
    assert starts is not None
    return starts


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_pieces_are_packed_into_rows_that_hold_them(counts: list[int]) -> None:
    counts = [0, *counts]
    length = len(counts) - 1
    packed = pack(counts, length)
    placed = np.zeros(len(counts), dtype=int)
    for rows, sizes in packed:
        assert rows > 0 and sum(sizes) <= length
        for size in sizes:
            placed[size] += rows
    assert placed.tolist() == counts
    tokens = sum(size * count for size, count in enumerate(counts))
    if tokens:  # at most one row can be half empty: what is in it would fit into another
        assert sum(rows for rows, _ in packed) <= max(1, 2 * tokens / length + 1)


def test_short_documents_leave_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=3000).tolist()
    sampler = sampler_of(split_of(lengths), 256)
    assert sum(lengths) / (sampler.windows_per_epoch * 257) > 0.99


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_documents_begins_with_the_end_of_text_token(share: float) -> None:
    lengths = [3, 5, 8, 30, 12, 21] * 40
    sampler = sampler_of(split_of(lengths), 20, bos_rows=share)
    count, seen = sampler.windows_per_epoch, []
    for epoch in range(6):
        rows, starts = _rows(sampler, epoch, count), _starts(sampler, epoch, count)
        documents = [document for pair in zip(rows, starts, strict=True) for document in documents_in(*pair)]
        assert len(documents) == len(lengths)
        with_bos = [document for document in documents if document[0] == -1]
        assert len(with_bos) == share * len(lengths)
        assert all(document[1] % 1000 == 0 for document in with_bos), "behind it stands a document's first token"
        assert all(len(document) <= 21 for document in documents)
        seen.append({document[1] for document in with_bos})
    assert share == 1 or seen[0] != seen[1], "drawn anew in every epoch"


def test_weights_repeat_the_documents_of_a_source_and_stress_text_is_one_document() -> None:
    split = split_of([5, 6, 7], [8, 4], sources="ab")
    sampler = sampler_of(split, 10, weights={"a": 2})
    count = sampler.windows_per_epoch
    pairs = zip(_rows(sampler, 0, count), _starts(sampler, 0, count), strict=True)
    documents = sorted(document[0] // 1000 for pair in pairs for document in documents_in(*pair))
    assert documents == [1, 1, 2, 2, 3, 3, 4, 5]
    with pytest.raises(UserError, match=r"data\.weights"):
        sampler_of(split, 10, weights={"c": 1})
    odd = np.full((1, 11), 7)
    mixed = sampler_of(split, 10, mixed_in=Mixture(odd, 0.5))
    rows, starts = mixed.sequences(0, 0, 40), mixed.document_starts(0, 0, 40)
    assert starts is not None
    replaced = (rows == 7).all(1)
    assert 8 < replaced.sum() < 32 and (starts[replaced] == 0).all()
    assert np.array_equal(rows[~replaced], sampler_of(split, 10).sequences(0, 0, 40)[~replaced])


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 3), (2, 2), (4, 8)])
def test_every_trained_target_of_a_step_weighs_the_same(ranks: int, micro_batch: int) -> None:
    sampler = sampler_of(split_of([5, 6, 7, 3, 9, 4] * 9), 16, sequences_per_step=8)
    whole = sampler.document_starts(2, 0, 8)
    assert whole is not None
    for rank in range(ranks):
        batches = list(sampler.micro_batches(2, rank=rank, ranks=ranks, micro_batch=micro_batch))
        for batch in batches:
            assert batch.document_starts is not None
            # Ranks average: a target's weight in the step is weight / (targets in its batch * ranks).
            targets = trained_targets(batch.document_starts)
            assert batch.weight / (targets * ranks) == pytest.approx(1 / trained_targets(whole))


def test_the_beginnings_of_documents_need_no_padding() -> None:
    split = split_of([5, 12, 3, 9], [30, 11])
    found = split.beginnings(3, 100)
    assert found is not None and found.shape == (3, 11)
    assert sorted(found[:, 0].tolist()) == [2000, 5000, 6000]
    capped = split.beginnings(2, 8)
    assert capped is not None and capped.shape == (2, 8)
    assert split.beginnings(7, 8) is None and split_of([1, 1]).beginnings(1, 8) is None
