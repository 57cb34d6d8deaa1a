"""A grid of tiny runs through the command: its table, going on after an interruption, an arm that diverges."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from click.testing import Result
from command_line import Commands
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_model import write_corpus, write_tokenizer
from test_grid_file import GOOD, grid_file

from ln_removal.config.recipe import load_recipe
from ln_removal.config.sweep import Arm, Sweep
from ln_removal.data.tokens import TokenDataset
from ln_removal.pipelines import pretraining, sweep
from ln_removal.report.sweep_table import RunResult, SweepTable, build_table, read_result, write_result
from ln_removal.training.session import sampler_of

BASE = """
model = "small"
[data]
corpus = "{corpus}"
context = 16
[architecture]
n_layer = 1
n_head = 2
n_embd = 16
n_positions = 16
vocab_size = 300
[training]
steps = 4
tokens_per_step = 64
learning_rate = 1e-2
precision = "float32"
compile = false
checkpoint_every = 2
evaluate_every = 2
evaluation_tokens = 256
[observation]
every = 2
sequences = 2
"""
RUNS = ("one-layer-seed0", "two-layers-seed0", "one-layer-seed1", "two-layers-seed1")


def run(*arguments: str | Path) -> Result:
    return command_line.invoke("ln-pretrain --device cpu", *arguments)


def done(*arguments: str | Path) -> Result:
    return command_line.done("ln-pretrain --device cpu", *arguments)


def refused(*arguments: str | Path) -> str:
    return command_line.refused("ln-pretrain --device cpu", *arguments)


def small_grid(directory: Path, text: str = GOOD) -> str:
    """A grid file with its base and the corpus."""
    corpus = write_corpus(directory / "texts", documents=8)
    return grid_file(directory, text, BASE.format(corpus=corpus))


def weights(out: Path, name: str) -> dict[str, Any]:
    return load_file(out / name / "model" / "model.safetensors")


def trained_at(out: Path) -> dict[str, int]:
    """When each finished run was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def file(place: Path) -> str:
    return small_grid(place)


@pytest.fixture(scope="module")
def finished(place: Path, file: str) -> tuple[Path, dict[str, Any]]:
    """A grid trained without interruption, and what --json printed."""
    out = place / "whole"
    return out, json.loads(done("--grid", file, "--out", out, "--json").stdout)


@pytest.fixture
def copy(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Iterator[Path]:
    """The finished grid, to be changed: it is put back in its place, which its runs' links name."""
    out, _ = finished
    shutil.copytree(out, tmp_path / "kept", symlinks=True)
    yield out
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "kept", out, symlinks=True)


# ------------------------------------------------------------------------------------------------------ a finished grid


def test_what_a_grid_leaves(finished: tuple[Path, dict[str, Any]]) -> None:
    out, printed = finished
    assert {path.name for path in out.iterdir()} == {
        *RUNS,
        *("grid.toml", "table.json", "table.md", "tokens", "tokenizer", ".lock"),
    }
    assert json.loads((out / "table.json").read_text()) == printed
    written = [json.loads((out / name / "result.json").read_text()) for name in RUNS]
    assert sorted(trained_at(out), key=trained_at(out).__getitem__) == list(RUNS)  # seed by seed
    assert len({result["tokens_sha256"] for result in written}) == 1
    assert printed["complete"] and printed["baseline"] == "one + layer" and printed["seeds"] == [0, 1]
    for arm in printed["arms"]:
        assert arm["tokens"] == 256 and arm["finished"] == 2
        for figures in arm["runs"]:
            assert figures["perplexity"] == pytest.approx(math.exp(figures["cross_entropy"]))
            assert figures["tokens"] == 256 and figures["tokens_per_second"] > 0
    markdown = (out / "table.md").read_text()
    two = printed["arms"][1]
    assert f"| two layers | {two['perplexity']:.3f} ({two['change_percent']:+.2f} %) |" in markdown


