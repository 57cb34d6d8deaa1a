"""What each step trains on: every window once an epoch, the same whatever the ranks, micro-batches and history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ln_removal.data.sampler import WindowSampler
from ln_removal.data.stress_text import Mixture
from ln_removal.data.tokens import Shard, TokenIndex, TokenSplit
from ln_removal.errors import UserError

PLACE = 1000
"""Token p of shard s is s * PLACE + p, so a window tells where it comes from."""


def split_of(*sizes: int, sources: str = "") -> TokenSplit:
    """A split in memory with one shard of each size; `sources` has a letter a shard (default: all "a")."""
    index = TokenIndex({}, {}, 100, 0, "uint32")
    for number, size in enumerate(sizes):
        source = sources[number] if sources else "a"
        index.shards.append(Shard(f"train-{number}.bin", "train", source, tokens=size))
    split = TokenSplit(Path(), index, "train")
    split.maps = [np.arange(shard.tokens) + PLACE * number for number, shard in enumerate(split.shards)]
    return split


def windows_in(size: int, context: int) -> int:
    """Windows of a shard that fit at every offset."""
    return max(0, (size - 1) // context - 1)


contexts = st.integers(1, 9)
sizes = st.lists(st.integers(0, 60), min_size=1, max_size=4)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None)


@quick
@given(sizes, contexts, seeds, st.integers(0, 3))
def test_an_epoch_has_every_window_once_and_none_crosses_a_shard(
    sizes: list[int], context: int, seed: int, epoch: int
) -> None:
    split = split_of(*sizes)
    expected = [windows_in(shard.tokens, context) for shard in split.shards]
    assume(sum(expected))
    sampler = WindowSampler(split, context=context, sequences_per_step=sum(expected), seed=seed)
    assert sampler.windows_per_epoch == sum(expected)
    rows = sampler.sequences(epoch, 0, sum(expected))
    assert rows.dtype == np.int64 and rows.shape == (sum(expected), context + 1)
    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows[:, 0] // PLACE == rows[:, -1] // PLACE).all()
    for shard, count in enumerate(expected):
        starts = np.sort(rows[rows[:, 0] // PLACE == shard, 0]) - shard * PLACE
        assert len(starts) == count
        if count:
            assert 0 <= starts[0] < context, "a random offset"
            assert (np.diff(starts) == context).all(), "windows lie side by side"
            assert starts[-1] + context < split.shards[shard].tokens


@quick
@given(sizes, contexts, seeds, st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_is_a_function_of_seed_and_step(sizes: list[int], context: int, seed: int, steps: list[int]) -> None:
    assume(sum(windows_in(size, context) for size in sizes))

    def sampler() -> WindowSampler:
        return WindowSampler(split_of(*sizes), context=context, sequences_per_step=3, seed=seed)

    used = sampler()
    for step in steps:
        assert np.array_equal(used.sequences(step, 0, 3), sampler().sequences(step, 0, 3))


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 20))
def test_ranks_and_micro_batches_partition_the_global_batch(
    ranks: int, share: int, micro_batch: int, step: int
) -> None:
    sampler = WindowSampler(split_of(50, 31), context=4, sequences_per_step=ranks * share, seed=1)
    batches = [
        [batch.tokens for batch in sampler.micro_batches(step, rank=rank, ranks=ranks, micro_batch=micro_batch)]
        for rank in range(ranks)
    ]
    for of_rank in batches:
        assert sum(map(len, of_rank)) == share
        assert all(len(batch) == micro_batch for batch in of_rank[:-1]) and len(of_rank[-1]) <= micro_batch
    together = np.concatenate([batch for of_rank in batches for batch in of_rank])
    assert np.array_equal(together, sampler.sequences(step, 0, ranks * share))


def test_steps_go_through_the_epoch_and_on_into_the_next() -> None:
    split = split_of(90)
    whole = WindowSampler(split, context=4, sequences_per_step=21, seed=0)
    assert whole.windows_per_epoch == 21
    in_order = np.concatenate([whole.sequences(epoch, 0, 21) for epoch in range(3)])
    small = WindowSampler(split, context=4, sequences_per_step=5, seed=0)
    by_step = np.concatenate([small.sequences(step, 0, 5) for step in range(12)])
    assert np.array_equal(by_step, in_order[:60])


def test_seeds_and_epochs_shuffle_differently() -> None:
    split = split_of(400)
    one = WindowSampler(split, context=4, sequences_per_step=98, seed=0)
    other = WindowSampler(split, context=4, sequences_per_step=98, seed=1)
    first, second, of_other = one.sequences(0, 0, 98), one.sequences(1, 0, 98), other.sequences(0, 0, 98)
    assert not np.array_equal(first, second) and not np.array_equal(first, of_other)
    assert (np.diff(first[:, 0]) != 4).any(), "shuffled"
    offsets = {int(one.sequences(epoch, 0, 98)[:, 0].min()) for epoch in range(30)}
    assert offsets == {0, 1, 2, 3}, "over the epochs every token can be the first of a window"


@quick
@given(st.integers(0, 3), st.integers(0, 3), seeds)
def test_weights_repeat_a_source(often: int, seldom: int, seed: int) -> None:
    assume(often + seldom)
    split = split_of(41, 33, 25, sources="aba")
    count = {"a": often * (9 + 5), "b": seldom * 7}
    sampler = WindowSampler(
        split, context=4, sequences_per_step=sum(count.values()), seed=seed, weights={"a": often, "b": seldom}
    )
    assert sampler.windows_per_epoch == sum(count.values())
    rows = sampler.sequences(0, 0, sum(count.values()))
    shards = rows[:, 0] // PLACE
    assert [int((shards == shard).sum()) for shard in range(3)] == [9 * often, 7 * seldom, 5 * often]


def test_a_source_without_weight_counts_once() -> None:
    split = split_of(41, 33, sources="ab")
    assert WindowSampler(split, context=4, sequences_per_step=1, seed=0, weights={"b": 3}).windows_per_epoch == 9 + 21


def test_an_unknown_source_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"stdlb, c; this corpus has a, b|source c, stdlb, this corpus has a, b"
    ) as caught:
        WindowSampler(
            split_of(50, 50, sources="ab"),
            context=4,
            sequences_per_step=1,
            seed=0,
            weights={"stdlb": 2, "a": 1, "c": 1},
        )
    assert "data.weights" in str(caught.value)


@pytest.mark.parametrize("sizes", [[], [0], [8], [3, 8, 2]])
def test_a_corpus_that_is_too_small_is_an_error(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="too small"):
        WindowSampler(split_of(*sizes), context=4, sequences_per_step=1, seed=0)


def test_leaving_out_every_source_is_an_error() -> None:
    with pytest.raises(UserError, match="too small"):
        WindowSampler(split_of(50), context=4, sequences_per_step=1, seed=0, weights={"a": 0})


def test_other_sequences_can_be_mixed_in() -> None:
    split, context = split_of(500, 300), 7
    odd = np.full((3, context + 1), 7777) + np.arange(3)[:, None]

    def sampler(mixed_in: Mixture | None = None) -> WindowSampler:
        return WindowSampler(split, context=context, sequences_per_step=10, seed=3, mixed_in=mixed_in)

    plain, mixed = sampler(), sampler(Mixture(odd, 0.25))
    steps = 40
    ours = np.stack([mixed.sequences(step, 0, 10) for step in range(steps)])
    usual = np.stack([plain.sequences(step, 0, 10) for step in range(steps)])
    replaced = ours[:, :, 0] >= 7777
    assert 0.15 < replaced.mean() < 0.35
    assert (ours[~replaced] == usual[~replaced]).all(), "the others are what they would have been"
    assert set(np.unique(ours[replaced])) == {7777, 7778, 7779}
    again = sampler(Mixture(odd, 0.25))
    halves = [again.sequences(11, first, 5) for first in (5, 0)][::-1]
    assert (np.concatenate(halves) == ours[11]).all(), "ranks and resuming change nothing"


def test_a_share_of_rows_begins_with_the_end_of_text_token() -> None:
    context, eot = 7, 0
    split = split_of(500, 300)
    for data in split.maps:
        data[20::40] = eot  # documents end at 20, 60, 100, ...
    plain = WindowSampler(split, context=context, sequences_per_step=10, seed=3)
    sampler = WindowSampler(split, context=context, sequences_per_step=10, seed=3, bos_rows=0.5)
    ours = np.concatenate([sampler.sequences(step, 0, 10) for step in range(60)])
    usual = np.concatenate([plain.sequences(step, 0, 10) for step in range(60)])
    changed = (ours != usual).any(axis=1)
    assert 0.4 < changed.mean() < 0.6
    begun, before = ours[changed], usual[changed]
    assert (begun[:, 0] == eot).all()
    as_it_was = (begun[:, 1:] == before[:, :-1]).all(axis=1)
    assert 0.3 < as_it_was.mean() < 0.7, "in front of any window"
    starts = {
        int(place) for number in range(2) for place in (PLACE * number, 1, *(PLACE * number + np.arange(21, 500, 40)))
    }
    assert {int(row[1]) for row in begun[~as_it_was]} <= starts, "in front of a document"
    again = WindowSampler(split, context=context, sequences_per_step=10, seed=3, bos_rows=0.5)
    assert (again.sequences(41, 4, 3) == ours[414:417]).all(), "a function of seed and number"


def test_a_share_of_rows_repeats_itself() -> None:
    context = 32
    split = split_of(4000)
    split.vocab_size, split.eot_token_id = 10_000, 4242
    sampler = WindowSampler(split, context=context, sequences_per_step=10, seed=3, copies=0.3)
    rows = np.concatenate([sampler.sequences(step, 0, 10) for step in range(60)])
    begun = rows[:, 0] == split.eot_token_id
    texts = [row[1:] if begins else row for row, begins in zip(rows, begun, strict=True)]
    periods = np.array([next((p for p in range(1, 25) if (row[p:] == row[:-p]).all()), 0) for row in texts])
    copied = periods > 0
    assert 0.22 < copied.mean() < 0.38 and not begun[~copied].any()
    assert periods[copied].min() >= 2 and periods[copied].max() <= context // 2
    assert 0.3 < begun[copied].mean() < 0.7
    from_text = np.array([(np.diff(row[:period]) == 1).all() for row, period in zip(texts, periods, strict=True)])
    assert 0.3 < from_text[copied].mean() < 0.7
    random = np.concatenate([row for row, is_text in zip(texts, from_text, strict=True) if not is_text])
    assert random.min() < 1000 and random.max() > 9000 and not (random == split.eot_token_id).any()
    usual = WindowSampler(split, context=context, sequences_per_step=10, seed=3)
    assert (rows[~copied] == np.concatenate([usual.sequences(step, 0, 10) for step in range(60)])[~copied]).all()
