"""The main job from its beginning to its end: what a run leaves, and that every part of it can be used."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from command_line import Commands, done, forked_code
from small_model import GENERATION, REMOVE, write_corpus, write_model

pytestmark = pytest.mark.slow


def rows(run: Path, kind: str) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def frozen(run: Path) -> list[object]:
    return [row["site"] for row in rows(run, "event") if row["value"] == 1.0]


def losses(results: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))["cross_entropy"]
    return found


def generation(model: Path) -> dict[str, object]:
    settings = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in settings.items() if name != "transformers_version"}


def test_run_leaves_what_the_readme_says(world: Path) -> None:
    run = world / "run"
    for name in ("recipe.toml", "metrics.jsonl", "results.json", "model/config.json", "stock/config.json", "state"):
        assert (run / name).exists(), name
    assert (run / "control" / "model" / "model.safetensors").exists()
    found = losses(run / "results.json")
    assert set(found) == {"original", "control", "ln_free"}
    gap = json.loads((run / "results.json").read_text(encoding="utf-8"))["gap"]
    assert gap == pytest.approx(found["ln_free"] - found["control"])
    assert [row["step"] for row in rows(run, "train")] == list(range(6))
    sites = {f"{kind}.{layer}" for kind in ("ln_2", "ln_1_qk", "ln_1_v") for layer in range(2)}
    assert set(frozen(run)) == sites | {"ln_f", "eot", "first"}


def test_settings_for_generation_are_kept_and_flags_of_a_forward_pass_are_not(world: Path) -> None:
    for directory in ("run/model", "run/stock", "run/control/model"):
        assert generation(world / directory) == GENERATION, directory
        config = json.loads((world / directory / "config.json").read_text(encoding="utf-8"))
        given = {"output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing"} & set(config)
        assert {name: config[name] for name in given} in ({}, {"gradient_checkpointing": False})


def test_both_forms_load_in_a_fresh_process_and_agree(world: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
tokens = torch.arange(24).reshape(1, 24) % 300
stock = GPT2LMHeadModel.from_pretrained(sys.argv[1] + "/stock").eval()(tokens).logits
assert "ln_removal" not in sys.modules
import ln_removal
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model").eval()
assert not any("Norm" in type(module).__name__ for module in model.modules() if module is not model)
print(((model(tokens).logits - stock).abs().max() / stock.abs().max()).item())
"""
    assert float(forked_code(code, str(world / "run"))) < 1e-4


def test_export_of_a_run_without_its_model_folds_the_checkpoint(copied: Path) -> None:
    shutil.rmtree(copied / "run" / "model")
    done("ln-export run --out folded")
    assert generation(copied / "folded") == GENERATION
    done("ln-export folded --format stock --out stock")
    assert generation(copied / "stock") == GENERATION
    done("ln-evaluate folded --tokens run/tokens --context 64 --out again.json")
    assert losses(copied / "again.json")["ln_free"] == pytest.approx(
        losses(copied / "run" / "results.json")["ln_free"], abs=1e-4
    )


def test_embedded_model_completes_python() -> None:
    summary = json.loads(done("evaluate-hellaswag tiny --limit 60 --json").stdout)["models"]["tiny"]
    assert summary["acc_norm"] >= 0.55  # four endings: chance is 0.25


def test_gpt2_small_goes_through_every_stage(tmp_path: Path, forked: Commands) -> None:
    """Its depth, heads, vocabulary and positions, at a quarter of its width."""
    write_model(tmp_path / "model", n_layer=12, n_head=12, n_embd=192, n_positions=1024, vocabulary=50257)
    write_corpus(tmp_path / "texts")
    sets = "data.context=64 data.validation_tokens=256 training.tokens_per_step=128 training.evaluation_tokens=128"
    sets += ' training.compile=false export.formats=["normfree"] data.corpus=texts'
    arguments = [part for each in sets.split() for part in ("--set", each)]
    given = ("--model", "model", "--recipe", "gpt2", "--steps", "2", "--out", "run", "--questions", "none")
    forked.at(tmp_path).run("ln-remove", *given, *arguments)
    run = tmp_path / "run"
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["vocab_size"]) == ("normfree_gpt2", 12, 50257)
    assert len(set(frozen(run))) == 3 * 12 + 1 + 2
    # Random weights and two steps: the loss means nothing, but every figure has to be there.
    assert all(math.isfinite(losses(run / "results.json")[role]) for role in ("original", "ln_free"))


def test_everything_a_removal_can_add_to_its_loss_and_data(copied: Path) -> None:
    changes = {
        "training.distillation": "0.5",
        "training.auxiliary_weight": "0.1",
        "training.auxiliary_target": "constants",
        "training.auxiliary_sites": "all",
        "data.odd_text": "0.2",
    }
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    printed = json.loads(done(REMOVE.replace("--steps 6", "--steps 12"), "--out", "new", "--json", *arguments).stdout)
    assert math.isfinite(printed["cross_entropy"]["ln_free"])
    assert len(frozen(copied / "new")) == 3 * 2 + 1 + 2
    begun = [row["site"] for row in rows(copied / "new", "event")]  # 12 steps leave the same gap of 0 to many
    assert begun.index("ln_2.1") < begun.index("ln_1_v.1")
    assert (copied / "new" / "model" / "config.json").exists(), "folded, verified and written"