def test_what_was_seen_while_a_run_trained_is_in_its_result_and_in_the_table(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, printed = finished
    for name in RUNS:
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        evaluations = {row["step"]: row["cross_entropy"] for row in rows if row["kind"] == "evaluation"}
        observations = [row for row in rows if row["kind"] == "observation"]
        seen = json.loads((out / name / "result.json").read_text())["seen"]
        assert list(evaluations) == [2, 4] and len(observations) == 3
        assert seen["last"] == evaluations[4] and seen["best"] == min(evaluations.values())
        assert evaluations[seen["best_step"]] == seen["best"]
        assert seen["largest_norm"] == max(max(row["residual_norm"]) for row in observations)
        last = [row for row in rows if row["kind"] == "train"][-1]
        assert seen["tokens_per_second"] == last["tokens_per_second"]
        heads = np.array(observations[-1]["entropy"])
        assert seen["entropy"] == pytest.approx(heads.mean())
        assert seen["overloaded"] == pytest.approx(np.mean(heads > 0.9 * math.lgamma(17) / 16))
    for arm in printed["arms"]:
        seeds = [figures["seen"] for figures in arm["runs"]]
        assert arm["best_evaluation"] == pytest.approx(np.mean([math.exp(one["best"]) for one in seeds]))
        assert arm["largest_norm"] == max(one["largest_norm"] for one in seeds)
    assert "| while training | last evaluation | best evaluation |" in (out / "table.md").read_text()
    # A result of an older version gets it from the metrics.
    older = json.loads((out / RUNS[0] / "result.json").read_text())
    seen = older.pop("seen")
    shutil.copytree(out / RUNS[0], tmp_path / "older", symlinks=True)
    (tmp_path / "older" / "result.json").write_text(json.dumps(older))
    found = read_result(tmp_path / "older")
    assert found is not None and found.seen.model_dump() == seen


def test_perplexity_is_that_of_the_written_model(finished: tuple[Path, dict[str, Any]]) -> None:
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.models.loading import load_model

    out, printed = finished
    model = load_model(str(out / "two-layers-seed1" / "model")).model
    loss = cross_entropy(model, TokenDataset.open(out / "tokens").split("validation"), context=16)
    figures = printed["arms"][1]["runs"][1]
    assert figures["directory"] == "two-layers-seed1"
    assert figures["cross_entropy"] == pytest.approx(loss.cross_entropy, abs=1e-6)


def test_all_runs_read_the_same_tokens_and_a_seed_gives_one_order(
    finished: tuple[Path, dict[str, Any]], file: str
) -> None:
    out, _ = finished
    assert {(out / name / "tokens").resolve() for name in RUNS} == {(out / "tokens").resolve()}

    def batches(name: str) -> Any:
        recipe = load_recipe(str(out / name / "recipe.toml"))  # as trained
        sampler = sampler_of(recipe, TokenDataset.open(out / "tokens"))
        return np.concatenate([sampler.sequences(step, 0, 4) for step in range(recipe.training.steps)])

    assert (batches("one-layer-seed0") == batches("two-layers-seed0")).all()
    assert (batches("one-layer-seed1") == batches("two-layers-seed1")).all()
    assert not (batches("one-layer-seed0") == batches("one-layer-seed1")).all()


def test_a_seed_gives_one_beginning(place: Path, tmp_path: Path) -> None:
    """Arms that differ in nothing but the learning rate have the same loss before the first update."""
    text = GOOD.replace('"architecture.n_layer" = 2', '"training.learning_rate" = 1e-3')
    out = tmp_path / "out"
    done("--grid", small_grid(tmp_path, text), "--out", out)
    first, last = {}, {}
    for name in RUNS:
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        first[name], last[name] = losses[0], losses[-1]
    assert first["one-layer-seed0"] == first["two-layers-seed0"] != first["one-layer-seed1"]
    assert first["one-layer-seed1"] == first["two-layers-seed1"]
    assert last["one-layer-seed0"] != last["two-layers-seed0"]


def test_the_table_is_printed(finished: tuple[Path, dict[str, Any]], file: str) -> None:
    out, printed = finished
    result = done("--grid", file, "--out", out, "--resume")
    assert "4 of 4 runs are over already" in result.stderr
    arm = printed["arms"][1]
    assert f"{arm['perplexity']:.3f} ({arm['change_percent']:+.2f} %)" in result.stdout
    assert "perplexity, T=16" in result.stdout and "half the range" in result.stdout
    assert f"table: {out / 'table.md'}" in result.stdout.replace("\n", " ")


# ------------------------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_grid_goes_on_to_the_same_weights(
    finished: tuple[Path, dict[str, Any]], file: str, copy: Path
) -> None:
    """One run is over, one is at its first checkpoint, the others were not begun."""
    _, printed = finished
    expected = {name: weights(copy, name) for name in RUNS}
    for name in RUNS[2:]:
        shutil.rmtree(copy / name)
    (copy / RUNS[1] / "result.json").unlink()
    shutil.rmtree(copy / RUNS[1] / "model")
    shutil.rmtree(copy / RUNS[1] / "state" / "step-000004")
    before = trained_at(copy)
    again = json.loads(done("--grid", file, "--out", copy, "--resume", "--json").stdout)
    assert trained_at(copy)[RUNS[0]] == before[RUNS[0]]
    for name in RUNS:
        found = weights(copy, name)
        assert all((found[key] == expected[name][key]).all() for key in expected[name]), name
    for arm, whole in zip(again["arms"], printed["arms"], strict=True):
        assert (arm["perplexity"], arm["change_percent"]) == (whole["perplexity"], whole["change_percent"])


