"""Losses and gradients that are not finite: what is skipped, when a run goes back, to where, and how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_model import write_corpus, write_model
from tiny_training import STEPS, FaultyObjective, TinyRun, tiny_spec
from torch import nn

from ln_removal.config.recipe import Recipe, load_recipe, with_overrides
from ln_removal.errors import DivergedError, UserError
from ln_removal.pipelines.removal import remove
from ln_removal.training.checkpoint import checkpoints
from ln_removal.training.divergence import BadSteps, are_finite
from ln_removal.training.loss import StepLoss


class Log:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, Any]]] = []

    def log(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        self.rows.append((kind, step, figures))


def noted(figures: list[tuple[float, float]]) -> tuple[BadSteps, Log]:
    bad, log = BadSteps(), Log()
    for step, (loss, norm) in enumerate(figures):
        bad.note(step, loss, norm, log)  # type: ignore[arg-type]
    return bad, log


def test_three_in_a_row_are_too_many() -> None:
    sound, no_loss, no_gradient = (3.0, 1.0), (math.nan, math.nan), (3.0, math.inf)
    bad, log = noted([sound, no_loss, no_gradient, sound, no_gradient])
    assert (bad.total, bad.diverged, bad.streak, bad.causes) == (3, False, [4], ["gradient"])
    assert [(step, figures["cause"]) for _, step, figures in log.rows] == [
        (1, "loss"),
        (2, "gradient"),
        (4, "gradient"),
    ]
    assert {kind for kind, _, _ in log.rows} == {"incident"}
    bad, _ = noted([sound, no_gradient, no_loss, no_loss, sound, sound])
    assert (bad.total, bad.diverged, bad.streak) == (3, True, [1, 2, 3]), "what comes after does not take it back"
    assert bad.causes == ["gradient", "loss"]
    assert len(bad.recent()[0]) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_found(value: float) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert are_finite(module)
    with torch.no_grad():
        module[1].bias[2] = value
    assert not are_finite(module)


def diverge(run: TinyRun) -> str:
    with pytest.raises(DivergedError) as caught:
        run.train()
    message = str(caught.value)
    assert "\n" not in message
    return message


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_a_checkpoint_from_which_no_sound_step_was_made_is_passed_over(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", objective=FaultyObjective)
    run.objective.bad_steps = frozenset(range(10, STEPS))  # the first step after the checkpoint of step 10
    message = diverge(run)
    assert "the loss was not finite for 3 steps in a row from step 10 on (stage ln_1_v 1/2)" in message
    assert f"back at step 5, its last sound checkpoint (step-000010 set aside in {run.state} as suspect-...)" in message
    assert [step for step, _ in checkpoints(run.state)] == [5]
    assert (run.state / "suspect-000010" / "trainer.json").exists()
    assert [row["step"] for row in run.metrics()] == list(range(5))
    (row,) = run.metrics("rollback")
    assert (row["step"], row["bad_steps"], row["cause"]) == (5, [10, 11, 12], "loss")
    assert row["losses"][-4:][0] is not None and row["losses"][-3:] == [None] * 3
    resumed = TinyRun(tmp_path / "run", seed=1)
    resumed.train(resume=True)
    whole = TinyRun(tmp_path / "whole")
    whole.train()
    assert all(torch.equal(found, whole.model.state_dict()[name]) for name, found in resumed.model.state_dict().items())
    assert [row["step"] for row in resumed.metrics()] == list(range(STEPS))
    assert resumed.metrics("rollback") == [row], "it is not forgotten"


def test_a_checkpoint_that_is_set_aside_twice(tmp_path: Path) -> None:
    """After the first time the run goes on with less, as it was told to, comes to the same step, and diverges again."""
    for resume in (False, True):
        run = TinyRun(tmp_path / "run", objective=FaultyObjective)
        # Steps are counted by calls: the resumed run begins at step 5.
        run.objective.bad_steps = frozenset(range(5 if resume else 10, STEPS))
        with pytest.raises(DivergedError, match="step-000010 set aside"):
            run.train(resume=resume)
        assert [step for step, _ in checkpoints(run.state)] == [5]
    assert (run.state / "suspect-000010" / "trainer.json").exists()


def test_nothing_is_saved_and_nothing_pruned_while_steps_are_bad(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(checkpoint_every=1, keep_checkpoints=2), objective=FaultyObjective)
    run.objective.bad_steps = frozenset(range(12, STEPS))
    message = diverge(run)
    assert "back at step 11" in message
    assert [step for step, _ in checkpoints(run.state)] == [11]


def test_a_run_without_a_checkpoint_is_back_at_its_beginning(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(checkpoint_every=1000), objective=FaultyObjective)
    run.objective.bad_steps = frozenset(range(2, STEPS))
    assert "back at its beginning" in diverge(run)
    assert run.metrics() == [] and [row["step"] for row in run.metrics("rollback")] == [0]


@pytest.mark.parametrize("rate", [1e4, 1e30, 1e300])
def test_an_exploding_learning_rate_stops_the_run_and_leaves_no_ruins(tmp_path: Path, rate: float) -> None:
    spec = tiny_spec(learning_rate=rate, minimum_learning_rate=0.0, checkpoint_every=1, keep_checkpoints=3, clip=1e3)
    run = TinyRun(tmp_path / "run", spec=spec)
    assert "another --out and --set training.learning_rate=" in diverge(run)
    saved = checkpoints(run.state)
    for _, path in saved:
        assert all(torch.isfinite(tensor.float()).all() for tensor in tensors_of(path).values()), path
    text = (run.directory / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


class ExplodingAtTheEnd(FaultyObjective):
    """Its last two steps are bad, and so is every evaluation."""

    bad_steps = frozenset({STEPS - 2, STEPS - 1})


def test_a_run_whose_end_is_bad_is_not_finished(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", objective=ExplodingAtTheEnd)
    with pytest.raises(DivergedError, match="finite"):
        run.train(evaluate=lambda: {"cross_entropy": math.nan})
    assert checkpoints(run.state)[-1][0] == 20
    sound = TinyRun(tmp_path / "sound", objective=ExplodingAtTheEnd)
    assert sound.train(evaluate=lambda: {"cross_entropy": 3.0}).skipped_steps == 2


def small_recipe(directory: Path, **changes: Any) -> Recipe:
    model = directory / "model"
    if not model.exists():
        write_model(model)
        write_corpus(directory / "texts")
    values: dict[str, object] = {
        "model": str(model),
        "data.corpus": str(directory / "texts"),
        "data.context": 32,
        "data.weights": {},
        "data.validation_tokens": 512,
        "schedule.taper": 1,
        "schedule.special_taper": 1,
        "training.steps": 12,
        "training.tokens_per_step": 128,
        "training.warmup_steps": 0,
        "training.evaluate_every": 100,
        "training.checkpoint_every": 4,
        "training.compile": False,
        "training.precision": "float32",
        "export.formats": ["normfree"],
    }
    return load_recipe("tiny", values | {f"training.{name}": value for name, value in changes.items()})


def test_after_a_rollback_the_run_goes_on_with_a_lower_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = small_recipe(tmp_path, learning_rate=2e-3, minimum_learning_rate=1e-3), tmp_path / "run"
    lower = with_overrides(recipe, {"training.learning_rate": 1e-3})
    from ln_removal.training.loss import Objective

    forward = Objective.forward
    calls: list[int] = []

    def sick(self: Objective, tokens: torch.Tensor) -> StepLoss:
        calls.append(1)
        loss = forward(self, tokens)
        return loss if len(calls) <= 6 else StepLoss(loss.total * math.nan, loss.cross_entropy * math.nan)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "forward", sick)
        with pytest.raises(DivergedError) as caught:
            remove(recipe, out, questions=None, device="cpu", progress=False)
    assert "--resume and --set training.learning_rate=0.001" in str(caught.value)
    for other in (
        {"seed": 1},
        {"training.learning_rate": 4e-3},
        {"training.learning_rate": 1e-3, "training.steps": 14},
    ):
        with pytest.raises(UserError, match="recipe"):
            remove(with_overrides(recipe, other), out, questions=None, device="cpu", progress=False, resume=True)
    results = remove(lower, out, questions=None, device="cpu", progress=False, resume=True)
    assert math.isfinite(results.cross_entropy.ln_free)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(12))
    assert rows[kinds.index("recipe")]["changed"] == "training.learning_rate was 0.002, now 0.001"
    assert [row["step"] for row in rows if row["kind"] in ("rollback", "recipe")] == [4, 4]
    assert load_recipe(str(out / "recipe.toml")) == lower
    with pytest.raises(UserError, match="recipe"):  # it has gone on since
        remove(recipe, out, questions=None, device="cpu", progress=False, resume=True)
