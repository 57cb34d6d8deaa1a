"""Two processes train one model and one of them goes: torchrun ends the other, and the run goes on later.

torchrun runs where it has something to end; elsewhere the two are forked as ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Commands, environment
from safetensors.torch import load_file
from small_model import write_corpus, write_model

STEPS = 60
SETTINGS = {
    "data.context": 32,
    "data.weights": "{}",
    "data.validation_tokens": 512,
    "training.tokens_per_step": 128,
    "training.evaluate_every": 1000,
    "training.checkpoint_every": 10,
    "training.precision": "float32",
    "training.compile": "false",
    "export.formats": '["normfree"]',
}
ENDS_WITHIN = 60.0
"""Seconds. torchrun gives a process 30 between SIGTERM and SIGKILL."""

pytestmark = pytest.mark.slow


def arguments(out: str, *options: str) -> list[str]:
    given = ["--model", "model", "--recipe", "tiny", "--steps", str(STEPS), "--tokens", "tokens", "--device", "cpu"]
    given += ["--questions", "none", "--out", out, *options]
    return given + [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]


def start(directory: Path, out: str) -> subprocess.Popen[str]:
    """`ln-remove` on two processes under torchrun; what they print goes into a file beside the run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (directory / f"{out}.log").open("w") as log:
        return subprocess.Popen(
            [*launch, "-m", "ln_removal.cli.remove", *arguments(out)],
            cwd=directory,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
        )


def said(directory: Path, out: str) -> str:
    return (directory / f"{out}.log").read_text()


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of the ranks, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        entries = Path(f"/proc/{child}/environ").read_text().split("\0")
        found |= {int(entry.removeprefix("RANK=")): int(child) for entry in entries if entry.startswith("RANK=")}
    return found


def wait_for_checkpoint(directory: Path, out: str, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not list((directory / out / "state").glob("step-*")):
        assert launcher.poll() is None, said(directory, out)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def steps(directory: Path) -> list[int]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forked: Commands) -> Path:
    """A model, its tokens, and a run of two processes that nothing happened to."""
    directory = tmp_path_factory.mktemp("ranks")
    write_model(directory / "model")
    write_corpus(directory / "texts")
    moved = forked.at(directory)
    moved.run("ln-prepare", "texts", "--tokenizer", "model", "--out", "tokens")
    moved.run_ranks(2, "ln-remove", *arguments("whole"))
    return directory


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Filled by the test; what still runs at its end is stopped, by torchrun with its ranks."""
    launchers: list[subprocess.Popen[str]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.terminate()
        launcher.wait(ENDS_WITHIN)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_rank_ends_and_the_run_goes_on(
    place: Path, forked: Commands, launched: list[subprocess.Popen[str]], killed: int
) -> None:
    out = f"killed-{killed}"
    launcher = start(place, out)
    launched.append(launcher)
    wait_for_checkpoint(place, out, launcher)
    ranks = ranks_of(launcher)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[killed], signal.SIGKILL)
    assert launcher.wait(ENDS_WITHIN) != 0
    assert not Path(f"/proc/{ranks[1 - killed]}").exists()
    assert steps(place / out)[-1] < STEPS - 1, "it was killed while it trained"
    shutil.copytree(place / out, place / f"{out}-alone", symlinks=True)
    forked.at(place).run_ranks(2, "ln-remove", *arguments(out, "--resume"))
    forked.at(place).run("ln-remove", *arguments(f"{out}-alone", "--resume"))
    expected = weights(place / "whole")
    for name, tensor in weights(place / out).items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in weights(place / f"{out}-alone").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    assert steps(place / out) == steps(place / f"{out}-alone") == list(range(STEPS))


def test_a_mistake_that_one_process_finds_ends_all(place: Path, launched: list[subprocess.Popen[str]]) -> None:
    launched.append(start(place, "whole"))  # it is there already, which only the main process looks for
    assert launched[0].wait(300) != 0
    assert said(place, "whole").count("error: whole already holds a run") == 1


def test_two_that_diverge_go_back_together(place: Path, forked: Commands) -> None:
    options = ("--set", "training.learning_rate=1e30")
    ranks = forked.at(place).start_ranks(2, "ln-remove", *arguments("diverged", *options))
    assert [rank.wait(120) for rank in ranks] == [2, 2]
    words = ranks[0].said()
    assert "not finite for 3 steps in a row" in words and "--resume and --set training.learning_rate=5e+29" in words
    rows = list(map(json.loads, (place / "diverged" / "metrics.jsonl").read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["windows", "rollback"] and rows[1]["step"] == 0
