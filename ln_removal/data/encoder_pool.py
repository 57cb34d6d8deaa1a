"""Encode batches of documents on all cores, in order.

The first megabytes are encoded in this process: most corpora of a test or a trial end there. Then worker processes take over,
one a core, each an interpreter of its own that runs `work`. Not multiprocessing: a script that calls this library must not
be imported once more by each worker, and a fork would copy a process with running threads.
"""

from __future__ import annotations

import array
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, TypeVar

from ln_removal.data.encoding import Encoder

BYTES_ALONE = 8 << 20
"""Text encoded in this process before workers are started: about a second's work, several times what a start takes."""

BATCHES_A_WORKER = 2
"""Batches given to each worker and not yet taken back."""

MOST_WORKERS = 32
"""Beyond, the process that reads and writes cannot keep up."""

Batch = TypeVar("Batch")

_START = "import sys; sys.path[:] = {path!r}; from ln_removal.data.encoder_pool import work; work()"


class EncoderPool:
    """Use it as a context manager; leaving it ends the workers.

    Args:
        tokenizer_json, eot_token_id, dtype: as for `Encoder`.
        workers: how many; default: the cores of this process. 1 encodes everything in this process.
    """

    def __init__(self, tokenizer_json: str, *, eot_token_id: int, dtype: str, workers: int | None = None) -> None:
        self._setup = (tokenizer_json, str(eot_token_id), dtype)
        self._here = Encoder(tokenizer_json, eot_token_id=eot_token_id, dtype=dtype)
        self._count = min(MOST_WORKERS, _cores()) if workers is None else workers
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="encoder")

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def in_order(
        self, batches: Iterable[Batch], texts_of: Callable[[Batch], list[str]]
    ) -> Iterator[tuple[Batch, list[bytes]]]:
        """Every batch with the encoded documents of its texts (see `Encoder.encode`), in the order given.

        An error of `batches` is raised after the batches before it have been given out.
        """
        pending: deque[tuple[Batch, Future[list[bytes]]]] = deque()
        remaining = iter(batches)
        alone = 0
        failure: Exception | None = None
        while True:
            try:
                batch = next(remaining)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001  # raised below
                failure = error
                break
            texts = texts_of(batch)
            if self._count == 1 or alone < BYTES_ALONE:
                alone += sum(map(len, texts))
                yield batch, self._here.encode(texts)
                continue
            if not self._workers:
                self._start()
            pending.append((batch, self._threads.submit(self._encode, texts)))
            if len(pending) > BATCHES_A_WORKER * self._count:
                done, encoded = pending.popleft()
                yield done, encoded.result()
        for done, encoded in pending:
            yield done, encoded.result()
        if failure is not None:
            raise failure

    def _start(self) -> None:
        for _ in range(self._count):
            worker = _Worker(self._setup)
            self._workers.append(worker)
            self._idle.put(worker)

    def _encode(self, texts: list[str]) -> list[bytes]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that encodes; one request at a time."""

    def __init__(self, setup: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Each worker is one thread's work; threads of the library would only be in each other's way.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        self._answers = self._process.stdout
        self._put([part.encode() for part in setup])

    def encode(self, texts: list[str]) -> list[bytes]:
        """As `Encoder.encode`.

        Raises:
            RuntimeError: the process has ended.
        """
        self._put([text.encode() for text in texts])
        try:
            return _receive(self._answers)
        except EOFError:
            raise self._ended() from None

    def close(self) -> None:
        """End the process."""
        for pipe in (self._requests, self._answers):
            with suppress(BrokenPipeError):  # It has ended already, with something unsent in the buffer.
                pipe.close()
        self._process.wait()

    def _put(self, parts: list[bytes]) -> None:
        try:
            _send(self._requests, parts)
        except BrokenPipeError:
            # An OSError would be taken for one of writing the shards.
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"a process that encodes text ended with exit code {self._process.wait()}")


def work() -> None:
    """What a worker runs: encode what comes in on standard input until it is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides; it closes the pipe.
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer_json, eot_token_id, dtype = (part.decode() for part in _receive(requests))
        encoder = Encoder(tokenizer_json, eot_token_id=int(eot_token_id), dtype=dtype)
        while True:
            _send(answers, encoder.encode([part.decode() for part in _receive(requests)]))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # Nothing to flush to a pipe that nobody reads.


def _send(pipe: IO[bytes], parts: list[bytes]) -> None:
    """Number of parts and their lengths (unsigned 64-bit), then the parts."""
    sizes = array.array("Q", [len(parts), *map(len, parts)])
    pipe.write(sizes.tobytes() + b"".join(parts))
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    (count,) = struct.unpack("=Q", _exactly(pipe, 8))
    sizes = array.array("Q", _exactly(pipe, 8 * count))
    data = _exactly(pipe, sum(sizes))
    parts, start = [], 0
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return parts


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
