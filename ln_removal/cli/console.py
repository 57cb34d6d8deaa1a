"""What all commands share: options, one line for a user's mistake, exit codes, and what is printed.

Exit codes: 0 done, 1 a bug in ln-removal, 2 something that the user can correct, 130 stopped with Ctrl-C, 143 with SIGTERM.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

import typer
import typer.core

from ln_removal.errors import UserError
from ln_removal.files.atomic import is_full
from ln_removal.files.signals import Interrupted, stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from ln_removal.config.recipe import Recipe
    from ln_removal.evaluation.results import Results

P = ParamSpec("P")

PATH_FAULTS = {
    getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOSPC", "EDQUOT")
}

Device = Literal["auto", "cpu", "cuda"]

# Typer exports BadParameter but not its base class, which unknown options and missing arguments have in common with it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_program: list[str] = []
"""The name of the group that the command belongs to; empty for a command of its own."""

_typed: list[str] = []
"""The arguments that the command was given; messages that say what to type next repeat them."""


def _print_version(asked: bool) -> None:
    if asked:
        from ln_removal.files.resources import package_version

        typer.echo(f"ln-removal {package_version()}")
        raise typer.Exit


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a CUDA GPU when there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be repeated.", show_default=False
    ),
]
TokensOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Tokens from ln-prepare. Default: prepare the recipe's corpus.", show_default=False
    ),
]
WandbOption = Annotated[
    str | None, typer.Option(metavar="PROJECT", help="Also log to this Weights & Biases project.", show_default=False)
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="USER/REPO",
        help="Publish on the Hugging Face Hub, with a card and the scores; the token is that of `hf auth login`.",
        show_default=False,
    ),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a new repository private.")]
TagOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With --push-to-hub: also tag the commit, to pin it.", show_default=False),
]
VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
]


def build(command: Callable[P, None]) -> typer.Typer:
    """A Typer application of one command, whose docstring is its help.

    The command takes `debug: DebugOption = False` and `version: VersionOption = False`. `guard` turns what it raises into
    what the user sees. Examples in the docstring stand after a line that holds only a backslash-b, which keeps their line
    breaks.
    """
    # Plain help is the same in a terminal, a pipe and a README, and needs no import of rich.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=_Command)(guard(command))
    return app


def build_group(help_text: str, **commands: Callable[..., None]) -> typer.Typer:
    """A Typer application of several commands by name, each as in `build`; without one it shows its help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    def group(version: VersionOption = False) -> None:
        """Takes --version."""

    app.callback(cls=_Group, help=help_text, no_args_is_help=True)(group)
    for name, command in commands.items():
        app.command(name, cls=_Command)(guard(command))
    return app


class _Group(typer.core.TyperGroup):
    """A group whose message about an unknown command is one line."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        show_anyway()
        return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            fail(f"{str(error).rstrip('.')}; see {ctx.info_name} --help")


class _Command(typer.core.TyperCommand):
    """A command whose message about a wrong option is one line, like that of every other mistake."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        show_anyway()
        # In a group, the name of the command comes first.
        _typed[:] = args if parent is None else [info_name or "", *args]
        _program[:] = [] if parent is None else [str(parent.info_name)]
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _UsageError as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            command = info_name if parent is None else f"{parent.command_path} {info_name}"
            fail(f"{message.rstrip('.')}; see {command} --help")


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn a UserError, or a fault of the file system, into one line and exit code 2, and Ctrl-C or SIGTERM into 130 or 143."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            check_command_line()
            with stoppable():
                command(*args, **kwargs)
        except UserError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            fail(str(error))
        except OSError as error:  # faults that any use of a path can have; expected ones are UserErrors
            if error.errno not in PATH_FAULTS:
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            path = str(error.filename or "the file system")
            shown = path if len(path) < 100 else f"{path[:60]}...{path[-30:]}"
            if is_full(error):
                again = _to_type(command.__name__, resumes="resume" in kwargs)
                fail(f"{shown}: {error.strerror}; what was saved before is intact: free some space, then type: {again}")
            fail(f"{shown}: {error.strerror}; check the path, its permissions and the free space")
        except KeyboardInterrupt as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            stopped = error if isinstance(error, Interrupted) else Interrupted()
            if os.environ.get("RANK", "0") == "0":  # torchrun sets it; only one of several ranks prints
                typer.echo(_stopped(stopped, command.__name__, resumable="resume" in kwargs), err=True)
            raise typer.Exit(stopped.exit_code) from None

    return guarded


