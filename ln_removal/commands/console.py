"""What all commands share: one line for a user's mistake, the exit codes, `--debug` and `--version`.

Exit codes: 0 done, 1 a bug of ours, 2 something the user can mend, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

import typer
import typer.core

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ln_removal.recipe import Recipe

P = ParamSpec("P")

PATH_FAULTS = {
    getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOSPC", "EDQUOT")
}

Device = Literal["auto", "cpu", "cuda"]

# Typer names BadParameter but not its base, which is also that of an unknown option and a missing argument.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(asked: bool) -> None:
    if asked:
        import ln_removal

        typer.echo(f"ln-removal {ln_removal.__version__}")
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

    The command takes `debug: DebugOption = False` and `version: VersionOption = False`; when it raises, what the user
    sees is decided here. An example in the docstring stands after a line that holds only a backslash-b, which keeps its
    line breaks.
    """
    # Plain help: it is the same in a terminal, a pipe and a README, and needs no import of rich.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=_Command)(guard(command))
    return app


class _Command(typer.core.TyperCommand):
    """A command that says what is wrong with its options in one line, like every other mistake."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except _UsageError as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            fail(f"{message.rstrip('.')}; see {info_name} --help")


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn a UserError, or a fault of the file system, into one line and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            fail(str(error))
        except OSError as error:  # what any use of a path can meet; an expected one has been put into words before
            if error.errno not in PATH_FAULTS:
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            path = str(error.filename or "the file system")
            shown = path if len(path) < 100 else f"{path[:60]}...{path[-30:]}"
            fail(f"{shown}: {error.strerror}; check the path, its permissions and the free space")
        except KeyboardInterrupt:
            if kwargs.get("debug"):
                traceback.print_exc()
            again = "; the same command with --resume goes on from the last checkpoint" if "resume" in kwargs else ""
            typer.echo(f"stopped{again}", err=True)
            raise typer.Exit(130) from None

    return guarded


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


def check_writable(path: Path, option: str) -> None:
    """Find out before an hour of scoring, not after it, that a file cannot be written.

    Raises:
        UserError: it is a directory, or cannot be opened for writing.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; name a file in it")
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another {option} file") from error


def print_plan(recipe: Recipe, *, control: bool, device: Device, as_json: bool) -> None:
    """What `--dry-run` prints: recipe, schedule and estimates for the device, as text or as JSON.

    Raises:
        UserError: as `planning.plan`, or CUDA was asked for and there is none.
    """
    import json
    import shutil

    from ln_removal.planning import plan

    name = "cpu"
    # PyTorch takes a second to import: not where there is no NVIDIA driver.
    if device == "cuda" or (device == "auto" and shutil.which("nvidia-smi")):
        from ln_removal.evaluation.scoring import device_name

        name = device_name(pick_device(device))
    found = plan(recipe, control=control, device=name)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    found.render(wide_console())


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough for them where there is none (a file, a pipe, CI)."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
