"""A run killed with -9 twenty times, wherever it was, and resumed each time, ends bit for bit where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, Commands, code_of, environment
from small_model import write_corpus, write_model

STEPS, EVALUATE_EVERY = 120, 10

SETTINGS = {
    "data.context": "32",
    "data.weights": "{}",
    "data.validation_tokens": "2048",
    "training.tokens_per_step": "128",
    "training.evaluate_every": str(EVALUATE_EVERY),
    "training.evaluation_tokens": "4096",
    "training.checkpoint_every": "5",
    "training.keep_checkpoints": "2",
    "training.precision": "float32",
    "training.compile": "false",
}


MUST_BE_HIT = {
    *("step", "checkpoint", "evaluation", "folding", "export", "scoring"),
    *("control: step", "control: checkpoint", "control: evaluation"),
}

MOST_DELAY = {"start": 0.3, "step": 0.1, "checkpoint": 0.004, "evaluation": 0.004, "export": 0.008, "scoring": 0.05}
"""Seconds between the moment that is waited for and the kill, at most: drawn at random."""

REAL_PROCESSES = (4,)
"""The attempts made with the command as installed; the others are forked from a process that has imported everything."""


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    given = ["--model", str(place / "model"), "--recipe", "tiny", "--tokens", str(place / "tokens"), "--out", str(out)]
    return [*given, "--control", "--steps", str(STEPS), "--questions", "none", "--device", "cpu", *sets, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model", n_embd=64)
    write_corpus(directory / "corpus", documents=40)
    return directory


@pytest.fixture(scope="module")
def forked(place: Path, forked: Commands) -> Commands:
    moved = forked.at(place)
    moved.run("ln-prepare", "corpus", "--tokenizer", "model", "--out", "tokens")
    return moved


@pytest.fixture(scope="module")
def whole(place: Path, forked: Commands) -> Path:
    out = place / "whole"
    forked.run("ln-remove", *arguments(place, out))
    return out


class RealCommand(Command):
    """`ln-remove` as a user starts it."""

    def __init__(self, place: Path, *given: str) -> None:
        errors = place / "errors.txt"
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code_of("ln-remove"), *given],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=environment(),
            )
        self.pid, self.errors = self._process.pid, errors

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        return self._process.wait()


def last_row(metrics: Path) -> dict[str, Any] | None:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 1000))
            lines = file.read().splitlines()
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):  # not there, or a line that is being written
        return None


def phase(out: Path) -> str:
    """What the run in `out` is doing, or was doing when it was killed, as its files tell."""
    in_control = (out / "control" / "metrics.jsonl").exists()
    place = out / "control" if in_control else out
    prefix = "control: " if in_control else ""
    with suppress(FileNotFoundError):
        if any(name.startswith(".step-") for name in os.listdir(place / "state")):
            return prefix + "checkpoint"
    if any((place / name).exists() for name in (".model.tmp", ".stock.tmp")):
        return prefix + "export"
    if (place / "model").exists() and (in_control or (place / "stock").exists()):
        return "scoring" if in_control else "control: start"
    if (place / "state" / f"step-{STEPS:06d}").exists():
        return prefix + ("export" if (place / "model").exists() else "folding")
    row = last_row(place / "metrics.jsonl")
    if row is None:
        return prefix + "start"
    evaluates = row["kind"] == "train" and (row["step"] + 1) % EVALUATE_EVERY == 0
    return prefix + ("evaluation" if evaluates else "step")


def position(of: str) -> int:
    """Where in a run a phase comes; those that alternate share a place."""
    order = (
        "start",
        "step",
        "folding",
        "export",
        "control: start",
        "control: step",
        "control: folding",
        "control: export",
    )
    return [*order, "scoring"].index(of.replace("checkpoint", "step").replace("evaluation", "step"))


def targets(draw: random.Random) -> list[str]:
    """Twenty phases to kill a run in, in an order in which it can come to them."""
    first = ["step"] * 4 + ["checkpoint"] * 3 + ["evaluation"] * 2
    second = ["control: step"] * 2 + ["control: checkpoint"] * 2 + ["control: evaluation"]
    draw.shuffle(first)
    draw.shuffle(second)
    return ["start", *first, "folding", "export", "export", *second, "control: export", "scoring"]


def newest(out: Path) -> int:
    """The newest checkpoint's step; those of the control count from 1000."""
    found = [0]
    for state, more in ((out / "state", 0), (out / "control" / "state", 1000)):
        with suppress(FileNotFoundError):
            found += [more + int(name.removeprefix("step-")) for name in os.listdir(state) if name.startswith("step-")]
    return max(found)