def test_new_arms_and_seeds_are_added(place: Path, finished: tuple[Path, dict[str, Any]], copy: Path) -> None:
    _, printed = finished
    text = GOOD.replace("[0, 1]", "[0, 1, 2]").replace('baseline = "one + layer"', 'baseline = "two layers"')
    wider = place / "wider.toml"
    wider.write_text(
        'name = "mine"\n' + text + '[[arms]]\nname = "wide"\nset = { architecture.n_embd = 32 }\n', encoding="utf-8"
    )
    before = trained_at(copy)
    result = done("--grid", wider, "--out", copy, "--resume", "--json")
    for line in ("added: arm wide", "added: seed 2", "the baseline was one + layer, now two layers"):
        assert line in result.stderr
    after = trained_at(copy)
    assert len(after) == 9 and before.items() <= after.items()
    arms = json.loads(result.stdout)["arms"]
    assert [len(arm["runs"]) for arm in arms] == [3, 3, 3] and all(arm["finished"] == 3 for arm in arms)
    assert arms[0]["runs"][0]["perplexity"] == printed["arms"][0]["runs"][0]["perplexity"]
    assert arms[1]["change_percent"] == 0 and arms[0]["change_percent"] != 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (('n_layer" = 2', 'n_layer" = 3'), [], "architecture.n_layer was 2, now 3"),
        (("two layers", "2 layers"), [], "two layers"),
        (("[0, 1]", "[0]"), [], "seed 1"),
        (("", ""), ["--steps", "2"], "training.steps was 4, now 2"),
        (("", ""), ["--set", "training.clip=0.5"], "training.clip was 1.0, now 0.5"),
    ],
)
def test_another_grid_is_not_resumed(
    finished: tuple[Path, dict[str, Any]], place: Path, change: tuple[str, str], options: list[str], message: str
) -> None:
    out, _ = finished
    other = place / "other.toml"
    other.write_text('name = "mine"\n' + GOOD.replace(*change), encoding="utf-8")
    before = (out / "grid.toml").read_text()
    said = refused("--grid", other, "--out", out, "--resume", *options)
    assert message in said
    assert (out / "grid.toml").read_text() == before


def test_a_grid_that_has_not_been_trained_takes_another_file(file: str, copy: Path) -> None:
    for name in RUNS:
        shutil.rmtree(copy / name)
    done("--grid", file, "--out", copy, "--resume", "--steps", "2")
    assert json.loads((copy / "table.json").read_text())["arms"][0]["tokens"] == 128


