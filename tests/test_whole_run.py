"""The main job as a user runs it: real commands on a small random GPT-2, a killed run that goes on, GPT-2's real sizes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_model import write_corpus, write_model

pytestmark = pytest.mark.slow

SMALL = {
    "data.context": "32",
    "data.weights": "{}",
    "data.validation_tokens": "2048",
    "training.tokens_per_step": "128",
    "training.evaluate_every": "50",
    "training.evaluation_tokens": "512",
    "training.checkpoint_every": "4",
    "training.precision": "float32",
    "training.compile": "false",
}


def command(name: str, *arguments: str) -> list[str]:
    module = name.removeprefix("ln-").replace("-", "_")
    return [sys.executable, "-c", f"from ln_removal.cli.{module} import main; main()", *arguments]


def run(name: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(name, *arguments), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def removal_arguments(model: Path, corpus: Path, out: Path, **changes: str) -> list[str]:
    settings = SMALL | {"data.corpus": str(corpus)} | changes
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    steps = ["--steps", "12", "--questions", "none", "--device", "cpu"]
    return ["--model", str(model), "--recipe", "tiny", "--out", str(out), "--control", "--json", *steps, *sets]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return write_model(directory / "model"), write_corpus(directory / "corpus")


@pytest.fixture(scope="module")
def finished(place: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("ln-remove", *removal_arguments(*place, out))
    return out, json.loads(done.stdout)


def test_run_leaves_what_the_readme_says(finished: tuple[Path, dict[str, object]]) -> None:
    out, printed = finished
    for name in ("recipe.toml", "metrics.jsonl", "results.json", "model/config.json", "stock/config.json", "state"):
        assert (out / name).exists(), name
    assert (out / "control" / "model" / "model.safetensors").exists()
    assert json.loads((out / "results.json").read_text()) == printed
    losses = printed["cross_entropy"]
    assert isinstance(losses, dict) and set(losses) == {"original", "control", "ln_free"}
    assert printed["gap"] == pytest.approx(losses["ln_free"] - losses["control"])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "train"] == list(range(12))
    frozen = {row["site"] for row in steps if row["kind"] == "event" and row["value"] == 1.0}
    sites = {f"{kind}.{layer}" for kind in ("ln_2", "ln_1_qk", "ln_1_v") for layer in range(2)}
    assert frozen == sites | {"ln_f", "eot", "first"}


def test_evaluate_agrees_with_the_run(finished: tuple[Path, dict[str, object]]) -> None:
    out, printed = finished
    found = json.loads(run("ln-evaluate", str(out / "model"), "--json", "--device", "cpu").stdout)
    assert found["cross_entropy"]["ln_free"] == pytest.approx(printed["cross_entropy"]["ln_free"], abs=1e-4)  # type: ignore[index]


def test_both_forms_load_in_fresh_processes_and_agree(finished: tuple[Path, dict[str, object]]) -> None:
    out, _ = finished
    logits = "tokens = torch.arange(24).reshape(1, 24) % 300; print(json.dumps(model(tokens).logits[0, -1].tolist()))"
    normfree = (
        "import json, torch, ln_removal\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out / 'model')!r}).eval()\n"
        "assert not any('Norm' in type(module).__name__ for module in model.modules() if module is not model)\n"
        + logits
    )
    stock = (
        "import json, sys, torch\nfrom transformers import GPT2LMHeadModel\n"
        f"model = GPT2LMHeadModel.from_pretrained({str(out / 'stock')!r}).eval()\n"
        "assert 'ln_removal' not in sys.modules\n" + logits
    )
    first, second = (
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (normfree, stock)
    )
    assert first == pytest.approx(second, abs=1e-4 * max(map(abs, first)))


def test_killed_run_goes_on_to_the_same_figures(
    place: tuple[Path, Path], finished: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = removal_arguments(*place, out)
    with subprocess.Popen(
        command("ln-remove", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not list(out.glob("state/step-*")) and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (out / "results.json").exists()
    resumed = json.loads(run("ln-remove", *arguments, "--resume").stdout)
    _, whole = finished
    assert resumed["cross_entropy"] == pytest.approx(whole["cross_entropy"], abs=1e-4)


def test_export_of_a_run_without_its_model_folds_the_checkpoint(
    finished: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out, printed = finished
    kept = tmp_path / "kept"
    (out / "model").rename(kept)
    try:
        run("ln-export", str(out), "--out", str(tmp_path / "folded"))
    finally:
        kept.rename(out / "model")
    found = run(
        "ln-evaluate",
        str(tmp_path / "folded"),
        "--tokens",
        str(out / "tokens"),
        "--context",
        "32",
        "--max-tokens",
        "2048",
        "--json",
    )
    loss = json.loads(found.stdout)["cross_entropy"]["ln_free"]
    assert loss == pytest.approx(printed["cross_entropy"]["ln_free"], abs=1e-4)  # type: ignore[index]


def test_embedded_model_completes_python() -> None:
    summary = json.loads(run("evaluate-hellaswag", "tiny", "--limit", "1000", "--json").stdout)["models"]["tiny"]
    assert summary["acc_norm"] >= 0.60  # four endings: chance is 0.25


def test_gpt2_small_goes_through_every_stage_at_its_real_sizes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "gpt2-shaped", n_layer=12, n_head=12, n_embd=768, n_positions=1024, entries=50257)
    out = tmp_path / "run"
    settings = {
        "data.corpus": str(write_corpus(tmp_path / "corpus")),
        "data.context": "64",
        "data.validation_tokens": "256",
        "training.tokens_per_step": "128",
        "training.evaluation_tokens": "128",
        "training.compile": "false",
        "export.formats": '["normfree"]',
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    arguments = [
        "--model",
        str(model),
        "--recipe",
        "gpt2",
        "--steps",
        "2",
        "--out",
        str(out),
        "--questions",
        "none",
        *sets,
    ]
    printed = json.loads(run("ln-remove", *arguments, "--json").stdout)
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["n_embd"], config["vocab_size"]) == (
        "normfree_gpt2",
        12,
        768,
        50257,
    )
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({row["site"] for row in events if row["kind"] == "event" and row["value"] == 1.0}) == 3 * 12 + 1 + 2
    # Random weights and two steps: the loss means nothing, but every figure has to be there.
    assert all(math.isfinite(printed["cross_entropy"][role]) for role in ("original", "ln_free"))


def test_everything_a_removal_can_add_to_its_loss_and_data(place: tuple[Path, Path], tmp_path: Path) -> None:
    model, corpus = place
    changes = {
        "training.distillation": "0.5",
        "training.auxiliary_weight": "0.1",
        "training.auxiliary_target": "constants",
        "training.auxiliary_sites": "all",
        "data.odd_text": "0.2",
    }
    arguments = removal_arguments(model, corpus, tmp_path / "run", **changes)
    printed = json.loads(run("ln-remove", *arguments).stdout)
    assert math.isfinite(printed["gap"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    frozen = [row["site"] for row in rows if row["kind"] == "event" and row["value"] == 1.0]
    assert len(frozen) == 3 * 2 + 1 + 2
    assert (tmp_path / "run" / "model" / "config.json").exists(), "folded, verified and written"
