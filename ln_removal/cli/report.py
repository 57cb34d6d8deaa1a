"""`ln-report`: report.html of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ln_removal.cli import console


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of ln-remove.", show_default=False)],
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Write RUN/report.html: scores, curves, constants and samples of a run on one page that needs no network.

    ln-remove writes it at the end of a run. After ln-evaluate RUN --out RUN/results.json it shows what that measured.

    \b
    Examples:
      ln-report checkpoints/demo
    """
    from ln_removal.report.page import write_report

    typer.echo(f"report: {write_report(run)}")


app = console.build(report)


def main() -> None:
    """Entry point of `ln-report`."""
    app()


if __name__ == "__main__":
    main()
