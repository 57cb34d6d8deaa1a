"""What the commands `ln-analyze X RUN` share: their options, loading the three models, and showing what was found.

A command is a function of a `Request` and its own options that returns a `Found`. `on_run` gives it the argument RUN and
the options --device, --dtype, --seed, --out, --json and --debug, and prints, draws and writes what it returns:

    @on_run
    def dla(request: Request, documents: DocumentsOption = 32) -> Found:
        (its docstring is the help)
        from ln_removal.interpret.attribution import direct_effects_of_run
        from ln_removal.report.exact_analyses import dla_charts, dla_tables

        models = request.load()
        found = direct_effects_of_run(models, request.documents(models, documents, ...), progress=request.progress)
        return Found(found, dla_tables(found), dla_charts(found))
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ln_removal.interpret.models import Documents, Models

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A finished run of ln-remove (or ln-pretrain).", show_default=False)
]
DtypeOption = Annotated[
    Literal["float64", "float32"],
    typer.Option(help="Of weights and activations. float32 takes half the memory and time, and rounds."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where figures and the JSON file go. Default: RUN/analysis.", show_default=False),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the documents that are drawn and of the intervals.")]

DocumentsOption = Annotated[int, typer.Option(min=1, help="How many held-out documents are read.")]
LengthOption = Annotated[int, typer.Option(min=8, help="How many tokens of each document are read.")]
BosOption = Annotated[
    bool, typer.Option("--bos/--no-bos", help="Put the end-of-text token in front, as TransformerLens does by default.")
]


class Result(Protocol):
    """What an analysis returns: a frozen dataclass."""

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, in which a number that is not finite is None."""
        ...


@dataclass(frozen=True)
class Request:
    """What the user asked of an analysis.

    Attributes:
        device: "cpu" or "cuda".
        seed: of everything that is drawn.
        progress: whether to show progress bars on standard error.
    """

    run: str
    device: str
    dtype: str
    seed: int
    progress: bool

    def load(self) -> Models:
        """The models of the run."""
        import torch

        from ln_removal.interpret.models import load

        return load(self.run, device=self.device, dtype=getattr(torch, self.dtype))

    def documents(self, models: Models, count: int, length: int, *, bos: bool) -> Documents:
        """Held-out documents of the run; no longer than the models' context."""
        return models.documents(count, length=min(length, int(models.any.cfg.n_ctx)), prepend_bos=bos, seed=self.seed)


@dataclass(frozen=True)
class Found:
    """What an analysis found and how it is shown.

    Attributes:
        result: its `to_json` is printed with --json, and written to a file.
        tables: for the terminal.
        charts: the figures by name; each is drawn by its function and written as PNG and PDF.
        file: that the JSON is written to in OUT; NAME.json by default.
        page: makes OUT/NAME.html of the files of the figures; None if there is no page.
    """

    result: Result
    tables: Sequence[Table]
    charts: Mapping[str, Callable[[], Figure]]
    file: str = ""
    page: Callable[[Sequence[Path]], str] | None = None


def on_run(command: Callable[..., Found]) -> Callable[..., None]:
    """Make a command for `console.build_group` of a function of a Request and its own options, whose docstring is the help."""

    def run_command(
        run: RunArgument,
        device: console.DeviceOption = "auto",
        dtype: DtypeOption = "float64",
        seed: SeedOption = 0,
        out: OutOption = None,
        as_json: console.JsonOption = False,
        debug: console.DebugOption = False,
        **own: Any,
    ) -> None:
        if out is not None and out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; name a directory")
        request = Request(run, console.pick_device(device), dtype, seed, progress=sys.stderr.isatty())
        _show(command.__name__, request, command(request, **own), out, as_json=as_json)

    shared = list(inspect.signature(run_command, eval_str=True).parameters.values())
    options = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (shared[0], *options, *shared[1:-1])]
    # Typer reads these.
    run_command.__name__, run_command.__doc__, run_command.__module__ = (
        command.__name__,
        command.__doc__,
        command.__module__,
    )
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {one.name: one.annotation for one in parameters}
    return run_command


def named(option: str, given: str, choices: Sequence[str], *, alone: Sequence[str] = ()) -> list[str]:
    """The names that an option gives, with commas between them.

    Args:
        choices: names that may stand together.
        alone: names that may only stand by themselves.

    Raises:
        UserError: there is no such name, or none is given.
    """
    asked = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in asked if name not in (*choices, *alone)]
    if unknown or not asked or (len(asked) > 1 and set(alone) & set(asked)):
        others = "".join(f", or {name}" for name in alone)
        raise UserError(f"{option} {given}: choose from {', '.join(choices)}, with commas between them{others}")
    return asked


def draw(charts: Mapping[str, Callable[[], Figure]], directory: Path) -> list[Path]:
    """Draw each chart and write it as PNG and PDF under its name."""
    from ln_removal.report import plots

    with plots.house_style():
        return [path for name, chart in charts.items() for path in plots.save(chart(), directory, name)]


def print_figures(figures: Sequence[Path]) -> None:
    """One line that says where the figures are."""
    names = ", ".join(path.name for path in figures if path.suffix == ".png")
    typer.echo(f"figures: {figures[0].parent}/ {names}, and each as PDF")


def _show(name: str, request: Request, found: Found, out: Path | None, *, as_json: bool) -> None:
    """Draw the figures, write the JSON file, and print the tables, or the JSON."""
    from ln_removal.files.atomic import write_json_atomically
    from ln_removal.interpret.entropies import output_directory
    from ln_removal.report.page import write_page

    directory = output_directory(out, [request.run])
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}; choose another --out") from error
    figures = draw(found.charts, directory)
    asked = {
        "analysis": name,
        "run": request.run,
        "device": request.device,
        "dtype": request.dtype,
        "seed": request.seed,
    }
    everything = asked | found.result.to_json() | {"figures": [str(path) for path in figures]}
    write_json_atomically(directory / (found.file or f"{name}.json"), everything)
    page = None if found.page is None else write_page(directory / f"{name}.html", found.page(figures))
    if as_json:
        typer.echo(json.dumps(everything, indent=2, allow_nan=False))
        return
    screen = console.wide_console()
    for table in found.tables:
        screen.print(table, markup=False)
    if figures:
        print_figures(figures)
    if page is not None:
        typer.echo(f"page: {page}")
