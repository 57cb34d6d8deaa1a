"""Several processes that train one model: when one is gone, the others stop with one clear line and do not wait for hours.

Every rank keeps a TCP connection with the main process, apart from those of gloo or NCCL. The system closes it when a process
ends, however it ends; a byte now and then shows a machine that is gone without a word. Gloo also fails by itself in the next
collective, and that error is put into words here. NCCL may hang in it, where Python cannot reach: then the process is ended.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ln_removal.errors import DivergedError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

BEAT_SECONDS = 5.0
SILENT_BEATS = 60
"""Beats without a byte after which a process counts as gone: five minutes, since a live one may hold its interpreter."""

GRACE_SECONDS = 20.0
"""For a process to stop by itself, with its own error, once another is gone."""

CONNECT_SECONDS = 60.0

GONE = (
    "another process of this training is gone: it was killed (out of memory?), its machine is down, or it stopped with an error of "
    "its own above; what was saved is intact, so start the same command with --resume, with as many processes as you like"
)

_BEAT, _GOODBYE = b".", b"!"
_LOST_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout|error)|failed to (recv|send)"
    r"|timed out waiting \d+ ?ms|remote process (has )?exited|ncclremoteerror|ncclsystemerror",
    re.IGNORECASE,
)

logger = logging.getLogger(__name__)


@contextmanager
def watched_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Run the block, in which the ranks work together, and stop it when one of the others is gone.

    Every rank has to enter it; with one rank it does nothing. A rank that leaves it without an error may be gone.

    Raises:
        UserError: another rank is gone. Where the block does not end by itself within GRACE_SECONDS (it hangs in NCCL, or is
            at something long), the process is ended with that line and exit code 2.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch: _Watch | None = None
    try:
        watch = _Watch(accelerator.process_index, accelerator.num_processes)
        yield
        watch.end(goodbye=True)
    except DivergedError:  # all of them raise it, and none is gone
        if watch is not None:
            watch.end(goodbye=True)
        raise
    except RuntimeError as error:
        if _is_lost_connection(error) or (watch is not None and watch.saw_loss()):
            raise UserError(GONE) from error
        raise
    finally:
        if watch is not None:
            watch.end(goodbye=False)


class _Watch:
    """A thread that listens to the main process, or as the main process to all others."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._ended, self._lost = threading.Event(), threading.Event()
        self._peers = _connections(rank, ranks)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def saw_loss(self) -> bool:
        """Whether another rank is gone. A collective may fail a moment before its connection here closes."""
        return self._lost.wait(1.0)

    def end(self, *, goodbye: bool) -> None:
        """Stop watching; without a goodbye the others count this process as gone. Only the first call counts."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            for peer in self._peers:
                with suppress(OSError):
                    if goodbye:
                        peer.sendall(_GOODBYE)
                    peer.shutdown(socket.SHUT_WR)
        self._thread.join(2 * BEAT_SECONDS)
        for peer in self._peers:
            peer.close()

    def _run(self) -> None:
        silent = dict.fromkeys(self._peers, 0)
        next_beat = time.monotonic()
        while silent and not self._ended.is_set():
            if time.monotonic() >= next_beat:
                # Counted, not timed: a process that was stopped with Ctrl-Z and goes on has missed nothing.
                next_beat = time.monotonic() + BEAT_SECONDS
                silent = {peer: beats + 1 for peer, beats in silent.items()}
                for peer in silent:
                    with suppress(OSError):  # the next read says so too
                        peer.send(_BEAT, socket.MSG_DONTWAIT)
            readable, _, _ = select.select(list(silent), [], [], min(1.0, BEAT_SECONDS))
            for peer in readable:
                said = _read(peer)
                if said == b"" and not self._ended.is_set():
                    self._stop_all()
                    return
                silent[peer] = 0
                if _GOODBYE in said:
                    del silent[peer]
            if any(beats > SILENT_BEATS for beats in silent.values()):
                self._stop_all()
                return

    def _stop_all(self) -> None:
        self._lost.set()
        if self._ended.wait(GRACE_SECONDS):
            return
        sys.stdout.flush()
        os.write(2, f"\nerror: {GONE}\n".encode())
        os._exit(2)


def _read(peer: socket.socket) -> bytes:
    """What a connection that has something to read says; nothing when it is closed."""
    try:
        return peer.recv(4096)
    except OSError:
        return b""


def _connections(rank: int, ranks: int) -> list[socket.socket]:
    """A connection with each rank for the main process, one with the main process for every other.

    A network that lets only the training's own ports through has none; then the backend alone notices a loss.
    """
    import torch.distributed

    host = os.environ.get("MASTER_ADDR", "localhost")  # what all the launchers set
    listener = _listener(host, ranks) if rank == 0 else None
    numbers = [0] * 17 if listener is None else [listener.getsockname()[1], *secrets.token_bytes(16)]
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    offer = torch.tensor(numbers, dtype=torch.int64, device=device)
    torch.distributed.broadcast(offer, src=0)
    port, *rest = offer.tolist()
    token = bytes(rest)
    try:
        if listener is None:
            peer = socket.create_connection((host, port), CONNECT_SECONDS)
            peer.sendall(token)
            peers = [peer]
        else:
            with listener:
                peers = _accepted(listener, ranks - 1, token)
    except OSError as error:
        logger.warning("the processes cannot watch each other (%s): a lost one may be noticed late", error)
        return []
    for peer in peers:
        peer.setblocking(True)
    return peers


def _listener(host: str, ranks: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=ranks)
    except OSError:  # not an address of this machine's own: behind a translation
        return socket.create_server(("", 0), backlog=ranks)


def _accepted(listener: socket.socket, count: int, token: bytes) -> list[socket.socket]:
    """The connections of `count` ranks, which know the token; others are turned away."""
    found: list[socket.socket] = []
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(found) < count:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = listener.accept()
        except OSError:
            for known in found:  # else they would take the close for a lost process
                with suppress(OSError):
                    known.sendall(_GOODBYE)
                known.close()
            raise
        peer.settimeout(5.0)
        with suppress(OSError):
            if secrets.compare_digest(peer.recv(len(token), socket.MSG_WAITALL), token):
                found.append(peer)
                continue
        peer.close()
    return found


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error of torch.distributed, or one that it caused, says that another process does not answer."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
