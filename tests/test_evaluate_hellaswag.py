"""The command `evaluate-hellaswag`, and what all commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ln_removal.cli import console
from ln_removal.cli.evaluate_hellaswag import app
from ln_removal.errors import UserError
from ln_removal.evaluation.questions import Question, write_jsonl

runner = CliRunner()


@pytest.fixture
def model_directory(world: Path) -> Path:
    return world / "model"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    write_jsonl(
        [Question(n, "A", "abc.", "x", "abc. x", ("one", "two", "three", "four"), label=n % 4) for n in range(8)],
        tmp_path / "q.jsonl",
    )
    return tmp_path / "q.jsonl"


def test_json_and_per_question(model_directory: Path, questions: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    arguments = [str(model_directory), "--data", str(questions), "--json", "--limit", "6", "--device", "cpu"]
    result = runner.invoke(app, [*arguments, "--per-question", str(scores)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["models"][str(model_directory)]
    assert summary["questions"] == 6 and summary["protocol"] == "lm-eval"
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [line["ind"] for line in lines] == list(range(6))
    assert sum(line["choice_norm"] == line["label"] for line in lines) / 6 == summary["acc_norm"]
    assert {line["model"] for line in lines} == {str(model_directory)}


def test_table_and_protocol(model_directory: Path, questions: Path) -> None:
    result = runner.invoke(app, [str(model_directory), "--data", str(questions), "--protocol", "nanogpt"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "8 questions, protocol nanogpt" in words and "acc_norm (%)" in words and str(model_directory.name) in words


def test_several_models_are_compared_with_the_first(model_directory: Path, questions: Path, tmp_path: Path) -> None:
    other = _other_weights(model_directory, tmp_path / "other")
    arguments = [str(model_directory), str(other), "--data", str(questions), "--device", "cpu"]
    scores = tmp_path / "scores.jsonl"
    done = runner.invoke(app, [*arguments, "--json", "--per-question", str(scores)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (comparison,) = found["comparisons"]
    assert (comparison["first"], comparison["second"]) == (str(model_directory), str(other))
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    right = {
        name: [line["choice_norm"] == line["label"] for line in lines if line["model"] == name]
        for name in (str(model_directory), str(other))
    }
    first, second = right.values()
    norm = comparison["acc_norm"]
    assert norm["only_first"] == sum(a and not b for a, b in zip(first, second, strict=True))
    assert norm["only_second"] == sum(b and not a for a, b in zip(first, second, strict=True))
    assert norm["difference"] == pytest.approx((sum(second) - sum(first)) / 8)
    assert norm["low"] <= norm["difference"] <= norm["high"] and 0 < norm["p_value"] <= 1
    assert runner.invoke(app, [*arguments, "--json"]).stdout == done.stdout, "seeded"
    table = " ".join(runner.invoke(app, arguments).stdout.split())
    assert "McNemar p" in table and "95 % interval" in table


def _other_weights(model: Path, out: Path) -> Path:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].flip(0).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_shared_behaviour_of_commands() -> None:
    def command(how: str, debug: console.DebugOption = False, version: console.VersionOption = False) -> None:
        """A command."""
        if how == "mistake":
            raise UserError("two\nlines")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "bug":
            raise ZeroDivisionError
        typer.echo("done")

    shared = console.build(command)
    assert runner.invoke(shared, ["work"]).stdout == "done\n"
    mistake = runner.invoke(shared, ["mistake"])
    assert (mistake.exit_code, mistake.stderr) == (2, "error: two lines\n")
    assert runner.invoke(shared, ["interrupt"]).exit_code == 130
    assert isinstance(runner.invoke(shared, ["bug"]).exception, ZeroDivisionError)
    assert runner.invoke(shared, ["--version"]).stdout.startswith("ln-removal ")
    assert runner.invoke(shared, ["--nonsense"]).exit_code == 2
