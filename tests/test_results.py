"""results.json: what is written is read back, what breaks the schema is refused, and the table shows the figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from report_run import prompts
from report_run import results as report_results
from rich.console import Console

from ln_removal.errors import UserError
from ln_removal.evaluation.hellaswag import ChoiceResult
from ln_removal.evaluation.loss import LossResult
from ln_removal.evaluation.results import ByRole, Results, Samples, Settings, collect, read, write
from ln_removal.report.tables import render, text_table


def loss(mean: float, *, bits: float | None = 1.25) -> LossResult:
    return LossResult(mean, 0.0123, bits, mean - 1, mean + 4, mean + 9, tokens=4096, windows=16)


def choice(acc_norm: float) -> ChoiceResult:
    return ChoiceResult("code", 2000, acc_norm - 0.1, 0.01, acc_norm, 0.0105, ())


SETTINGS = Settings(data="held-out modules", context=256, questions=2000, question_set="completions", protocol="code")


@pytest.fixture
def results() -> Results:
    return collect(
        {"original": loss(3.3), "control": loss(3.25), "ln_free": loss(3.29)},
        {"original": choice(0.70), "control": choice(0.71), "ln_free": choice(0.695)},
        models={"original": "tiny", "control": "out/control", "ln_free": "out/model"},
        settings=SETTINGS,
        seconds=412.3,
        device="cpu",
    )


def test_round_trip(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_documented_keys(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path / "results.json")
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["cross_entropy"] == {"original": 3.3, "control": 3.25, "ln_free": 3.29}
    assert raw["accuracy"] == {"original": 0.70, "control": 0.71, "ln_free": 0.695}, "accuracy is acc_norm"
    assert raw["bits_per_byte"]["ln_free"] == 1.25
    assert raw["accuracy_standard_error"]["control"] == 0.0105
    assert raw["loss_spread"]["original"]["percentile_99_9"] == pytest.approx(12.3)
    assert raw["gap"] == pytest.approx(0.04)
    assert (raw["tokens"], raw["seconds"], raw["device"]) == (4096, 412.3, "cpu")
    assert {"ln_removal", "torch", "transformers", "python"} <= set(raw["versions"])


def test_without_a_control_and_without_questions(tmp_path: Path) -> None:
    results = collect(
        {"ln_free": loss(3.29, bits=None)},
        models={"ln_free": "m"},
        settings=Settings(data="d", context=8),
        seconds=1,
        device="cpu",
    )
    write(results, tmp_path / "r.json")
    raw = json.loads((tmp_path / "r.json").read_text())
    assert raw["cross_entropy"] == {"original": None, "control": None, "ln_free": 3.29}
    assert raw["gap"] is None and raw["bits_per_byte"]["ln_free"] is None and raw["accuracy"]["ln_free"] is None
    text = shown(read(tmp_path / "r.json"))
    assert "3.2900" in text and "control" not in text and "accuracy" not in text and "bits per byte" not in text


def shown(results: Results) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    render(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table(results: Results) -> None:
    text = shown(results)
    row = next(line for line in text.splitlines() if "cross-entropy" in line)
    assert [part for part in ("3.3000", "3.2500", "3.2900", "± 0.0123", "+0.0400", "-0.0100") if part not in row] == []
    row = next(line for line in text.splitlines() if "accuracy" in line)
    assert [part for part in ("70.00", "71.00", "69.50", "± 1.05", "-1.50", "-0.50") if part not in row] == []
    assert "4,096 tokens of held-out modules" in text and "gap (LN-free - control): +0.0400" in text


def test_losses_on_prompts_are_shown_for_the_models_that_there_are(results: Results) -> None:
    text = shown(results.model_copy(update={"prompts": prompts()}))
    row = next(line for line in text.splitlines() if "second copy, text, with BOS" in line)
    assert [part for part in ("0.905", "0.955", "1.255", "+0.300") if part not in row] == []
    assert "+0.300 with BOS and +0.050 without" in " ".join(text.split())
    alone = tuple(
        one.model_copy(update={"loss": ByRole[float](ln_free=one.loss.ln_free), "differences": ()}) for one in prompts()
    )
    one_model = results.model_copy(update={"prompts": alone, "models": ByRole[str](ln_free="m")})
    text = shown(one_model)
    row = next(line for line in text.splitlines() if "second copy, text, with BOS" in line)
    assert "1.255" in row and "0.955" not in text and "with BOS and" not in text
    assert "BOS" not in shown(results), "results of an earlier version"


def test_names_and_texts_are_printed_as_they_are(results: Results) -> None:
    name = "my [v2] [red]data[/][:key:]"
    named = results.model_copy(
        update={
            "settings": results.settings.model_copy(update={"data": name, "question_set": name}),
            "continuations": (
                Samples(prompt=name, temperature=0.8, seed=0, texts=ByRole[str](ln_free=f"{name}\x1b[2J")),
            ),
            "by_data": tuple(each.model_copy(update={"data": name}) for each in report_results().by_data) * 2,
        }
    )
    text = shown(named)
    assert text.count(name) >= 6 and "\u241b[2J" in text and "\x1b" not in text
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(text_table(name, [name, name], [[name, name]], [name]))
    assert console.file.getvalue().count(name) == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap": 0.5}, "gap is 0.5"),
        ({"format": "other"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"cross_entropy": {"ln_free": "low"}}, "cross_entropy.ln_free"),
        ({"tokens": -1}, "tokens"),
    ],
)
def test_schema_faults(results: Results, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**results.model_dump(), **change}))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "r.json")


def test_files_that_cannot_be_used(results: Results, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json"):
        read(tmp_path / "missing.json")
    (tmp_path / "r.json").write_text('{"gap": ')
    with pytest.raises(UserError, match=r"r\.json|results\.json"):
        read(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot write"):
        write(results, tmp_path / "nowhere" / "r.json")
