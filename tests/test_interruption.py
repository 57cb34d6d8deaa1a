"""Ctrl-C and SIGTERM: what is being done is finished and saved, one line says what to type next, and typing that goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import Commands, code_of, environment
from small_model import write_corpus, write_model
from typer.testing import CliRunner

from ln_removal.cli.console import build
from ln_removal.files.signals import Interrupted, StopRequest, deferred, stoppable

STEPS = 60
SETTINGS = {
    "data.context": "32",
    "data.weights": "{}",
    "data.validation_tokens": "512",
    "training.tokens_per_step": "128",
    "training.evaluate_every": "1000",
    "training.evaluation_tokens": "512",
    "training.checkpoint_every": "1000",
    "training.precision": "float32",
    "training.compile": "false",
}

# ---------------------------------------------------------------------------------------------------------- the handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with deferred("step") as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop and stop.signal == number
            signal.raise_signal(number)
            pytest.fail("the second one has to stop at once")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.exit_code == 128 + number
    assert capfd.readouterr().err.count("\n") == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_request_that_nobody_honoured_is_raised_at_the_end() -> None:
    with pytest.raises(Interrupted), deferred("step"):
        signal.raise_signal(signal.SIGINT)


def test_an_error_of_the_block_comes_first() -> None:
    def work() -> None:
        with deferred("step"):
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("the disk")

    with pytest.raises(RuntimeError, match="the disk"):
        work()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred("step") as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[object] = []

    def work() -> None:
        with deferred("step") as stop, stoppable():
            found.append((bool(stop), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_one_ctrl_c_that_reaches_a_rank_twice_is_one() -> None:
    def work() -> None:
        with deferred("step", ranks=2) as stop:
            signal.raise_signal(signal.SIGINT)  # from the terminal
            signal.raise_signal(signal.SIGTERM)  # and from torchrun
            assert stop.signal == signal.SIGINT

    with pytest.raises(Interrupted):
        work()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)])
def test_a_command_that_is_interrupted_says_one_line(raised: BaseException, code: int) -> None:
    def evaluate_hellaswag(model: str) -> None:
        raise raised

    stopped = CliRunner().invoke(build(evaluate_hellaswag), ["tiny"])
    assert stopped.exit_code == code and stopped.stderr.count("\n") == 1
    assert stopped.stderr.startswith("stopped by ") and stopped.stderr.endswith(": evaluate-hellaswag tiny\n")


class InDestructor:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def in_weak_reference() -> None:
    thing = StopRequest()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


def in_generator() -> None:
    def numbers() -> Iterator[int]:
        try:
            yield 1
        finally:
            signal.raise_signal(signal.SIGINT)

    next(numbers())  # and the rest of it is thrown away


@pytest.mark.parametrize("interrupt", [InDestructor, in_weak_reference, in_generator])
def test_a_signal_in_a_place_where_python_drops_exceptions_is_not_lost(interrupt: Callable[[], object]) -> None:
    went_on = []

    def evaluate_hellaswag(model: str) -> None:
        interrupt()
        time.sleep(20)  # it is interrupted here, well before the end
        went_on.append(model)

    hook = sys.unraisablehook
    stopped = CliRunner().invoke(build(evaluate_hellaswag), ["tiny"])
    assert stopped.exit_code == 130 and not went_on
    assert stopped.stderr == "stopped by Ctrl-C; to start again: evaluate-hellaswag tiny\n"
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("trains", [False, True])
def test_a_signal_that_other_code_swallows_is_not_lost(trains: bool) -> None:
    went_on = []

    def evaluate_hellaswag(model: str) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # noqa: BLE001 (as some packages have it)
            went_on.append("swallowed")
        if trains:
            with deferred("step"):
                went_on.append("trained")

    stopped = CliRunner().invoke(build(evaluate_hellaswag), ["tiny"])
    assert stopped.exit_code == 143 and went_on == ["swallowed"]
    assert stopped.stderr == "stopped by SIGTERM; to start again: evaluate-hellaswag tiny\n"


# -------------------------------------------------------------------------------------------------------- whole commands


def arguments(out: str, *more: str, **changes: str) -> list[str]:
    sets = [part for key, value in (SETTINGS | changes).items() for part in ("--set", f"{key}={value}")]
    given = f"--model model --recipe tiny --tokens tokens --out {out} --control --steps {STEPS}"
    return [*given.split(), "--questions", "none", "--device", "cpu", *sets, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("a place")
    write_model(directory / "model")
    write_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="module")
def forked(place: Path, forked: Commands) -> Commands:
    moved = forked.at(place)
    moved.run("ln-prepare", "corpus", "--tokenizer", "model", "--out", "tokens")
    return moved


def last_line(said: str, *, asks: bool) -> str:
    """The line about the stop; above it only the one that says what comes first, and progress."""
    lines = said.splitlines()
    assert "Traceback" not in said and "Exception" not in said, said
    assert ("a second signal stops at once" in said) == asks, said
    assert said.endswith("\n") and lines[-1].startswith("stopped by "), said
    return lines[-1]


def to_type(line: str) -> list[str]:
    """The command that a line says to type."""
    return shlex.split("ln-" + line.partition(": ln-")[2])


def weights(run: Path) -> dict[str, bytes]:
    return {name: (run / name / "model.safetensors").read_bytes() for name in ("model", "stock", "control/model")}


@pytest.fixture(scope="module")
def whole(place: Path, forked: Commands) -> dict[str, bytes]:
    forked.run("ln-remove", *arguments("whole"))
    return weights(place / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_removal_saves_its_step_and_goes_on_from_it(
    place: Path, forked: Commands, whole: dict[str, bytes], number: int, code: int
) -> None:
    out = place / f"removal-{code}"
    command = forked.start("ln-remove", *arguments(out.name))
    metrics = out / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and b'"train"' in metrics.read_bytes()).send(number)
    assert command.wait() == code
    line = last_line(command.said(), asks=True)
    (saved,) = (out / "state").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert 0 < step < STEPS
    assert f"step {step} of {STEPS}" in line and f"{out.name}/state" in line
    assert to_type(line) == ["ln-remove", *arguments(out.name, "--resume")]
    forked.run(*to_type(line))
    assert weights(out) == whole
    rows = [json.loads(row) for row in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(STEPS))


@pytest.mark.slow
def test_a_control_saves_its_step_and_goes_on_from_it(place: Path, forked: Commands, whole: dict[str, bytes]) -> None:
    out = place / "control"
    command = forked.start("ln-remove", *arguments(out.name))
    metrics = out / "control" / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0).send(signal.SIGINT)
    assert command.wait() == 130
    line = last_line(command.said(), asks=True)
    assert "control/control/state" in line
    forked.run(*to_type(line))
    assert weights(out) == whole


@pytest.mark.slow
def test_outside_of_the_training_it_says_what_is_kept(place: Path, forked: Commands) -> None:
    out = place / "scored"
    # All validation tokens are scored, so that there is time to send a signal even on a busy machine.
    command = forked.start("ln-remove", *arguments(out.name, **{"data.validation_tokens": "100000"}))
    command.wait_until(lambda: (out / "control" / "model").exists()).send(signal.SIGINT)
    assert command.wait() == 130, command.said()
    assert not (out / "results.json").exists()
    line = last_line(command.said(), asks=False)
    assert "scored/model" in line and "scored/control/model" in line
    forked.run(*to_type(line))
    assert (out / "results.json").exists()


@pytest.mark.slow
def test_before_anything_was_done_nothing_is_kept(place: Path, forked: Commands) -> None:
    out = place / "nothing"
    command = forked.start("ln-remove", *arguments(out.name))
    command.wait_until(lambda: (out / "recipe.toml").exists()).send(signal.SIGTERM)
    assert command.wait() == 143
    line = last_line(command.said(), asks=False)
    assert to_type(line) == ["ln-remove", *arguments(out.name)]
    assert not out.exists()


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(place: Path, forked: Commands) -> None:
    out = place / "twice"
    many = {"training.tokens_per_step": str(32 * 40_000), "training.micro_batch": "64"}  # a step takes a minute or more
    command = forked.start("ln-remove", *arguments(out.name, **many))
    command.wait_until(lambda: (out / "metrics.jsonl").exists())
    time.sleep(1)
    command.send(signal.SIGINT)
    command.wait_until(lambda: "a second signal" in command.said())
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert last_line(command.said(), asks=True).startswith("stopped by Ctrl-C")


@pytest.mark.slow
def test_a_pretraining_saves_its_step(place: Path, forked: Commands) -> None:
    out = place / "pretrained"
    sets = {"data.context": "32", "data.weights": "{}", "data.tokenizer": "model", "architecture.n_layer": "1"}
    sets |= {"architecture.n_embd": "32", "architecture.n_head": "2", "architecture.n_positions": "64"}
    sets |= {"architecture.vocab_size": "320", "training.tokens_per_step": "128", "training.precision": "float32"}
    sets |= {"training.compile": "false", "training.checkpoint_every": "1000", "training.evaluate_every": "1000"}
    sets |= {"training.micro_batch": "auto"}
    given = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    given = [*f"--recipe tiny-gpt2 --tokens tokens --steps 40 --out {out.name} --device cpu".split(), *given]
    command = forked.start("ln-pretrain", *given)
    metrics = out / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0).send(signal.SIGINT)
    assert command.wait() == 130
    line = last_line(command.said(), asks=True)
    assert to_type(line) == ["ln-pretrain", *given, "--resume"]
    assert " of 40 " in line and "pretrained/state" in line
    forked.run(*to_type(line))
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_preparation_keeps_its_tokens(place: Path, forked: Commands) -> None:
    lines = "".join(f"def function_{n}(value):\n    return value * {n % 97} + {n}\n\n" for n in range(50_000))
    (place / "long.txt").write_text(lines)
    given = ["long.txt", "--tokenizer", "model", "--out", "long"]
    command = forked.start("ln-prepare", *given)
    command.wait_until(lambda: any(path.stat().st_size for path in place.glob("long/train-*.bin"))).send(signal.SIGINT)
    assert command.wait() == 130
    line = last_line(command.said(), asks=True)
    assert to_type(line) == ["ln-prepare", *given]
    kept = json.loads((place / "long" / "progress.json").read_text())
    assert kept["consumed"] > 0 and not (place / "long" / "index.json").exists()
    forked.run(*to_type(line))
    forked.run("ln-prepare", "long.txt", "--tokenizer", "model", "--out", "undisturbed")
    for shard in (place / "undisturbed").glob("*.bin"):
        assert (place / "long" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 1.5])
def test_an_evaluation_has_nothing_to_save(place: Path, forked: Commands, seconds: float) -> None:
    command = forked.start("evaluate-hellaswag", "tiny", "--device", "cpu")
    time.sleep(seconds)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert last_line(command.said(), asks=False).endswith(": evaluate-hellaswag tiny --device cpu")


@pytest.mark.slow
def test_the_terminal_is_left_clean(place: Path, forked: Commands) -> None:
    """The command as a user starts it, with a progress bar on a terminal."""
    out = place / "terminal"
    screen, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code_of("ln-remove"), *arguments(out.name, **{"training.checkpoint_every": "5"})],
        cwd=place,
        env=environment(),
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(screen, 4096))
            except OSError:  # nobody has the other end any more
                return

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 120
    while not list(out.glob("state/step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    reader.join()
    os.close(screen)
    text = b"".join(shown).decode()
    assert "Traceback" not in text
    assert "removal" in text and "%|" in text, "there was a bar"
    *before, line, after = text.split("\r\n")
    assert after == ""
    assert line.startswith("stopped by Ctrl-C: step "), "it stands at the beginning of a line of its own"
    (asked,) = [each for each in before if "a second signal stops at once" in each]
    assert asked.rpartition("\x1b[K")[2] == "Ctrl-C: stopping after this step; a second signal stops at once"


# --------------------------------------------------------------------------------------------------------- several ranks


def test_ranks_agree_where_they_may_wait_for_each_other() -> None:
    alone = SimpleNamespace(num_processes=1)
    # The other of two ranks was asked with SIGTERM.
    both = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda mine, reduction: mine + mine.new_tensor([0, 1]))
    stop = StopRequest()
    assert not stop.agreed(alone, together=True) and not stop.agreed(both, together=False)
    assert stop.agreed(both, together=True)
    assert stop.signal == signal.SIGTERM
    assert stop.agreed(alone, together=False)


def test_a_signal_that_comes_while_the_ranks_wait_for_each_other_counts_the_next_time() -> None:
    stop = StopRequest()

    def reduce(mine: torch.Tensor, reduction: str) -> torch.Tensor:
        stop.ask(signal.SIGINT)
        return mine

    ranks = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)
    assert not stop.agreed(ranks, together=True), "the other rank knows nothing of it"
    assert stop.agreed(ranks, together=True)


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(place: Path, forked: Commands) -> None:
    out = place / "ranks"
    ranks = forked.start_ranks(2, "ln-remove", *arguments(out.name, "--steps", "400"))
    metrics = out / "metrics.jsonl"
    ranks[0].wait_until(lambda: metrics.exists() and b'"train"' in metrics.read_bytes())
    ranks[1].send(signal.SIGINT)  # the other one hears of it at the next log step
    codes = [rank.wait(120) for rank in ranks]
    said = [rank.said() for rank in ranks]
    assert codes == [130, 130], said
    (saved,) = (out / "state").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert step % 10 == 0
    assert not any("Traceback" in each for each in said), said
    assert f"step {step:,} of 400" in said[0].splitlines()[-1] and "--resume" in said[0].splitlines()[-1]
    assert "stopped by" not in said[1]
