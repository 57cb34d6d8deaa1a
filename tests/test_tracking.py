"""What goes into metrics.jsonl and to wandb: nested figures, figures that are not numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ln_removal.training.metrics import Tracker

FIGURES: dict[str, Any] = {
    "entropy": [[1.5, math.nan], [0.5, 2.5]],
    "nan_counts": [0, 7],
    "slopes": [],
    "stage": "training",
    "loss": math.inf,
}


def tracker(path: Path, **options: Any) -> Tracker:
    return Tracker(path, total_steps=4, label="test", **{"progress": False, **options})


def test_lists_are_written_as_they_are_and_what_is_not_a_number_as_null(tmp_path: Path) -> None:
    with tracker(tmp_path / "metrics.jsonl") as tracking:
        tracking.log("observation", 3, FIGURES)
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "observation",
        "step": 3,
        "entropy": [[1.5, None], [0.5, 2.5]],
        "nan_counts": [0, 7],
        "slopes": [],
        "stage": "training",
        "loss": None,
    }


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> list[dict[str, Any]]:
    """Put a wandb in place that notes what its runs are begun with."""
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        own = {"finish": lambda exit_code: None, "define_metric": lambda *_, **__: None, "id": options["id"]}
        return SimpleNamespace(**(own | methods))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return begun


@pytest.mark.parametrize("given", [None, "theirs"])
def test_each_training_has_its_own_wandb_run_and_a_resumed_one_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    begun = fake_wandb(monkeypatch)
    if given:
        monkeypatch.setenv("WANDB_RUN_ID", given)
    else:
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for _ in range(2):  # the second time it is resumed
        for place, label in (("run", "removal"), ("run/control", "control"), ("grid/a b", "arm"), ("grid/c", "arm")):
            with Tracker(
                tmp_path / place / "metrics.jsonl", total_steps=1, label=label, progress=False, wandb_project="p"
            ):
                pass
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)  # and the environment is another one
    ids = [options["id"] for options in begun]
    assert len(set(ids[:4])) == 4 and ids[4:] == ids[:4]
    assert all(options["resume"] == "allow" and re.fullmatch(r"[\w.-]+", options["id"]) for options in begun)
    assert given is None or all(one.startswith("theirs-") for one in ids)


def test_wandb_gets_each_number_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    fake_wandb(monkeypatch, log=logged.append)
    with tracker(tmp_path / "metrics.jsonl", wandb_project="p") as tracking:
        tracking.log("observation", 3, FIGURES)
    (sent,) = logged
    assert sent.pop("observation/loss") == math.inf and math.isnan(sent.pop("observation/entropy/0/1"))
    assert sent == {
        "observation/entropy/0/0": 1.5,
        "observation/entropy/1/0": 0.5,
        "observation/entropy/1/1": 2.5,
        "observation/nan_counts/0": 0,
        "observation/nan_counts/1": 7,
        "step": 3,
    }


@pytest.mark.parametrize(
    ("seconds", "bar", "line"),
    [(59.0, "<00:59", "59 s left"), (3725, "<1:02:05", "62 min left"), (432_000, "<120:00:00", "5.0 days left")],
)
def test_the_time_left_is_the_one_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, bar: str, line: str
) -> None:
    """And not one of tqdm's, which knows only how long all steps took so far."""
    for progress, expected in ((True, bar), ("lines", line)):
        with tracker(tmp_path / "metrics.jsonl", progress=progress) as tracking:
            tracking.show(2, stage="training", loss=1.0, tokens_per_second=1234.0, seconds_left=seconds)
        shown = capsys.readouterr().err
        assert expected in shown and "1,234 tokens/s" in shown and "2/4" in shown
