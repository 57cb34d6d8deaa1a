"""Scores, observations and the check before training, where windows are documents."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import done
from small_model import REMOVE
from test_token_statistics import make_data
from transformers import GPT2LMHeadModel

from ln_removal.config.recipe import load_recipe
from ln_removal.data.tokens import TokenDataset, TokenSplit
from ln_removal.errors import UserError
from ln_removal.evaluation import loss as loss_module
from ln_removal.evaluation.compare import Comparison
from ln_removal.evaluation.loss import LossByWindows, cross_entropy, loss_by_windows
from ln_removal.evaluation.statistics import residual_std, token_statistics
from ln_removal.pipelines import removal
from ln_removal.training.session import _probe

EOT, CONTEXT = 100, 16


@pytest.fixture
def data(tmp_path: Path) -> TokenDataset:
    """Documents of 1 to 30 tokens in two shards, the last of each without its end-of-text token."""
    made = make_data(tmp_path, [331, 170])
    for number, length in enumerate((331, 170)):
        random = np.random.default_rng(number)
        tokens = random.integers(0, EOT, length).astype(np.uint16)
        ends = np.cumsum(random.integers(1, 31, 200)) - 1
        tokens[ends[ends < length - 1]] = EOT
        tokens.tofile(tmp_path / f"validation-{number}.bin")
    return made


def documents_of(split: TokenSplit) -> list[list[int]]:
    """The documents of two tokens and more, found by hand, each with its end-of-text token."""
    found: list[list[int]] = []
    for shard in range(len(split.shards)):
        document: list[int] = []
        for token in split.read(shard, 0, split.shards[shard].tokens).tolist():
            document.append(token)
            if token == EOT:
                found.append(document)
                document = []
        found.append(document)
    return [document for document in found if len(document) > 1]


def losses_of(model: GPT2LMHeadModel, document: list[int]) -> list[float]:
    """Of the first CONTEXT targets, in float64, the document by itself."""
    ids = torch.tensor([document[: CONTEXT + 1]])
    with torch.inference_mode():
        log_probs = copy.deepcopy(model).double()(ids[:, :-1]).logits[0].log_softmax(-1)
    return [-float(log_probs[place, token]) for place, token in enumerate(ids[0, 1:])]


def test_every_document_is_scored_once_from_its_start(tiny_gpt2: GPT2LMHeadModel, data: TokenDataset) -> None:
    split = data.split("validation")
    expected = [losses_of(tiny_gpt2, document) for document in documents_of(split)]
    flat = [loss for losses in expected for loss in losses]
    found = token_statistics(tiny_gpt2, split, context=CONTEXT, windows="document")
    assert [window.scored for window in found.windows] == list(map(len, expected))
    np.testing.assert_allclose(found.loss, flat, atol=1e-5)
    for batch_size in ("auto", 1, 7):
        result = cross_entropy(tiny_gpt2, split, context=CONTEXT, windows="document", batch_size=batch_size)  # type: ignore[arg-type]
        assert result.cross_entropy == pytest.approx(np.mean(flat), abs=1e-6)
        assert (result.tokens, result.windows) == (len(flat), len(expected))
    few = token_statistics(tiny_gpt2, split, context=CONTEXT, windows="document", max_tokens=len(flat) // 3)
    assert 0.15 * len(flat) < len(few.loss) < 0.5 * len(flat)
    assert {window.shard for window in few.windows} == {0, 1}, "evenly spread"
    with pytest.raises(UserError, match="stride"):
        token_statistics(tiny_gpt2, split, context=CONTEXT, windows="document", stride=8)


def test_a_comparison_of_documents_draws_documents(tiny_gpt2: GPT2LMHeadModel, data: TokenDataset) -> None:
    reading = Comparison("text", data, context=CONTEXT, windows="document")
    reading.add("original", tiny_gpt2)
    assert reading._units is not None and reading._units.name == "documents"
    assert reading._units.counts.tolist() == [
        min(CONTEXT, len(one) - 1) for one in documents_of(data.split("validation"))
    ]


def test_the_residual_std_is_that_of_documents_without_padding(tiny_gpt2: GPT2LMHeadModel, data: TokenDataset) -> None:
    split = data.split("validation")
    found = residual_std(tiny_gpt2, split, context=CONTEXT, eot_token_id=EOT, windows="document")
    first, ordinary, tokens = [], [], 0
    for document in documents_of(split):
        ids = torch.tensor([document[:-1][:CONTEXT]])
        tokens += ids.numel()
        with torch.inference_mode():
            stds = tiny_gpt2(ids, output_hidden_states=True).hidden_states[1].std(-1, correction=0)[0]
        first.append(stds[:1])
        ordinary.append(stds[1:])
    assert found is not None and found.tokens == tokens
    assert found.first_pre[1] == pytest.approx(float(torch.cat(first).mean()), rel=1e-5)
    assert found.ordinary_pre[1] == pytest.approx(float(torch.cat(ordinary).mean()), rel=1e-5)


def test_both_kinds_of_windows_are_compared_on_the_same_targets(
    tiny_gpt2: GPT2LMHeadModel, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "WINDOW_CHECK_DOCUMENTS", 3)
    split, half = data.split("validation"), CONTEXT // 2
    alone, behind = [], []
    model = copy.deepcopy(tiny_gpt2).double()
    for shard in range(2):
        tokens = split.read(shard, 0, split.shards[shard].tokens)
        for start, length in zip(split.document_starts[shard], split.document_lengths[shard], strict=True):
            count = min(half, length - 1)
            if start < half or count < 1:
                continue
            for losses, before in ((alone, 0), (behind, half)):
                ids = torch.from_numpy(tokens[start - before : start + count + 1])[None]
                with torch.inference_mode():
                    log_probs = model(ids[:, :-1]).logits[0].log_softmax(-1)
                losses += [-float(log_probs[place, ids[0, place + 1]]) for place in range(before, before + count)]
    found = loss_by_windows(tiny_gpt2, split, context=CONTEXT)
    assert found is not None and found.tokens == len(alone)
    assert found.document == pytest.approx(np.mean(alone), abs=1e-5)
    assert found.stream == pytest.approx(np.mean(behind), abs=1e-5)
    monkeypatch.setattr(loss_module, "WINDOW_CHECK_DOCUMENTS", 1000)
    assert loss_by_windows(tiny_gpt2, split, context=CONTEXT) is None


@pytest.mark.parametrize(
    ("windows", "document", "stream", "error", "warns"),
    [
        ("stream", 0.83, 6.51, 0.1, True),
        ("document", 3.3, 3.1, 0.01, True),
        ("stream", 3.3, 3.1, 0.01, False),
        ("document", 0.83, 6.51, 0.1, False),
        ("stream", 3.05, 3.1, 0.01, False),
        ("stream", 2.9, 3.1, 0.2, False),
    ],
)
def test_a_clearly_worse_choice_is_said_before_training(
    tmp_path: Path,
    windows: str,
    document: float,
    stream: float,
    error: float,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    logged: list[tuple[Any, ...]] = []
    session = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True),
        resume=False,
        state_directory=tmp_path / "state",
        objective=SimpleNamespace(model=None),
        tracker=SimpleNamespace(say=said.append, log=lambda *row: logged.append(row)),
    )
    found = LossByWindows(document, stream, error, 1000, 50)
    monkeypatch.setattr(removal, "loss_by_windows", lambda *_, **__: found)
    recipe = load_recipe("tiny", {"data.windows": windows})
    removal.check_windows(session, recipe, SimpleNamespace(split=lambda name: name))  # type: ignore[arg-type]
    assert [kind for kind, *_ in logged] == ["windows"] and logged[0][2]["stream"] == stream
    (tmp_path / "metrics.jsonl").write_text('{"kind": "windows", "step": 0}\n')  # killed before its first checkpoint
    removal.check_windows(session, recipe, SimpleNamespace(split=lambda name: name))  # type: ignore[arg-type]
    assert len(logged) == 1
    assert bool(said) == warns
    if warns:
        other = "document" if windows == "stream" else "stream"
        assert f'data.windows = "{other}"' in said[0]
        assert f"{document:.2f}" in said[0] and f"{stream:.2f}" in said[0]


def test_the_probe_reads_the_beginnings_of_documents(data: TokenDataset) -> None:
    recipe = load_recipe("tiny", {"data.windows": "document", "data.context": CONTEXT, "observation": {"every": 5}})
    probe = _probe(recipe, data)
    assert probe is not None and probe.tokens.shape[0] == 8 and 2 <= probe.tokens.shape[1] <= CONTEXT
    beginnings = {tuple(document[: probe.tokens.shape[1]]) for document in documents_of(data.split("validation"))}
    assert {tuple(row) for row in probe.tokens.tolist()} <= beginnings
    many = load_recipe("tiny", {"data.windows": "document", "observation": {"every": 5, "sequences": 1000}})
    with pytest.raises(UserError, match="documents"):
        _probe(many, data)


def test_an_older_recipe_reads_a_stream() -> None:
    assert load_recipe("gpt2").data.windows == "stream"


@pytest.mark.slow
def test_a_removal_in_documents_from_its_tokens_to_its_scores(copied: Path) -> None:
    done(f"{REMOVE} --control --set data.windows=document --set data.bos_rows=0.2 --out new")
    run = copied / "new"
    scores = json.loads((run / "results.json").read_text())
    assert all(math.isfinite(scores["cross_entropy"][role]) for role in ("original", "control", "ln_free"))
    split = TokenDataset.open(run / "tokens").split("validation")
    assert scores["by_data"][0]["windows"] == sum(int((lengths > 1).sum()) for lengths in split.document_lengths)
    done("ln-evaluate new --out again.json")
    again = json.loads((copied / "again.json").read_text())
    assert again["cross_entropy"] == pytest.approx(scores["cross_entropy"], abs=1e-5)
    tokens = "--tokens new/tokens --context 64"
    done(f"ln-evaluate new/model {tokens} --windows stream --out stream.json")
    stream = json.loads((copied / "stream.json").read_text())
    assert stream["by_data"][0]["windows"] != scores["by_data"][0]["windows"]
