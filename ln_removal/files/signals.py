"""Ctrl-C and SIGTERM: training and preparing finish their step or batch and save it, everything else stops at once.

This module imports nothing heavy, because every command imports it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ONE_REQUEST_SECONDS = 3.0
"""Each of several ranks gets a Ctrl-C from the terminal and, within this time, the same signal again from torchrun."""

SENT_AGAIN_SECONDS = 0.02
"""A signal whose exception was dropped is sent again after this time."""

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


_commands: list[StopRequest] = []
"""What the running command was asked to do. One that goes on although it was asked to stop has lost the exception."""


class Interrupted(KeyboardInterrupt):
    """Stopped from outside, with a clear state left behind.

    A KeyboardInterrupt, so that an `except Exception` around a run does not swallow it, and a notebook shows it as one.

    Attributes:
        signal: what stopped it.
        kept: what is saved, as a sentence without a full stop; empty when there is nothing to say.
        resume: whether --resume goes on from there; None when the place that raised this does not know.
    """

    def __init__(self, number: int = signal.SIGINT, kept: str = "", *, resume: bool | None = None) -> None:
        self.signal = signal.Signals(number)
        self.kept = kept
        self.resume = resume
        super().__init__(f"stopped by {self.cause}" + (f": {kept}" if kept else ""))

    @property
    def cause(self) -> str:
        """The signal in a user's words."""
        return _NAMES.get(self.signal, self.signal.name)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


class StopRequest:
    """Whether a stop was asked for, and by which `signal`; None before that."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, number: int) -> None:
        """Note a request; a later one changes nothing."""
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()

    def seconds(self) -> float:
        """Since the request."""
        return time.monotonic() - self._since

    def agreed(self, accelerator: Accelerator, *, together: bool) -> bool:
        """Whether to stop after this step: the same answer on every rank.

        Args:
            accelerator: knows the ranks. A single rank looks at its own flag and waits for nobody.
            together: this is a step, the same on all ranks, at which several may wait for each other.
        """
        if accelerator.num_processes == 1:
            return bool(self)
        if not together:
            return False
        import torch

        mine = torch.tensor([float(self.signal == number) for number in SIGNALS], device=accelerator.device)
        asked: Any = accelerator.reduce(mine, reduction="sum")
        counts = asked.tolist()
        for number, count in zip(SIGNALS, counts, strict=True):
            if count:
                self.ask(number)
        return any(counts)  # not bool(self): a signal may have come since

    def interrupted(self, kept: str) -> Interrupted:
        """What to raise once everything is saved."""
        return Interrupted(self.signal or signal.SIGINT, kept)


@contextmanager
def deferred(unit: str, *, ranks: int = 1, speak: bool = True) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request, which the block has to honour; the second one is raised at once.

    In a thread other than the main one nothing changes: signals do not come there. A signal that is ignored stays ignored.

    Args:
        unit: what will be finished first, for the line that says so: "step".
        ranks: processes that train together.
        speak: print that line.

    Raises:
        Interrupted: there was a second signal, the block ended without having honoured the first, or there was one before it
            that was lost (see `stoppable`).
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    for command in _commands:
        if command:
            raise command.interrupted("")

    def handle(number: int, frame: FrameType | None) -> None:
        if request and (ranks == 1 or request.seconds() > ONE_REQUEST_SECONDS):
            raise Interrupted(number)
        if speak and not request:
            _say(f"{_NAMES[signal.Signals(number)]}: stopping after this {unit}; a second signal stops at once")
        request.ask(number)

    with _handlers(handle, SIGNALS):
        yield request
    if request:
        raise request.interrupted("")


@contextmanager
def stoppable() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM raise Interrupted wherever a command is, so that what is half-done is cleared away.

    Python drops an exception that is raised in a destructor, in the callback of a weak reference or in a generator that is
    thrown away. The signal is then sent once more. If other code swallows the exception, it is raised again where the next
    `deferred` begins, or at the end of the block. In a thread other than the main one nothing changes.

    Raises:
        Interrupted: there was a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    request, resent, hook_before = StopRequest(), list[threading.Timer](), sys.unraisablehook

    def handle(number: int, frame: FrameType | None) -> None:
        request.ask(number)
        raise Interrupted(number)

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            hook_before(dropped)
            return
        # Not at once: the destructor has not ended, and what is raised here would be dropped too.
        resent.append(threading.Timer(SENT_AGAIN_SECONDS, os.kill, (os.getpid(), request.signal or signal.SIGINT)))
        resent[-1].daemon = True
        resent[-1].start()

    _commands.append(request)
    sys.unraisablehook = hook
    try:
        with _handlers(handle, SIGNALS):
            try:
                yield
            finally:
                for timer in resent:
                    timer.cancel()
    finally:
        sys.unraisablehook = hook_before
        _commands.remove(request)
    if request:
        raise request.interrupted("")


@contextmanager
def _handlers(handle: Any, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    # None: a handler that was not set by Python, which cannot be put back.
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _say(line: str) -> None:
    """Print a line from a signal handler, which may not use a stream that its own thread is in the middle of writing to."""
    clear = "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""  # a progress bar may stand there
    os.write(2, f"{clear}{line}\n".encode())