def show_anyway() -> None:
    """Have a question mark printed for what the encoding of the output lacks ("±" in ASCII), in place of a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what a notebook or a test may put there
        sys.stdout.reconfigure(errors="replace")


def check_command_line() -> None:
    """Check that the arguments and the current directory are text: Python carries bytes that are none as surrogates.

    Such a name could not be written into a recipe, into results or into the metadata of a model.

    Raises:
        UserError: one is not, or the current directory is gone.
    """
    try:
        named = [*(("argument", word) for word in _typed), ("current directory", os.getcwd())]
    except OSError as error:
        raise UserError(f"no current directory: {error.strerror}; change to a directory that is there") from error
    for kind, text in named:
        if text != text.encode(errors="replace").decode():
            shown = os.fsencode(text).decode(errors="backslashreplace")
            raise UserError(
                f"the {kind} '{shown}' is no text in {sys.getfilesystemencoding()}, the encoding of names here; rename the file or "
                "directory, or set LC_ALL to a locale with the encoding that the name was written in"
            )


def _stopped(error: Interrupted, name: str, *, resumable: bool) -> str:
    """One line that says what is kept and what to type to continue."""
    resumes = resumable and error.resume is not False
    kept = f": {error.kept}" if error.kept else ""
    again = "continue with" if resumes or (error.kept and not resumable) else "to start again"
    return f"stopped by {error.cause}{kept}; {again}: {_to_type(name, resumes=resumes)}"


def _to_type(name: str, *, resumes: bool) -> str:
    """The command as it was typed, with --resume if that continues the run."""
    if "WORLD_SIZE" in os.environ:  # started by torchrun, whose own command line is not known here
        return "the same command" + (" with --resume" if resumes else "")
    own = name.replace("_", "-")
    program = _program[0] if _program else own if own.startswith("evaluate-") else f"ln-{own}"
    words = [program, *_typed]
    return shlex.join(words if not resumes or "--resume" in words else [*words, "--resume"])


def fail(message: str) -> None:
    """Print `error: message` as one line and leave with exit code 2.

    Raises:
        typer.Exit: always.
    """
    sys.stdout.flush()
    head, *items = message.splitlines() or [""]
    if len(items) > 1 and all(item.startswith("  ") for item in items):  # several faults: number them
        message = " ".join([head, *(f"({number}) {item}" for number, item in enumerate(items, start=1))])
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2) from None


def pick_device(device: Device) -> str:
    """`cuda` or `cpu` for what was asked.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_writable(path: Path | None, option: str) -> None:
    """Check before an hour of scoring that its results can be written to the file that an option names.

    Raises:
        UserError: the file is a directory, or cannot be opened for writing.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; name a file in it")
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another {option} file") from error


def progress() -> Literal[True, "lines"]:
    """Progress bars in a terminal; elsewhere a line now and then."""
    return True if sys.stderr.isatty() else "lines"


def print_results(results: Results, *, as_json: bool, note: str = "") -> None:
    """The scores of a removal or an evaluation, as JSON, or as a table with a note below it."""
    import json

    from ln_removal.report.tables import render

    if as_json:
        typer.echo(json.dumps(results.model_dump(), indent=2))  # in ASCII, which every output can show
        return
    render(results, wide_console())
    if note:
        typer.echo(note)


def print_plan(recipe: Recipe, *, control: bool, device: Device, as_json: bool) -> None:
    """What `--dry-run` prints: recipe, schedule and estimates for the device, as text or as JSON. On a CPU it measures the speed.

    Raises:
        UserError: as `plan.plan`, or CUDA was asked for and there is none.
    """
    import json

    from ln_removal.pipelines.plan import plan

    name = planned_device(device)
    if name == "cpu":
        from ln_removal.pipelines.cpu_time import plan_on_cpu

        found = plan_on_cpu(recipe, control=control)
    else:
        found = plan(recipe, control=control, device=name)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    found.render(wide_console())


def planned_device(device: Device) -> str:
    """The name of the device to plan for: "cpu", or that of the GPU.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    import shutil

    # PyTorch takes a second to import, which is of no use without an NVIDIA driver.
    if device == "cuda" or (device == "auto" and shutil.which("nvidia-smi")):
        from ln_removal.evaluation.scoring import device_name

        return device_name(pick_device(device))
    return "cpu"


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, or 120 columns where there is none (a file, a pipe, CI)."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