def test_a_begun_grid_needs_no_corpus(place: Path, file: str, copy: Path) -> None:
    shutil.rmtree(copy / RUNS[3])
    (place / "texts").rename(place / "gone")
    try:
        done("--grid", file, "--out", copy, "--resume")
    finally:
        (place / "gone").rename(place / "texts")
    assert set(trained_at(copy)) == {*RUNS}


def test_without_resume_or_in_use_it_is_refused(finished: tuple[Path, dict[str, Any]], file: str) -> None:
    out, _ = finished
    assert "--resume" in refused("--grid", file, "--out", out)
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("--grid", file, "--out", out, "--resume")


def test_ctrl_c_between_two_runs_says_how_to_go_on(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(directory: Path, result: RunResult) -> None:
        write_result(directory, result)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_result", stop)
        stopped = run("--grid", file, "--out", out, "--steps", "1")
    assert stopped.exit_code == 130
    assert "1 of 4" in stopped.stderr
    assert stopped.stderr.rstrip().endswith("--resume") and set(trained_at(out)) == {RUNS[0]}
    done("--grid", file, "--out", out, "--steps", "1", "--resume")
    assert set(trained_at(out)) == {*RUNS}


def test_ctrl_c_before_anything_is_trained(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run leaves nothing behind, the grid has its tokens: so it is the grid that goes on."""
    out = tmp_path / "out"

    def stop(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "build_model", stop)
        stopped = run("--grid", file, "--out", out, "--steps", "1")
    assert "0 of 4" in stopped.stderr
    assert stopped.stderr.rstrip().endswith("--resume") and not (out / RUNS[0]).exists()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "prepare_tokens", stop)
        stopped = run("--grid", file, "--out", tmp_path / "other", "--steps", "1")
    assert stopped.exit_code == 130 and "--resume" not in stopped.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_killed_grid_goes_on(file: str, tmp_path: Path, forked: Commands) -> None:
    out = tmp_path / "killed"
    arguments = ["--grid", file, "--out", str(out), "--device", "cpu", "--json", "--steps", "24"]
    command = forked.start("ln-pretrain", *arguments)
    command.wait_until(lambda: any(out.glob(f"{RUNS[1]}/state/step-*"))).send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    begun = trained_at(out)
    assert RUNS[0] in begun and RUNS[3] not in begun
    killed = json.loads(done(*arguments, "--resume").stdout)
    assert trained_at(out)[RUNS[0]] == begun[RUNS[0]]
    whole = json.loads(done(*arguments[:3], tmp_path / "whole", *arguments[4:]).stdout)
    for name in RUNS:
        expected, found = weights(tmp_path / "whole", name), weights(out, name)
        assert all((found[key] == expected[key]).all() for key in expected), name
    assert [arm["perplexity"] for arm in killed["arms"]] == [arm["perplexity"] for arm in whole["arms"]]


# ------------------------------------------------------------------------------------------------------------ mishaps


def test_an_arm_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    sick = '[[arms]]\nname = "sick"\nset = { training = { learning_rate = 1e30, clip = 1e30 } }\n'
    file, out = small_grid(tmp_path, GOOD.replace("[[arms]]", sick + "[[arms]]", 1)), tmp_path / "out"
    options = ("--grid", file, "--out", out, "--steps", "12")
    first = done(*options)
    table = json.loads((out / "table.json").read_text())
    assert table["complete"] and [arm["finished"] for arm in table["arms"]] == [0, 2, 2]
    run_of_it = table["arms"][0]["runs"][0]
    assert run_of_it["status"] == "diverged" and run_of_it["perplexity"] is None
    assert "not finite" in run_of_it["message"]
    assert table["arms"][0]["diverged"] == 2 and table["arms"][0]["perplexity"] is None
    assert "| sick | diverged |" in (out / "table.md").read_text() and "diverged" in first.stdout
    before = trained_at(out)
    done(*options, "--resume")
    assert trained_at(out) == before  # it would diverge again
    shutil.rmtree(out / "sick-seed0")
    done(*options, "--resume")
    assert trained_at(out)["sick-seed0"] > before["sick-seed0"]


def test_a_grid_that_fails_before_training_leaves_nothing(tmp_path: Path) -> None:
    file, out = small_grid(tmp_path), tmp_path / "new" / "out"
    shutil.rmtree(tmp_path / "texts")
    (tmp_path / "texts").mkdir()
    refused("--grid", file, "--out", out)
    assert not out.parent.exists()
    write_corpus(tmp_path / "texts", documents=8)
    done("--grid", file, "--out", out, "--steps", "1")


def test_a_damaged_result_is_said_to_be(finished: tuple[Path, dict[str, Any]], file: str, copy: Path) -> None:
    (copy / RUNS[0] / "result.json").write_text('{"arm": ')
    assert "result.json" in refused("--grid", file, "--out", copy, "--resume")
    (copy / RUNS[0] / "result.json").unlink()
    _, printed = finished
    again = json.loads(done("--grid", file, "--out", copy, "--resume", "--json").stdout)
    assert again["arms"][0]["perplexity"] == printed["arms"][0]["perplexity"]


# ------------------------------------------------------------------------------------------------------------ options


def test_given_tokens_and_tokenizer(
    finished: tuple[Path, dict[str, Any]], file: str, place: Path, tmp_path: Path
) -> None:
    whole, printed = finished
    out = tmp_path / "out"
    tokenizer = f"data.tokenizer={whole / 'tokenizer'}"
    options = ("--grid", file, "--out", out, "--set", tokenizer, "--json")
    table = json.loads(done(*options, "--tokens", whole / "tokens").stdout)
    assert [arm["perplexity"] for arm in table["arms"]] == [arm["perplexity"] for arm in printed["arms"]]
    assert not (out / "tokenizer").exists() and (out / "tokens").resolve() == (whole / "tokens").resolve()
    done(*options, "--resume")
    shutil.copytree(whole / "tokens", tmp_path / "tokens")
    assert "was begun with the tokens in" in refused(*options, "--resume", "--tokens", tmp_path / "tokens")


def test_a_named_tokenizer_is_used_by_all(file: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "named", entries=300)
    out = tmp_path / "out"
    done("--grid", file, "--out", out, "--steps", "1", "--set", f"data.tokenizer={tmp_path / 'named'}")
    assert TokenDataset.open(out / "tokens").tokenizer["name"] == str(tmp_path / "named")
    assert not (out / "tokenizer").exists()


def test_dry_run_shows_all_arms_and_does_nothing(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = done("--grid", file, "--out", out, "--dry-run", "--steps", "2").stdout
    assert "one + layer (baseline)" in text and "two layers" in text and "all 4 runs: 512 tokens" in text
    plan = json.loads(done("--grid", file, "--dry-run", "--json").stdout)
    assert [arm["name"] for arm in plan["arms"]] == ["one + layer", "two layers"] and plan["tokens"] == 1024
    width, layers = 16, [arm["recipe"]["architecture"]["n_layer"] for arm in plan["arms"]]
    shared = (300 + 16) * width + 2 * width
    assert [arm["parameters"] for arm in plan["arms"]] == [shared + n * (12 * width + 13) * width for n in layers]
    assert not out.exists()


def test_a_grid_has_its_own_base(file: str) -> None:
    assert "leave --recipe out" in refused("--grid", file, "--recipe", "tiny-gpt2")


# --------------------------------------------------------------------------------------------------------- the table


def table_of(perplexities: dict[str, list[float | None]], baseline: str = "a") -> SweepTable:
    """The table of arms with these perplexities, one a seed; None is a run that diverged, infinity one still to come."""
    recipe = load_recipe("tiny-gpt2")
    seeds = tuple(range(max(map(len, perplexities.values()))))
    arms = tuple(Arm(name, name, recipe) for name in perplexities)
    results = {
        (name, seed): RunResult(arm=name, seed=seed, status="diverged", message="the loss was not finite; try less")
        if value is None
        else RunResult(
            arm=name, seed=seed, status="finished", cross_entropy=math.log(value), tokens=1000, seconds=10.0 + seed
        )
        for name, values in perplexities.items()
        for seed, value in enumerate(values)
        if value != math.inf
    }
    return build_table(Sweep("grid", "", seeds, baseline, arms), results)


def test_means_changes_and_spreads_by_hand() -> None:
    base, other = table_of({"a": [4.0, 8.0], "b": [5.0, 9.0]}).rows
    assert (base.perplexity, base.change_percent) == (pytest.approx(6.0), pytest.approx(0.0))
    assert other.perplexity == pytest.approx(7.0)
    assert other.change_percent == pytest.approx((25 + 12.5) / 2)  # not 100 (7 / 6 - 1) = 16.7
    assert (base.perplexity_spread, other.perplexity_spread) == (pytest.approx(2.0), pytest.approx(2.0))
    assert other.change_percent_spread == pytest.approx(6.25)
    assert other.seconds == pytest.approx(10.5) and other.tokens_per_second == pytest.approx((100 + 1000 / 11) / 2)


def test_the_spread_of_three_seeds_is_their_standard_error() -> None:
    (row,) = table_of({"a": [4.0, 5.0, 9.0]}).rows
    assert row.perplexity_spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


def test_changes_count_only_seeds_that_both_have() -> None:
    table = table_of({"a": [4.0, math.inf], "b": [5.0, 90.0], "c": [None, 8.0]})
    _, other, third = table.rows
    assert other.perplexity == pytest.approx(47.5) and other.change_percent == pytest.approx(25.0)
    assert (third.finished, third.diverged, third.change_percent) == (1, 1, None)
    assert [cells[1] for cells in table.cells()] == ["4.000", "47.500 (+25.00 %)", "8.000"]
    assert [cells[4] for cells in table.cells()] == ["1 of 2", "2", "1 of 2, 1 diverged"]
    assert table.cells_by_seed() == [
        ["a", "4.000", "-"],
        ["b", "5.000 (+25.00 %)", "90.000"],
        ["c", "diverged", "8.000"],
    ]
    assert "c, seed 0, diverged: the loss was not finite." in table.notes()


def test_a_published_table_comes_out_as_it_is_printed() -> None:
    """GPT-2, T=128 (Jha & Reagen 2024, arXiv 2410.09637): perplexities, and changes to its three decimals' precision."""
    table = table_of({"LN + GELU": [2.688], "LN + ReLU": [2.757], "free + ReLU": [2.936]}, "LN + GELU")
    assert [row.change_percent for row in table.rows] == pytest.approx([0, 2.53, 9.20], abs=0.05)
    assert [cells[1] for cells in table.cells()] == ["2.688", "2.757 (+2.57 %)", "2.936 (+9.23 %)"]


@given(
    st.lists(st.tuples(st.floats(1.5, 50), st.floats(1.5, 50)), min_size=1, max_size=5),
    st.lists(st.floats(0.5, 2), min_size=5, max_size=5),
)
def test_what_a_seed_does_to_both_arms_does_not_change_the_change(
    pairs: list[tuple[float, float]], effects: list[float]
) -> None:
    plain = table_of({"a": [base for base, _ in pairs], "b": [other for _, other in pairs]})
    moved = table_of(
        {
            "a": [base * effect for (base, _), effect in zip(pairs, effects, strict=False)],
            "b": [other * effect for (_, other), effect in zip(pairs, effects, strict=False)],
        }
    )
    assert plain.rows[0].change_percent == pytest.approx(0, abs=1e-9)
    assert moved.rows[1].change_percent == pytest.approx(plain.rows[1].change_percent, rel=1e-6, abs=1e-6)
