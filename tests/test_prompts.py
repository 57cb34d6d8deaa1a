"""Losses on prompts: equal to those of plain logits, over the same targets with and without BOS, and low where a model copies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOT
from transformers import GPT2LMHeadModel

from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, TokenSplit, write_index
from ln_removal.evaluation import results as results_file
from ln_removal.evaluation.prompts import (
    DOCUMENT_START,
    KINDS,
    RANDOM_COPY,
    TEXT_COPY,
    PromptSet,
    compare_prompts,
    prompt_losses,
    prompt_sets,
)

POSITIONS = 32


class Numbers:
    """A tokenizer of 101 tokens, the last of which is special."""

    all_special_ids = (EOT,)

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(EOT + 1)}


TOKENIZER: Any = Numbers()


def split_of(directory: Path, shards: list[list[int]], *, unfinished: bool = False) -> TokenSplit:
    """A validation split of random documents of these lengths; `unfinished`: no end-of-text token ends a shard."""
    directory.mkdir(exist_ok=True)
    index = TokenIndex({"name": "test"}, {"name": "t", "sha256": ""}, EOT + 1, EOT, "uint16")
    for number, lengths in enumerate(shards):
        random = np.random.default_rng(number)
        parts = [np.append(random.integers(0, EOT, length), EOT) for length in lengths]
        tokens = np.concatenate(parts).astype(np.uint16)[: -1 if unfinished else None]
        tokens.tofile(directory / f"validation-{number}.bin")
        index.shards.append(Shard(f"validation-{number}.bin", "validation", "t", tokens=len(tokens), documents=1))
    write_index(directory, index)
    return TokenDataset.open(directory).split("validation")


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """Forty documents of 40 to 79 tokens and five of 3, on two shards."""
    return split_of(tmp_path / "tokens", [[*range(40, 60), *[3] * 5], [*range(60, 80)]])


def rows_of(some: PromptSet) -> list[list[int]]:
    return [row[:stop].tolist() for row, stop in zip(some.tokens, some.stops, strict=True)]


def documents_of(split: TokenSplit) -> list[list[int]]:
    """The documents without their end-of-text tokens, in order."""
    found: list[list[int]] = []
    for data in split.maps:
        found.append([])
        for token in data.tolist():
            if token == EOT:
                found.append([])
            else:
                found[-1].append(token)
    return [document for document in found if document]


@torch.no_grad()
def plain_loss(model: GPT2LMHeadModel, row: list[int], first: int, *, bos: bool) -> float:
    """Mean loss of the tokens of one prompt from index `first` on, out of the logits of a plain forward pass."""
    ids = torch.tensor([EOT] * bos + row)
    log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
    losses = [-log_probs[place - 1, ids[place]] for place in range(first + bos, len(ids))]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    "shards", [[[*range(40, 60)], [*range(60, 80)]], [[9, 16, 20, 60, 5], [17, 25]]], ids=["long", "short"]
)
def test_losses_are_those_of_plain_logits_over_the_same_tokens(
    tiny_gpt2: GPT2LMHeadModel, tmp_path: Path, shards: list[list[int]]
) -> None:
    sets = prompt_sets(TOKENIZER, split_of(tmp_path, shards, unfinished=True), positions=POSITIONS)
    assert tuple(sets) == KINDS
    found = prompt_losses(tiny_gpt2, sets, eot_token_id=EOT)
    assert list(found) == [(kind, bos) for kind in KINDS for bos in (False, True)]
    for (kind, bos), losses in found.items():
        firsts = sets[kind].firsts.tolist()
        rows = rows_of(sets[kind])
        expected = [plain_loss(tiny_gpt2, row, first, bos=bos) for row, first in zip(rows, firsts, strict=True)]
        assert losses == pytest.approx(expected, abs=1e-5), (kind, bos)
        assert sets[kind].counts.tolist() == [len(row) - first for row, first in zip(rows, firsts, strict=True)]
    assert not np.allclose(found[DOCUMENT_START, False], found[DOCUMENT_START, True], atol=1e-3)


def test_document_starts_are_the_beginnings_of_long_documents(split: TokenSplit) -> None:
    rows = rows_of(prompt_sets(TOKENIZER, split, positions=POSITIONS)[DOCUMENT_START])
    assert rows == [document[:POSITIONS] for document in documents_of(split) if len(document) >= POSITIONS]
    few = rows_of(prompt_sets(TOKENIZER, split, positions=POSITIONS, max_tokens=5 * POSITIONS)[DOCUMENT_START])
    assert few == rows[::8], "spread evenly over the documents"


def test_short_documents_are_used_whole_where_few_are_long(tmp_path: Path) -> None:
    split = split_of(tmp_path, [[9, 16, 200, 15], [17, 100]])
    rows = rows_of(prompt_sets(TOKENIZER, split, positions=500)[DOCUMENT_START])
    assert rows == [document[:128] for document in documents_of(split) if len(document) >= 16]
    assert {len(row) for row in rows} == {16, 17, 100, 128} and EOT not in {token for row in rows for token in row}


def test_copies_are_two_equal_halves_and_only_the_second_is_scored(split: TokenSplit, tmp_path: Path) -> None:
    for made, positions in ((split, POSITIONS), (split_of(tmp_path / "short", [[16, 30], [20]]), 1024)):
        sets = prompt_sets(TOKENIZER, made, positions=positions)
        texts = documents_of(made)
        for kind in (RANDOM_COPY, TEXT_COPY):
            rows = rows_of(sets[kind])
            assert len({tuple(row) for row in rows}) == len(rows), "each once"
            for row, first in zip(rows, sets[kind].firsts.tolist(), strict=True):
                half = len(row) // 2
                assert row[:half] == row[half:] and first == half + 1 and len(row) <= min(128, positions)
                assert EOT not in row
                if kind == TEXT_COPY:
                    inside = [text[1:] for text in texts if len(text) > half]
                    assert any(row[:half] == text[at : at + half] for text in inside for at in range(len(text)))
    assert len(rows_of(prompt_sets(TOKENIZER, split, positions=POSITIONS)[RANDOM_COPY])) == 128


def test_the_same_seed_gives_the_same_prompts(split: TokenSplit) -> None:
    first, again, other = (prompt_sets(TOKENIZER, split, positions=POSITIONS, seed=seed) for seed in (3, 3, 4))
    for kind in KINDS:
        assert np.array_equal(first[kind].tokens, again[kind].tokens)
        assert np.array_equal(first[kind].tokens, other[kind].tokens) == (kind == DOCUMENT_START)


def test_a_split_without_documents_or_a_model_without_positions_leaves_kinds_out(tmp_path: Path) -> None:
    assert set(prompt_sets(TOKENIZER, split_of(tmp_path / "a", [[3, 15, 9]]), positions=64)) == {RANDOM_COPY}
    split = split_of(tmp_path / "b", [[100]])
    assert set(prompt_sets(TOKENIZER, split, positions=2)) == {DOCUMENT_START}
    assert set(prompt_sets(TOKENIZER, split, positions=1)) == set()


class Copies(torch.nn.Module):
    """Predicts what followed the last token when it came before; all tokens alike when it never did."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(40.0))
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            followed: dict[int, int] = {}
            for place, token in enumerate(ids):
                if token in followed:
                    row[place, followed[token]] = self.sharpness
                if place:
                    followed[ids[place - 1]] = token
        return SimpleNamespace(logits=logits)


