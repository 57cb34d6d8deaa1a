"""What went wrong in a run, as its report tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_run import SCRIPT, write_run
from tiny_training import STEPS, FaultyObjective, TinyRun

from ln_removal.errors import DivergedError
from ln_removal.report.page import write_report
from ln_removal.report.run_record import incident_lines


def test_a_calm_run_has_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert incident_lines(run / "metrics.jsonl") == [] == incident_lines(tmp_path / "nothing")
    assert "Incidents" not in write_report(run).read_text()


def test_what_the_training_logs_is_told(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", objective=FaultyObjective)
    run.objective.bad_steps = frozenset({2, *range(12, STEPS)})
    with pytest.raises(DivergedError):
        run.train()
    (alone, back) = incident_lines(run.directory / "metrics.jsonl")
    assert alone == "step 2: the update was left out, the loss was not finite"
    assert (
        back == "back to step 10: in steps 12, 13, 14 the loss was not finite (stage ln_1_v 2/2, learning rate 0.003)"
    )


def test_each_kind_is_told_and_nothing_is_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [
        {"kind": "incident", "step": 4, "incident": "skipped", "cause": "gradient"},
        {"kind": "incident", "step": 9, "incident": "skipped", "cause": "gradient"},
        {"kind": "incident", "step": 30, "incident": "spike", "loss": 6.125, "usual_loss": 2.2},
        {"kind": "incident", "step": 31, "incident": "spike", "loss": None, "usual_loss": 2.2},
        {"kind": "incident", "step": 39, "incident": "waiting", "site": f"ln_1_v.1{SCRIPT}", "delay": 8},
        {"kind": "incident", "step": 45, "incident": "recovered", "loss": 2.5, "usual_loss": 2.2},
        {"kind": "recipe", "step": 20, "changed": "training.learning_rate was 0.003, now 0.0015"},
        {"kind": "incident", "step": 1},
        {"kind": "rollback"},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, rows)) + '\n{"kind": "inc')
    lines = incident_lines(run / "metrics.jsonl")
    assert lines[0] == "steps 4, 9: the update was left out, the gradient was not finite"
    assert lines[1:3] == [
        "step 30: the loss spiked (6.12, usually 2.20)",
        "step 31: the loss spiked (not finite, usually 2.20)",
    ]
    assert lines[4:] == [
        "step 45: it had recovered (2.50)",
        "from step 20 on with another recipe: training.learning_rate was 0.003, now 0.0015",
    ]
    page = write_report(run).read_text()
    assert "step 30: the loss spiked" in page
    assert "and what follows now begin 8 steps later than planned" in page and SCRIPT not in page
