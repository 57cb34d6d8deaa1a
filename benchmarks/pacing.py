"""Contestants in processes of their own, paced by one parent: warm up, wait, run a sample, wait, ...

Each contestant imports what it needs and waits until the parent says "warm". Then it trains in its own way and calls
`Pace.steps_done` at step boundaries. After the warm-up it stops there until the parent says "go", so contestants that stay in
memory take turns, sample by sample, and a change of the machine's speed hits them alike. Where several parents share a device,
a file is locked in each sample, and in each warm-up from the end of the first step on, which compiles. Messages are JSON lines: the
contestant's standard output (its prints go to standard error) and its standard input.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from measuring import peak_memory, reset_peak_memory


class Finished(Exception):
    """The parent wants no more samples."""


class Pace:
    """The contestant's end."""

    def __init__(self) -> None:
        self._reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # What a library prints must not mix with the reports.
        self.settings: dict[str, Any] = json.loads(sys.argv[1])
        if sys.stdin.readline().strip() != "warm":
            raise SystemExit("not wanted any more")
        self._turn = ExitStack()
        if self.settings.get("turns"):
            self._take_turn_after_first_step(Path(self.settings["turns"]))
        self._started = time.perf_counter()
        self._began: float | None = None
        self._steps = 0
        self.details: dict[str, Any] = {}
        """Sent with the report that the warm-up is over."""

    def steps_done(self, count: int = 1) -> None:
        """Call at every step boundary, or after each `count` steps.

        Raises:
            Finished: stop training.
        """
        self._steps += count
        if self._began is None and self._steps < self.settings["warmup_steps"]:
            return
        if self._began is not None and self._steps < self.settings["sample_steps"]:
            return
        synchronise()
        now = time.perf_counter()
        self._turn.close()
        if self._began is None:
            self._send({"event": "ready", "seconds": now - self._started, "details": self.details})
        else:
            self._send(
                {
                    "event": "sample",
                    "seconds": now - self._began,
                    "steps": self._steps,
                    "peak_memory": peak_memory(),
                    **self.details,
                }
            )
        command = sys.stdin.readline().strip()
        if command != "go":
            raise Finished
        if self._began is None:
            reset_peak_memory()
        self._steps = 0
        self._began = time.perf_counter()

    def _take_turn_after_first_step(self, path: Path) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def take_turn(*_: Any) -> None:
            hook.remove()
            self._turn.enter_context(locked(path))

        hook = register_optimizer_step_post_hook(take_turn)

    def close(self) -> None:
        """Send the last report. Call once training has stopped."""
        self._send({"event": "end", "peak_memory": peak_memory(), "details": self.details})

    def out_of_memory(self) -> None:
        """Tell the parent that the micro-batch did not fit."""
        self._send({"event": "out of memory"})

    def _send(self, message: dict[str, Any]) -> None:
        self._reports.write(json.dumps(message) + "\n")
        self._reports.flush()


class Contestant:
    """The parent's end.

    Args:
        name: in results.
        script: the Python file to run.
        settings: passed to it.
        environment: added to this process's.
        turns: the file to lock.
        waits: for the word "warm"; one of version 0.3 and before does not.
    """

    def __init__(
        self,
        name: str,
        script: Path,
        settings: dict[str, Any],
        environment: dict[str, str],
        turns: Path | None = None,
        *,
        waits: bool = True,
    ) -> None:
        self.name = name
        self.settings = settings
        self.samples: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.error: str | None = None
        self.ran_out_of_memory = False
        self._turns = turns
        self._warming = not waits
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed with us
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings | ({"turns": str(turns)} if turns else {}))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
        )

    @property
    def alive(self) -> bool:
        """Whether it can still give samples."""
        return self.error is None and not self.ran_out_of_memory and not self.end

    def warm_up(self) -> None:
        """Let it begin its warm-up, if it has not."""
        if not self._warming:
            self._warming = True
            self._say("warm")

    def wait_until_ready(self, limit: float) -> None:
        """Wait for the end of the warm-up, at most `limit` seconds."""
        self.warm_up()
        self.ready = self._receive(limit) or {}

    def sample(self, limit: float) -> dict[str, Any] | None:
        """Run one sample; None when the contestant failed."""
        with locked(self._turns):
            self._say("go")
            found = self._receive(limit)
        if found is not None:
            self.samples.append(found)
        return found

    def stop(self) -> None:
        """End the process; afterwards `end` holds its last report, or `error` why there is none."""
        if self.alive:
            self._say("stop")
            self.end = (self._receive(120) or {}) if self._warming else {}
        self._process.kill() if self._process.poll() is None and self.error else None
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_receive` finds out why.

    def _receive(self, limit: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        watchdog = threading.Timer(limit, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = "\n".join(self._log.read().strip().splitlines()[-12:])
            over = f" after {limit:.0f} s" if code == -9 else ""
            self.error = f"ended with {code}{over}:\n{tail}"
            return None
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "out of memory":
            self.ran_out_of_memory = True
            return None
        return message


@contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold the lock of a file; None: there is no lock."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def synchronise() -> None:
    """Wait until a GPU, if there is one, has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
