"""The commands, started three ways: in this process, forked from a process that has everything imported, or afresh.

A forked command is what runs for a user, from the entry point to the exit code, without the seconds that its imports take.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import select
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from click.testing import Result
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
"""Name of each command and its MODULE:FUNCTION."""

# What a command imports while it runs, besides this package; a child would have to import it each time.
IMPORTED = """
accelerate transformers transformers.models.gpt2.modeling_gpt2 transformers.models.gpt2.tokenization_gpt2
transformers.integrations.sdpa_attention torch.optim
""".split()


def environment(**changes: str) -> dict[str, str]:
    """Of a process that the tests start: offline, one thread, this checkout first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **changes}


def invoke(name: str, *arguments: str | Path) -> Result:
    """Run a command in this process. `name` may be a whole command line."""
    name, *words = shlex.split(name)
    app = importlib.import_module(SCRIPTS[name].partition(":")[0]).app
    return CliRunner().invoke(app, [*words, *map(str, arguments)], prog_name=name)


def done(name: str, *arguments: str | Path) -> Result:
    """The same; it has to end well."""
    result = invoke(name, *arguments)
    assert result.exit_code == 0, f"{name} {arguments}\n{result.output}\n{result.exception!r}"
    return result


def refused(name: str, *arguments: str | Path) -> str:
    """The same; it has to exit with 2 and one line on standard error, which is returned."""
    result = invoke(name, *arguments)
    assert result.exit_code == 2, f"{name} {arguments}\n{result.output}\n{result.exception!r}"
    assert result.stdout == "" and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    return result.stderr


def code_of(name: str) -> str:
    """Python code that is the command `name`."""
    module, _, function = SCRIPTS[name].partition(":")
    return f"from {module} import {function}; {function}()"


def run_code(code: str, *arguments: str) -> str:
    """What `code` printed in a Python of its own; it has to end well."""
    started = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@dataclass
class Command:
    """A forked command; `pid` is that of the process to send signals to."""

    pid: int
    errors: Path
    _answers: IO[bytes]
    _code: int | None = None

    def send(self, number: int) -> None:
        """Send a signal, unless `wait` has returned: from the next command on the pid may be another process's."""
        if self._code is None:
            os.kill(self.pid, number)  # one that has ended is a zombie until the next command starts

    def ended(self) -> bool:
        return self._code is not None or bool(select.select([self._answers], [], [], 0)[0])

    def wait(self) -> int:
        """The exit code, or the negative number of the signal that killed it."""
        if self._code is None:
            self._code = int(self._answers.readline())
        return self._code

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120) -> Command:
        """Wait for something that it does."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert not self.ended(), f"it ended with {self.wait()}: {self.said()}"
            assert time.monotonic() < deadline, f"nothing happened in {seconds} seconds: {self.said()}"
            time.sleep(0.001)
        return self

    def said(self) -> str:
        """What it has printed on standard error so far."""
        return self.errors.read_text(encoding="utf-8", errors="replace")


class Commands:
    """Starts forked commands, one at a time. One that still runs when the next is started is killed."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        self._process = process
        self._errors = errors
        self._place = errors
        self._last: list[Command] = []

    def at(self, place: Path) -> Commands:
        """The same, with another working directory."""
        moved = Commands(self._process, self._errors)
        moved._place, moved._last = place, self._last
        return moved

    def start(self, name: str, *arguments: str) -> Command:
        """Start `name`, such as "ln-remove"."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._last and self._last[-1]._code is None:
            self._last[-1].send(signal.SIGKILL)
            self._last[-1].wait()
        errors = self._errors / f"errors-{len(self._last)}.txt"
        request = {"name": name, "arguments": arguments, "errors": str(errors), "cwd": str(self._place)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._last.append(Command(int(self._process.stdout.readline()), errors, self._process.stdout))
        return self._last[-1]

    def run(self, name: str, *arguments: str, code: int = 0) -> str:
        """Run it to its end and return what it printed on standard error."""
        command = self.start(name, *arguments)
        found = command.wait()
        assert found == code, f"{name} ended with {found}, not {code}: {command.said()}"
        return command.said()


@contextmanager
def commands(errors: Path) -> Iterator[Commands]:
    """A process that forks commands; their standard error goes to files in `errors`."""
    # Unbuffered, so that `Command.ended` sees an answer that nobody has read.
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment()
    )
    try:
        yield Commands(process, errors)
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    import ln_removal

    ours = [module.name for module in pkgutil.walk_packages(ln_removal.__path__, "ln_removal.")]
    for module in [*IMPORTED, *ours]:
        importlib.import_module(module)
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)  # only now may its pid be given to another process
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        print(child, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


def _become(request: dict[str, str]) -> None:
    """Be the command, in a child that never comes back."""
    code = 1
    try:
        errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDWR)
        for source, target in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        sys.argv = [request["name"], *request["arguments"]]
        module, _, function = SCRIPTS[request["name"]].partition(":")
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:  # noqa: BLE001 (a test wants to see it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