def test_a_model_that_copies_is_right_on_the_second_copy_alone() -> None:
    model = Copies(EOT + 1)
    copies = np.stack([np.tile(np.random.default_rng(row).permutation(EOT)[:16], 2) for row in range(4)])
    edges = (np.full(4, 17), np.full(4, 32))
    sets = {"second": PromptSet(copies, *edges), "first": PromptSet(copies, np.full(4, 1), np.full(4, 16))}
    found = prompt_losses(model, sets, eot_token_id=EOT)
    for bos in (False, True):
        assert found["second", bos] == pytest.approx(np.zeros(4), abs=1e-6)
        assert found["first", bos] == pytest.approx(np.full(4, math.log(EOT + 1)), abs=1e-5)


def test_models_are_compared_prompt_by_prompt(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    sets = prompt_sets(TOKENIZER, split_of(tmp_path, [[20, 40, 17, 300]]), positions=POSITIONS)
    control = prompt_losses(tiny_gpt2, sets, eot_token_id=EOT)
    worse = {key: losses + 0.25 for key, losses in control.items()}
    found = list(compare_prompts(sets, {"control": control, "ln_free": worse}))
    assert [(one.kind, one.bos) for one in found] == list(control)
    for one in found:
        counts, losses = sets[one.kind].counts, control[one.kind, one.bos]
        assert (one.sequences, one.tokens) == (len(counts), counts.sum())
        assert one.loss.original is None
        assert one.loss.control == pytest.approx(float(np.average(losses, weights=counts)))
        (difference,) = one.differences
        assert (difference.model, difference.than, difference.units) == ("ln_free", "control", len(counts))
        assert difference.mean == difference.low == difference.high == pytest.approx(0.25), (
            "pairing takes all noise away"
        )


def test_results_hold_the_losses_of_every_kind(world: Path) -> None:
    found = results_file.read(world / "run" / "results.json")
    assert [(one.kind, one.bos) for one in found.prompts] == [(kind, bos) for kind in KINDS for bos in (False, True)]
    for one in found.prompts:
        assert set(one.loss.known()) == {"original", "control", "ln_free"}
        assert len(one.differences) == (3 if one.sequences > 1 else 0)
    raw = json.loads((world / "run" / "results.json").read_text())
    del raw["prompts"]
    assert results_file.Results.model_validate_json(json.dumps(raw)).prompts == (), "as earlier versions wrote it"
