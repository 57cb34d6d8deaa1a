"""Commands that start in a moment: a process imports everything once, then forks a child for every command it is given.

What runs in the child is what runs for a user, from the entry point to the exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent

# What a command imports while it runs, besides all of this package; a child would have to import it each time.
IMPORTED = """
accelerate transformers transformers.models.gpt2.modeling_gpt2 transformers.models.gpt2.tokenization_gpt2
transformers.integrations.sdpa_attention torch.optim
""".split()


@dataclass
class Command:
    """A command that runs; `pid` is that of the process to send signals to."""

    pid: int
    errors: Path
    _answers: IO[str]

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended; `wait` says how
            os.kill(self.pid, number)

    def ended(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> int:
        """The exit code, or the negative number of the signal that killed it."""
        return int(self._answers.readline())

    def said(self) -> str:
        """What it has printed on standard error so far."""
        return self.errors.read_text(encoding="utf-8", errors="replace")


class Commands:
    """Starts commands, one at a time. Give each the time to end: `Command.wait`."""

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self._process = process
        self._place = place
        self._count = 0

    def start(self, name: str, *arguments: str, cwd: Path | None = None) -> Command:
        """Start `name`, such as "ln-remove"."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        errors = self._place / f"errors-{self._count}.txt"
        request = {"name": name, "arguments": arguments, "errors": str(errors), "cwd": str(cwd or self._place)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Command(int(self._process.stdout.readline()), errors, self._process.stdout)

    def run(self, name: str, *arguments: str, cwd: Path | None = None, code: int = 0) -> str:
        """Run it to its end and return what it printed on standard error."""
        command = self.start(name, *arguments, cwd=cwd)
        found = command.wait()
        assert found == code, f"{name} ended with {found}, not {code}: {command.said()}"
        return command.said()


def entry_point(name: str) -> str:
    """MODULE:FUNCTION of a command, as pyproject.toml declares it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts: dict[str, str] = tomllib.load(file)["project"]["scripts"]
    return scripts[name]


@contextmanager
def commands(place: Path) -> Iterator[Commands]:
    """A process that starts commands; their standard error goes to files in `place`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Commands(process, place)
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    import ln_removal

    ours = [module.name for module in pkgutil.walk_packages(ln_removal.__path__, "ln_removal.")]
    for module in [*IMPORTED, *ours]:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: dict[str, str]) -> None:
    """Be the command, in a child that never comes back."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
        errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDWR)
        for source, target in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        sys.argv = [request["name"], *request["arguments"]]
        module, _, function = entry_point(request["name"]).partition(":")
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
