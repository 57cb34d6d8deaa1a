"""Two processes train one model and one of them goes: the other stops soon, says so in a line, and the run goes on later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_model import write_corpus, write_model

from ln_removal.errors import UserError
from ln_removal.training import ranks

STEPS = 60
COMMAND = "from ln_removal.cli.remove import main; main()"
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
Ranks = list[subprocess.Popen[str]]


def start(directory: Path, out: str, count: int, *options: str, code: str = COMMAND) -> Ranks:
    """`ln-remove` on `count` processes, as a launcher on a cluster starts them: with nothing that watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", "model", "--recipe", "tiny", "--steps", str(STEPS), "--tokens", "tokens", "--device", "cpu"]
    arguments += ["--questions", "none", "--out", out, *options]
    for key, value in SETTINGS.items():
        arguments += ["--set", f"{key}={value}"]
    found = []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        launched = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | {
            key: str(value) for key, value in launched.items()
        }
        log = (directory / f"{out}-{rank}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=directory,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
        )
        log.close()
        found.append(process)
    return found


def said(directory: Path, out: str, rank: int) -> str:
    return (directory / f"{out}-{rank}.log").read_text()


def finish(directory: Path, out: str, processes: Ranks) -> None:
    for rank, process in enumerate(processes):
        assert process.wait(300) == 0, said(directory, out, rank)


def wait_for_checkpoint(directory: Path, out: str, processes: Ranks) -> None:
    deadline = time.monotonic() + 200
    while not list((directory / out / "state").glob("step-*")):
        assert all(process.poll() is None for process in processes), said(directory, out, 0) + said(directory, out, 1)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def steps(directory: Path) -> list[int]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokens, and a run of two processes that nothing happened to."""
    directory = tmp_path_factory.mktemp("ranks")
    write_model(directory / "model")
    write_corpus(directory / "texts")
    prepare = "from ln_removal.cli.prepare import main; main()"
    arguments = ["texts", "--tokenizer", "model", "--out", "tokens"]
    subprocess.run([sys.executable, "-c", prepare, *arguments], cwd=directory, check=True, capture_output=True)
    finish(directory, "whole", start(directory, "whole", 2))
    return directory


@pytest.fixture
def running(place: Path) -> Iterator[Ranks]:
    """Filled by the test; what still runs at its end is killed."""
    processes: Ranks = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_stops_and_the_run_goes_on(place: Path, running: Ranks, killed: int) -> None:
    out = f"killed-{killed}"
    running += start(place, out, 2)
    wait_for_checkpoint(place, out, running)
    running[killed].kill()
    began = time.monotonic()
    assert running[1 - killed].wait(60) == 2, said(place, out, 1 - killed)
    assert time.monotonic() - began < 60
    assert running[killed].wait() == -signal.SIGKILL
    words = said(place, out, 1 - killed)
    assert "Traceback" not in words
    assert [line for line in words.splitlines() if line.startswith("error:")] == [f"error: {ranks.GONE}"]
    shutil.copytree(place / out, place / f"{out}-alone", symlinks=True)
    finish(place, out, start(place, out, 2, "--resume"))
    finish(place, f"{out}-alone", start(place, f"{out}-alone", 1, "--resume"))
    expected = weights(place / "whole")
    for name, tensor in weights(place / out).items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in weights(place / f"{out}-alone").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    assert steps(place / out) == steps(place / f"{out}-alone") == list(range(STEPS))


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed_too(place: Path, running: Ranks) -> None:
    code = f"from ln_removal.training import ranks\nranks.BEAT_SECONDS, ranks.SILENT_BEATS, ranks.GRACE_SECONDS = 0.5, 8, 2\n{COMMAND}"
    running += start(place, "hangs", 2, code=code)
    wait_for_checkpoint(place, "hangs", running)
    running[1].send_signal(signal.SIGSTOP)  # as a machine that is gone: its connections stay open
    assert running[0].wait(60) == 2, said(place, "hangs", 0)
    assert f"error: {ranks.GONE}" in said(place, "hangs", 0)
    assert "Traceback" not in said(place, "hangs", 0)


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_stops_all(place: Path, running: Ranks) -> None:
    running += start(place, "whole", 2)  # it is there already, which the main process finds
    assert [process.wait(60) for process in running] == [2, 2]
    assert "error: whole already holds a run" in said(place, "whole", 0)
    assert f"error: {ranks.GONE}" in said(place, "whole", 1)
    assert "Traceback" not in said(place, "whole", 0) + said(place, "whole", 1)


@pytest.mark.slow
def test_two_that_diverge_go_back_together(place: Path, running: Ranks) -> None:
    running += start(place, "diverged", 2, "--set", "training.learning_rate=1e30")
    assert [process.wait(120) for process in running] == [2, 2]
    for rank in (0, 1):
        words = said(place, "diverged", rank)
        assert "Traceback" not in words and ranks.GONE not in words
        assert "not finite for 3 steps in a row" in words and "--resume and --set training.learning_rate=5e+29" in words
    rows = list(map(json.loads, (place / "diverged" / "metrics.jsonl").read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["rollback"] and rows[0]["step"] == 0


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234", True),
        ("[gloo/transport/tcp/buffer.cc:72] Timed out waiting 10800000ms for send operation to complete", True),
        (
            "NCCL error: remote process exited or there was a network error, NCCL version 2.27.3\nncclRemoteError: ...",
            True,
        ),
        ("failed to recv, got 0 bytes", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_what_is_a_lost_process_and_what_a_mistake(
    monkeypatch: pytest.MonkeyPatch, message: str, is_lost: bool
) -> None:
    monkeypatch.setattr(ranks, "_connections", lambda rank, count: [])
    monkeypatch.setattr(ranks._Watch, "saw_loss", lambda self: False)

    class Two:
        num_processes, process_index = 2, 0

    accelerator: Any = Two()
    with pytest.raises(UserError if is_lost else RuntimeError) as caught, ranks.watched_ranks(accelerator):
        raise RuntimeError(message)
    assert isinstance(caught.value, UserError) == is_lost
