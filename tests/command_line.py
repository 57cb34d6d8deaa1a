"""The commands, started three ways: in this process, forked from a process that has everything imported, or afresh.

A forked command is what runs for a user, from the entry point to the exit code, without the seconds that its imports take.
Python code can be forked, too, from a process that has imported neither ours nor anything that reads settings of the Hub.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

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

# What the libraries of the Hub import that takes long and reads none of their settings.
BELOW_THE_HUB = """
torch torch._dynamo torch.distributed.tensor torch.optim torch.export scipy.optimize scipy.stats regex jinja2 httpx pydantic
typer yaml filelock tqdm requests
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


def fork_code(
    code: str, *arguments: str, cwd: Path, environment: Mapping[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a forked process that has imported no package of ours and none that reads settings of the Hub."""
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        forked = _below_the_hub().fork(
            {
                "name": "-c",
                "code": code,
                "arguments": arguments,
                "cwd": str(cwd),
                "environment": dict(environment),
                "output": str(output),
                "errors": str(errors),
            },
            errors,
        )
        try:
            ended = forked.wait(timeout)
        finally:
            forked.send(signal.SIGKILL)
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (output, errors)]
    return subprocess.CompletedProcess(["python", "-c", code, *arguments], ended, *said)


def forked_code(code: str, *arguments: str) -> str:
    """The same for code that has to end well; returns what it printed."""
    ended = fork_code(code, *arguments, cwd=Path.cwd(), environment=environment())
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
        """Send a signal, unless `wait` has returned: from then on the pid may be another process's."""
        if self._code is None:
            os.kill(self.pid, number)  # one that has ended is a zombie until `wait` returns

    def ended(self) -> bool:
        return self._code is not None or self._answered(0)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, or the negative number of the signal that killed it."""
        if self._code is None:
            assert self._answered(seconds), f"it has not ended in {seconds} seconds: {self.said()}"
            self._code = int(self._answers.readline())
            self._answers.close()
        return self._code

    def _answered(self, seconds: float | None) -> bool:
        return bool(select.select([self._answers], [], [], seconds)[0])

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


class Forks:
    """A process that forks others, as many at a time as it is asked to; it ends with this one, or when it is closed."""

    def __init__(self, imports: str) -> None:
        """`imports` is "commands" or "code"."""
        self._control, theirs = socket.socketpair()
        with theirs:
            handle = theirs.fileno()
            started = [sys.executable, __file__, imports, str(handle)]
            self._process = subprocess.Popen(started, pass_fds=[handle], stdin=subprocess.DEVNULL, env=environment())

    def fork(self, request: Mapping[str, Any], errors: Path) -> Command:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
            conversation = ours.makefile("rwb", buffering=0)  # what is buffered, select does not see
        conversation.write(json.dumps(request).encode() + b"\n")
        return Command(int(conversation.readline()), errors, conversation)

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


@cache
def _below_the_hub() -> Forks:
    return Forks("code")


class Commands:
    """Starts forked commands. Those that still run when the next ones are started are killed."""

    def __init__(self, forks: Forks, errors: Path) -> None:
        self._forks = forks
        self._errors = errors
        self._place = errors
        self._started: list[Command] = []

    def at(self, place: Path) -> Commands:
        """The same, with another working directory."""
        moved = Commands(self._forks, self._errors)
        moved._place, moved._started = place, self._started
        return moved

    def start(self, name: str, *arguments: str) -> Command:
        """Start `name`, such as "ln-remove", or MODULE:FUNCTION."""
        return self._start([environment()], name, *arguments)[0]

    def start_ranks(self, count: int, name: str, *arguments: str) -> list[Command]:
        """Start it on `count` processes that train together, by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
        ranks = [str(rank) for rank in range(count)]
        return self._start([environment(**world, RANK=rank, LOCAL_RANK=rank) for rank in ranks], name, *arguments)

    def _start(self, environments: list[dict[str, str]], name: str, *arguments: str) -> list[Command]:
        self.stop()
        request = {"name": name, "arguments": arguments, "cwd": str(self._place), "output": os.devnull}
        found = []
        for variables in environments:
            errors = self._errors / f"errors-{len(self._started)}.txt"
            found.append(self._forks.fork(request | {"environment": variables, "errors": str(errors)}, errors))
            self._started.append(found[-1])
        return found

    def stop(self) -> None:
        """Kill what still runs."""
        for command in self._started:
            command.send(signal.SIGKILL)
            command.wait()

    def run(self, name: str, *arguments: str, code: int = 0) -> str:
        """Run it to its end and return what it printed on standard error."""
        return self._ended(self.start(name, *arguments), name, code)

    def run_ranks(self, count: int, name: str, *arguments: str) -> list[str]:
        """The same on `count` processes that train together; what each rank printed."""
        return [self._ended(rank, name, 0) for rank in self.start_ranks(count, name, *arguments)]

    @staticmethod
    def _ended(command: Command, name: str, code: int) -> str:
        found = command.wait(600)
        assert found == code, f"{name} ended with {found}, not {code}: {command.said()}"
        return command.said()


@contextmanager
def commands(errors: Path) -> Iterator[Commands]:
    """A process that forks commands; their standard error goes to files in `errors`."""
    forks = Forks("commands")
    started = Commands(forks, errors)
    try:
        yield started
    finally:
        started.stop()
        forks.close()


def _serve(imports: str, control: socket.socket) -> None:
    if imports == "commands":
        import ln_removal

        modules = [*IMPORTED, *(each.name for each in pkgutil.walk_packages(ln_removal.__path__, "ln_removal."))]
    else:
        modules = BELOW_THE_HUB
    for module in modules:
        importlib.import_module(module)
    if imports == "code":
        assert not {"ln_removal", "wrapt", "huggingface_hub", "transformers", "datasets"} & set(sys.modules)
    while handles := socket.recv_fds(control, 1, 1)[1]:
        if os.fork() == 0:
            try:
                control.close()
                _look_after(socket.socket(fileno=handles[0]))
            finally:
                os._exit(0)
        os.close(handles[0])
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


def _look_after(caller: socket.socket) -> None:
    """Fork one process and tell its caller how it ends."""
    conversation = caller.makefile("rwb", buffering=0)
    request = json.loads(conversation.readline())
    child = os.fork()
    if child == 0:
        conversation.close()
        caller.close()
        _become(request)
    conversation.write(b"%d\n" % child)
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    conversation.write(b"%d\n" % (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
    conversation.read(1)  # nothing comes: the caller has heard the end, and the pid may be given to another process
    os.waitpid(child, 0)


def _become(request: dict[str, Any]) -> NoReturn:
    """Be the command or the code, in a child that never comes back."""
    code = 1
    try:
        for place, target in ((os.devnull, 0), (request["output"], 1), (request["errors"], 2)):
            opened = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, target)
            os.close(opened)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [request["name"], *request["arguments"]]
        if "code" in request:
            sys.path[0] = ""
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(request["code"], "<string>", "exec"), main.__dict__)
        else:
            module, _, function = SCRIPTS.get(request["name"], request["name"]).partition(":")
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
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
