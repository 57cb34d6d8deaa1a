"""What is kept of every token against whole logits in float64: losses, entropy, calibration, positions, overlap, documents."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2LMHeadModel

from ln_removal.data.sampler import Window, plan_windows
from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, write_index
from ln_removal.errors import UserError
from ln_removal.evaluation import loss as loss_module
from ln_removal.evaluation.bootstrap import units_of
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.evaluation.statistics import by_position, expected_calibration_error, position_edges, token_statistics

CONTEXT = 16
EOT = 100


def make_data(directory: Path, lengths: list[int], *, document: int = 7) -> TokenDataset:
    """Random tokens with an end-of-text token every `document` tokens."""
    directory.mkdir(exist_ok=True)
    index = TokenIndex({"name": "test"}, {"name": "t", "sha256": ""}, 101, EOT, "uint16")
    for number, length in enumerate(lengths):
        tokens = np.random.default_rng(number).integers(0, EOT, length).astype(np.uint16)
        tokens[document - 1 :: document] = EOT
        tokens.tofile(directory / f"validation-{number}.bin")
        index.shards.append(Shard(f"validation-{number}.bin", "validation", "t", tokens=length, documents=1, bytes=300))
    write_index(directory, index)
    return TokenDataset.open(directory)


def test_every_figure_equals_a_plain_computation(
    tiny_gpt2: GPT2LMHeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", 1)
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 5 * 101)  # chunks of five positions
    split = make_data(tmp_path, [50, 33]).split("validation")
    found = token_statistics(tiny_gpt2, split, context=CONTEXT)
    model = copy.deepcopy(tiny_gpt2).double()
    at = 0
    for shard in range(2):
        tokens = torch.from_numpy(split.read(shard, 0, split.shards[shard].tokens))
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            with torch.no_grad():
                probabilities = model(window[None, :-1]).logits[0].softmax(-1)
            for t, p in enumerate(probabilities):
                assert found.loss[at] == pytest.approx(-math.log(p[window[t + 1]]), abs=1e-4)
                assert found.entropy[at] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)
                assert found.confidence[at] == pytest.approx(float(p.max()), abs=1e-5)
                assert found.right[at] == bool(p.argmax() == window[t + 1])
                at += 1
    assert at == len(found.loss)
    plain = cross_entropy(tiny_gpt2, split, context=CONTEXT)
    summary = found.summary(split)
    assert summary.cross_entropy == pytest.approx(plain.cross_entropy, abs=1e-6)
    assert (summary.tokens, summary.windows, summary.bits_per_byte) == (
        plain.tokens,
        plain.windows,
        pytest.approx(plain.bits_per_byte, abs=1e-6),
    )


def test_calibration_error() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.31, 0.31, 1.0, 0.0])
    right = np.array([True, True, False, True, False, True, True, False])
    # Bins: 14 (0.95 four times and 1.0), 4 (0.31 twice), 0 (0.0).
    expected = (abs(4 * 0.95 + 1.0 - 4) + abs(2 * 0.31 - 1) + 0) / 8
    assert expected_calibration_error(confidence, right) == pytest.approx(expected)
    random = np.random.default_rng(0)
    p = random.random(200_000)
    assert expected_calibration_error(p, random.random(200_000) < p) < 0.01
    assert expected_calibration_error(p, np.ones(200_000, dtype=bool)) == pytest.approx(0.5, abs=0.01)


def test_entropy_of_a_certain_prediction_is_zero_and_finite() -> None:
    from ln_removal.evaluation.statistics import _four_numbers

    logits = torch.tensor([[1e4, -1e4, -torch.inf]])
    loss, entropy, confidence, right = _four_numbers(logits, torch.tensor([0]))[:, 0].tolist()
    assert (loss, entropy, confidence, right) == (0.0, 0.0, 1.0, 1.0)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_overlapping_windows_score_every_target_once(shards: list[int], context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = plan_windows(shards, context, stride=stride)
    targets = [(w.shard, w.start + 1 + i) for w in windows for i in range(w.skip, w.count)]
    assert targets == [(shard, t) for shard, tokens in enumerate(shards) for t in range(1, tokens)]
    for window in windows:
        assert 1 <= window.scored <= window.count <= context
        assert window.start == 0 or window.skip >= context - stride, "less text before a target than promised"
    few = plan_windows(shards, context, 3 * stride, stride)
    assert len(few) <= max(3, len(windows) if sum(w.scored for w in windows) <= 3 * stride else 3)


def test_stride_gives_each_token_more_context(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    split = make_data(tmp_path, [40]).split("validation")
    found = token_statistics(tiny_gpt2, split, context=CONTEXT, stride=4)
    model = copy.deepcopy(tiny_gpt2).double()
    tokens = torch.from_numpy(split.read(0, 0, 40))
    expected = []
    for target in range(1, 40):
        start = 0 if target <= CONTEXT else 4 * math.ceil((target - CONTEXT) / 4)
        with torch.no_grad():
            log_probs = model(tokens[None, start:target]).logits[0, -1].log_softmax(-1)
        expected.append(-float(log_probs[tokens[target]]))
    assert found.loss == pytest.approx(np.array(expected), abs=1e-4)
    with pytest.raises(UserError, match="stride of 17"):
        token_statistics(tiny_gpt2, split, context=CONTEXT, stride=17)


def test_loss_by_position(tiny_gpt2: nn.Module, tmp_path: Path) -> None:
    split = make_data(tmp_path, [1 + 3 * CONTEXT + 5]).split("validation")
    found = token_statistics(tiny_gpt2, split, context=CONTEXT)
    bins = by_position(found)
    assert sum(one.tokens for one in bins) == len(found.loss)
    assert bins[0].first == bins[0].last == 0 and bins[-1].last == CONTEXT - 1
    assert [b.first for b in bins[1:]] == [a.last + 1 for a in bins[:-1]], "a gap between the bins"
    first_tokens = found.loss[[0, 16, 32, 48]]
    assert bins[0].loss == pytest.approx(first_tokens.mean()) and bins[0].tokens == 4
    assert position_edges(23) == [0, 1, 2, 3, 5, 7, 10, 15, 22]


def test_a_bootstrap_draws_documents_where_there_are_enough(tmp_path: Path) -> None:
    split = make_data(tmp_path / "many", [300, 60]).split("validation")
    windows = plan_windows([300, 60], CONTEXT)
    units = units_of(windows, split, eot_token_id=EOT)
    assert units.name == "documents" and units.counts.sum() == len(units.of_token) == 299 + 59
    # Documents of seven tokens; the first token of a shard is never predicted.
    assert units.counts[:3].tolist() == [6, 7, 7] and units.of_token[:14].tolist() == [0] * 6 + [1] * 7 + [2]
    assert (np.diff(units.of_token) >= 0).all()
    few = make_data(tmp_path / "few", [300], document=150).split("validation")
    units = units_of(plan_windows([300], CONTEXT), few, eot_token_id=EOT)
    assert units.name == "windows" and units.counts.tolist() == [16] * 18 + [11]


def test_documents_keep_their_number_across_windows_apart(tmp_path: Path) -> None:
    split = make_data(tmp_path, [300]).split("validation")
    windows = [Window(0, 0, 16), Window(0, 140, 16), Window(0, 200, 16, skip=10)]
    units = units_of(windows, split, eot_token_id=EOT)
    assert units.name == "windows" or len(units.counts) >= 20
    sums = units.sums(np.ones(len(units.of_token)))
    assert sums.tolist() == units.counts.tolist() == [16, 16, 6]
