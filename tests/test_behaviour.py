"""Calibration, prompts and tasks with and without BOS, and the commands that look into the models of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import done, refused
from torch import Tensor
from transformers import GPT2LMHeadModel

from ln_removal import to_bridge
from ln_removal.evaluation.prompts import prompt_losses, prompt_sets
from ln_removal.interpret import behaviour_of_run, calibration_error, load, logit_differences
from ln_removal.interpret.behaviour import both_ways, confidences
from ln_removal.interpret.tasks import Prompt, Task
from ln_removal.models.loading import load_model


class TestCalibration:
    def test_by_hand(self) -> None:
        """Two bins: right 1 of 2 at 0.9, and 0 of 2 at 0.25."""
        confidence = np.array([[0.9, 0.9], [0.25, 0.25]])
        right = np.array([[True, False], [False, False]])
        found = calibration_error(confidence, right)
        assert found.value == pytest.approx((2 * 0.4 + 2 * 0.25) / 4)
        # A resample has both documents, or one of them twice.
        assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.4)

    def test_against_loops(self) -> None:
        random = np.random.default_rng(0)
        confidence = random.uniform(size=(30, 40))
        right = random.uniform(size=(30, 40)) < confidence**1.5
        expected = 0.0
        for low in range(10):
            members = (confidence >= low / 10) & (confidence < (low + 1) / 10)
            expected += members.mean() * abs(confidence[members].mean() - right[members].mean())
        found = calibration_error(confidence, right, seed=1)
        assert found.value == pytest.approx(expected) and found.low < expected < found.high

    @pytest.mark.parametrize("bos", [None, 100])
    def test_bos_changes_what_is_read(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, bos: int | None) -> None:
        """The same tokens are predicted with it and without it."""
        model = tiny_gpt2.double()
        confidence, right = confidences(to_bridge(model), token_ids, bos)
        read = token_ids if bos is None else torch.cat([torch.full((4, 1), bos), token_ids], dim=1)
        with torch.no_grad():
            probabilities = model(read).logits.softmax(-1)[:, (0 if bos is None else 1) : -1]
        assert confidence == pytest.approx(probabilities.amax(-1).numpy(), abs=1e-12)
        assert np.array_equal(right, (probabilities.argmax(-1) == token_ids[:, 1:]).numpy())


class TestRun:
    def test_losses_and_tasks_are_those_of_the_models(self, here: Path) -> None:
        """In TransformerLens each model has the losses that it has outside, in float64; tasks are asked both ways."""
        models = load("run", dtype=torch.float64)
        assert models.data is not None and models.tokenizer is not None
        documents = models.documents(6, length=30, prepend_bos=False)
        pair = tuple(
            Task("mine", "", tuple(Prompt((*front, 40, 41, 42 + n), 50, 51) for n in range(3)), bool(front), None)
            for front in ((), (models.data.eot_token_id,))
        )
        found = behaviour_of_run(models, documents, [(pair[0], pair[1])], prompts=5)
        sets = prompt_sets(models.tokenizer, models.data.split("validation"), positions=63, max_tokens=5 * 63, seed=0)
        for role, bridge in models.items():
            plain = load_model(models.names[role], dtype=torch.float64).model
            expected = prompt_losses(plain, sets, eot_token_id=models.data.eot_token_id)
            one = found.results[role]
            assert set(one.losses) == set(expected) and len(expected) == 6
            for key, values in expected.items():
                np.testing.assert_allclose(one.losses[key], values, atol=1e-10)
                mean = (values * sets[key[0]].counts).sum() / sets[key[0]].counts.sum()
                assert one.loss(*key).value == pytest.approx(mean)
            for task in pair:
                assert np.array_equal(one.differences["mine", task.prepend_bos], logit_differences(bridge, task)[0])
        confidence, accuracy, share = one.reliability(True)
        assert (
            share.sum() == pytest.approx(1)
            and np.isnan(confidence[share == 0]).all()
            and (accuracy[share > 0] >= 0).all()
        )
        json.dumps(found.to_json(), allow_nan=False)

    def test_tasks_that_suit_the_tokenizer(self, here: Path) -> None:
        models = load("run")
        found = both_ways(models, count=3)
        for without, with_bos in found:
            assert (without.name, without.prepend_bos, with_bos.prepend_bos) == (with_bos.name, False, True)
            assert [one.clean for one in without.prompts] == [one.clean[1:] for one in with_bos.prompts]


@pytest.mark.parametrize(
    ("command", "figures", "keys"),
    [
        (
            "attention --copies 2",
            "attention-published-sink-rate attention-induction",
            "entropy_nats sink_heads_per_cent",
        ),
        ("residual --bos", "residual-l2 residual-effective-rank", "sites ordinary position_0"),
        ("neurons --ablated 6", "neurons-weights neurons-entropy", "neurons ablated share_mediated_by_norm"),
        ("lens --top 2", "lens-layers lens-grid", "kl_to_output_nats first_document"),
        (
            "behaviour --prompts 3 --task-prompts 2",
            "behaviour-calibration behaviour-loss",
            "calibration_error loss_nats",
        ),
    ],
    ids=lambda one: one.split()[0],
)
def test_a_command_shows_prints_and_writes(here: Path, command: str, figures: str, keys: str) -> None:
    """One table with a column a model; the same as JSON; figures and the JSON file where --out says."""
    name, *options = command.split()
    said = done(f"ln-analyze {name} run --documents 4 --length 24 --out new {' '.join(options)}").stdout
    assert all(word in said for word in ("original", "control", "LN-free"))
    files = {path.name for path in Path("new").iterdir()}
    assert {f"{figure}.{kind}" for figure in figures.split() for kind in ("png", "pdf")} <= files
    written = json.loads(Path(f"new/{name}.json").read_text())
    assert list(written["models"]) == ["original", "control", "ln_free"] and written["dtype"] == "float64"
    assert all(set(keys.split()) <= set(one) for one in written["models"].values())


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("behaviour run --task nonsense", "brackets"),
        ("behaviour run --task all,self", "or all"),
        ("residual run --documents 1", "two"),
        ("attention run --length 3", "8"),
        ("neurons run --ablated 0", "ablated"),
        ("lens nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(here: Path, command: str, word: str) -> None:
    assert word in refused(f"ln-analyze {command} --out new")
    assert not Path("new").exists()
