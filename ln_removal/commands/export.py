"""`ln-export`: an LN-free model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ln_removal.commands import console


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|MODEL", help="A run of ln-remove, or the directory of an LN-free model.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist yet.", show_default=False)],
    form: Annotated[
        Literal["normfree", "stock"],
        typer.Option(
            "--format", help="normfree: no norm module at all. stock: plain GPT2LMHeadModel for any transformers."
        ),
    ] = "normfree",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the weights written.")
    ] = "float32",
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Write an LN-free model in another format. A run that stopped before its export is folded from its checkpoint.

    \b
    Examples:
      ln-export checkpoints/demo --format stock --out exports/demo-stock
      ln-export checkpoints/demo/model --dtype bfloat16 --out exports/demo-bf16
    """
    from ln_removal.export.sources import export_model

    report = export_model(source, out, form=form, dtype=dtype)
    typer.echo(f"{form} model: {out}   largest relative difference of the logits: {report:.1e}")


app = console.build(export)


def main() -> None:
    """Entry point of `ln-export`."""
    app()
