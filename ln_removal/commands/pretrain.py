"""`ln-pretrain`: a GPT-2 from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ln_removal.commands import console


def pretrain(
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A built-in pretraining recipe or a TOML file.")
    ] = "tiny-gpt2",
    settings: console.SettingsOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Shorten or lengthen the run with its warm-up.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run. Default: checkpoints/RECIPE-run.", show_default=False)
    ] = None,
    tokens: console.TokensOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print recipe and estimates; do nothing.")] = False,
    wandb: console.WandbOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Train a GPT-2 from scratch: the command that made the embedded tiny model.

    \b
    Examples:
      ln-pretrain --recipe tiny-gpt2 --out checkpoints/tiny-gpt2-run
      ln-pretrain --recipe tiny-gpt2 --steps 50 --set architecture.n_layer=2 --out checkpoints/trial
    """
    import json
    import sys

    from ln_removal.recipe import parse_overrides
    from ln_removal.recipe_scaling import resolve_pretraining

    resolved = resolve_pretraining(recipe, overrides=parse_overrides(settings or []), steps=steps)
    if dry_run:
        console.print_plan(resolved, control=False, device=device, as_json=as_json)
        return
    from ln_removal.pretraining.build import pretrain as run_pretrain

    place = out or Path("checkpoints") / f"{resolved.name}-run"
    result = run_pretrain(
        resolved,
        place,
        tokens=tokens,
        resume=resume,
        device=device,
        wandb_project=wandb,
        progress=True if sys.stderr.isatty() else "lines",
    )
    if as_json:
        figures = {
            "model": str(result.model),
            "cross_entropy": result.cross_entropy,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.training.tokens,
            "seconds": result.training.seconds,
            "skipped_steps": result.training.skipped_steps,
        }
        typer.echo(json.dumps(figures, indent=2))
        return
    per_byte = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    typer.echo(f"model: {result.model}   validation cross-entropy {result.cross_entropy:.4f} nats per token{per_byte}")


app = console.build(pretrain)


def main() -> None:
    """Entry point of `ln-pretrain`."""
    app()
