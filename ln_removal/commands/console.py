"""What all commands share: one line for a user's mistake, the exit codes, `--debug` and `--version`.

Exit codes: 0 done, 1 a bug of ours, 2 something the user can mend, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec

import typer

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ln_removal.recipe import Recipe

P = ParamSpec("P")

Device = Literal["auto", "cpu", "cuda"]


def _print_version(asked: bool) -> None:
    if asked:
        import ln_removal

        typer.echo(f"ln-removal {ln_removal.__version__}")
        raise typer.Exit


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a CUDA GPU when there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
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
    app.command()(guard(command))
    return app


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn a UserError into one line on standard error and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            fail(str(error))
        except KeyboardInterrupt:
            if kwargs.get("debug"):
                traceback.print_exc()
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return guarded


def fail(message: str) -> None:
    """Print `error: message` as one line and leave with exit code 2.

    Raises:
        typer.Exit: always.
    """
    sys.stdout.flush()
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


def print_plan(recipe: Recipe, *, control: bool, as_json: bool) -> None:
    """What `--dry-run` prints: recipe, schedule and estimates, as text or as JSON."""
    import json

    from ln_removal.planning import plan

    found = plan(recipe, control=control)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    found.render(wide_console())


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough for them where there is none (a file, a pipe, CI)."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
