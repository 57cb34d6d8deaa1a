"""What version 0.1.0 left on disk goes on, scores, exports and reports (see data/run-0.1.0/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Commands
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

OLD = Path(__file__).parent / "data" / "run-0.1.0"
OLD_SWEEP = "/tmp/mini/sweep"
"""Where the sweep was made: the recipes of its runs name its tokenizer by this path."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A writable copy of the old directory. The removals name their model relative to it."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    for file in [*tmp_path.glob("sweep/**/*.toml")]:
        file.write_text(file.read_text(encoding="utf-8").replace(OLD_SWEEP, str(tmp_path / "sweep")), encoding="utf-8")
    return tmp_path


@pytest.fixture
def forked(forked: Commands, place: Path) -> Commands:
    return forked.at(place)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_an_interrupted_removal_goes_on_to_the_figures_of_an_uninterrupted_one(place: Path, forked: Commands) -> None:
    out = place / "interrupted"
    forked.run("ln-remove", "--control", "--questions", "none", "--device", "cpu", "--out", out.name, "--resume")
    before, after = read(OLD / "finished" / "results.json"), read(out / "results.json")
    assert after["cross_entropy"]["control"] == pytest.approx(before["cross_entropy"]["control"], abs=1e-4)
    # Version 0.3 tapers the logarithm of the scale, and the run was interrupted in a taper.
    assert after["cross_entropy"]["ln_free"] == pytest.approx(before["cross_entropy"]["ln_free"], abs=1e-3)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(16))
    for model in ("model", "stock", "control/model"):
        expected = load_file(OLD / "finished" / model / "model.safetensors")
        found = load_file(out / model / "model.safetensors")
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        if model == "control/model":
            assert all((found[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def test_a_finished_removal_has_nothing_left_to_do(place: Path, forked: Commands) -> None:
    before = (place / "finished" / "results.json").read_bytes()
    options = ("--control", "--questions", "none", "--device", "cpu", "--out", "finished", "--resume")
    forked.run("ln-remove", *options)
    assert (place / "finished" / "results.json").read_bytes() == before


def test_a_finished_removal_scores_exports_and_reports(place: Path, forked: Commands) -> None:
    run = place / "finished"
    before = read(run / "results.json")
    forked.run("ln-evaluate", "finished", "--device", "cpu", "--out", "again.json")
    assert read(place / "again.json")["cross_entropy"] == pytest.approx(before["cross_entropy"], abs=1e-5)

    forked.run("ln-export", "finished", "--format", "stock", "--out", "stock")
    expected = load_file(run / "stock" / "model.safetensors")
    found = load_file(place / "stock" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)

    forked.run("ln-report", "finished")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{before['cross_entropy']['ln_free']:.4f}" in page


def test_an_old_checkpoint_is_folded(place: Path, forked: Commands) -> None:
    run = place / "finished"
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "stock")
    forked.run("ln-export", "finished", "--out", "folded")
    expected = load_file(OLD / "finished" / "model" / "model.safetensors")
    found = load_file(place / "folded" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)


def test_an_interrupted_sweep_trains_only_what_is_left(place: Path, forked: Commands) -> None:
    before = (place / "sweep" / "layernorm-seed0" / "result.json").read_bytes()
    options = ("--grid", "arms.toml", "--out", "sweep", "--device", "cpu", "--resume")
    forked.run("ln-pretrain", *options)
    assert (place / "sweep" / "layernorm-seed0" / "result.json").read_bytes() == before
    table = read(place / "sweep" / "table.json")
    assert table["complete"] and [arm["finished"] for arm in table["arms"]] == [1, 1]
    rows = (place / "sweep" / "no-norms-seed0" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if row["kind"] == "train"] == list(range(12))