def inodes(out: Path) -> set[int]:
    """Of the metrics: a resumed training rewrites its file before it goes on."""
    found = set()
    for path in (out / "metrics.jsonl", out / "control" / "metrics.jsonl"):
        try:
            found.add(path.stat().st_ino)
        except FileNotFoundError:
            continue
    return found


def kill_in(target: str, command: Command, out: Path, draw: random.Random) -> str | None:
    """Kill the command when it is in its target phase, or has passed it; returns the phase it died in, None if it ended first."""
    before, reached = inodes(out), newest(out)
    fresh = target in ("start", "scoring")
    ahead = draw.randrange(3) if target.endswith(("step", "checkpoint", "evaluation")) else 0
    checkpoints = set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        fresh = fresh or inodes(out) != before
        now = phase(out) if fresh else "start"
        if fresh and newest(out) > reached:
            checkpoints.add(newest(out))
        passed = position(now) > position(target)
        if passed or (fresh and now == target and len(checkpoints) >= ahead) or command.ended():
            break
        time.sleep(0.0003)
    time.sleep(draw.uniform(0, MOST_DELAY.get(target.removeprefix("control: "), 0)))
    command.send(signal.SIGKILL)
    return phase(out) if command.wait() == -signal.SIGKILL else None


def metrics(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    return rows


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def assert_same_run(found: Path, expected: Path) -> None:
    assert files(found) == files(expected), "nothing is missing, and nothing is left over"
    for name in ("model", "stock", "control/model"):
        weights = [(run / name / "model.safetensors").read_bytes() for run in (found, expected)]
        assert weights[0] == weights[1], f"{name}: not bitwise equal"
    for name in ("metrics.jsonl", "control/metrics.jsonl"):
        rows, whole = metrics(found / name), metrics(expected / name)
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(STEPS)), name
        evaluated = [row["step"] for row in rows if row["kind"] == "evaluation"]
        assert evaluated == list(range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY))
        assert rows == whole, name
    results = [json.loads((run / "results.json").read_text()) for run in (found, expected)]
    assert results[0]["cross_entropy"] == results[1]["cross_entropy"]
    training = [json.loads((run / "training.json").read_text()) for run in (found, expected)]
    for key in ("tokens", "skipped_steps", "last_loss"):
        assert training[0][key] == training[1][key], key


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".recipe.toml.tmp"]])
def test_killed_while_it_claimed_its_directory(tmp_path: Path, left: list[str]) -> None:
    from ln_removal.files.run_directory import run_directory

    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        (out / name).write_text("na")
    with run_directory(out, 'name = "mine"\n', with_defaults=dict, resume=True):
        assert {path.name for path in out.iterdir()} == {".lock", "recipe.toml"}
        (out / "metrics.jsonl").write_text("a step")


@pytest.mark.slow
def test_killed_between_its_results_and_its_report(place: Path, forked: Commands, whole: Path) -> None:
    out = place / "unreported"
    shutil.copytree(whole, out, symlinks=True)
    (out / "report.html").unlink()
    (out / "model" / "README.md").unlink()
    results = (out / "results.json").read_bytes()
    forked.run("ln-remove", *arguments(place, out, "--resume"))
    assert files(out) == files(whole)
    assert (out / "results.json").read_bytes() == results, "nothing was measured again"


@pytest.mark.slow
def test_killed_twenty_times_it_ends_where_it_would_have(place: Path, forked: Commands, whole: Path) -> None:
    hit: Counter[str] = Counter()
    for attempt in range(8):  # a phase of milliseconds is missed in about every third attempt
        draw = random.Random(attempt)
        out = place / f"killed-{attempt}"
        died: list[str] = []
        for number, target in enumerate(targets(draw)):
            given = arguments(place, out, *(["--resume"] if number else []))
            real = attempt == 0 and number in REAL_PROCESSES
            command = RealCommand(place, *given) if real else forked.start("ln-remove", *given)
            where = kill_in(target, command, out, draw)
            assert where is not None, f"it ended before it came to {target}, after {died}: {command.said()}"
            died.append(where)
        assert len(died) == 20
        forked.run("ln-remove", *arguments(place, out, "--resume"))
        assert_same_run(out, whole)
        hit.update(died)
        print(f"killed in: {died}")
        if set(hit) >= MUST_BE_HIT:
            break
    assert set(hit) >= MUST_BE_HIT, hit
