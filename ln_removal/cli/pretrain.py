"""`ln-pretrain`: train a model from scratch, or a grid of models and the table that compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.config.sweep import Sweep
    from ln_removal.pipelines.pretraining import PretrainResult
    from ln_removal.report.sweep_table import SweepTable

DEFAULT_RECIPE = "tiny-gpt2"

RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help=f"A built-in pretraining recipe or a TOML file. Default: {DEFAULT_RECIPE}.",
        show_default=False,
    ),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Instead of a recipe: train the arms of a grid file, such as normfree/table, and print the table of "
        "their perplexities.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(help="Shorten or lengthen the run with its warm-up.", show_default=False)
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the run. Default: checkpoints/RECIPE-run, or checkpoints/GRID-grid.", show_default=False
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run or grid in --out from its newest checkpoint.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print recipe and estimates; do nothing.")]


def pretrain(
    recipe: RecipeOption = None,
    grid: GridOption = None,
    settings: console.SettingsOption = None,
    steps: StepsOption = None,
    out: OutOption = None,
    tokens: console.TokensOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    wandb: console.WandbOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Train a GPT-2, a Pythia, a Llama or a Qwen2 from scratch, or the arms of a grid, and compare them.

    \b
    Examples:
      ln-pretrain --recipe tiny-gpt2 --out checkpoints/tiny-gpt2-run
      ln-pretrain --recipe tiny-gpt2 --steps 50 --set architecture.n_layer=2 --out checkpoints/trial
      ln-pretrain --grid normfree/table --out checkpoints/normfree-table
    """
    from ln_removal.config.presets import resolve_pretraining
    from ln_removal.config.recipe import parse_overrides

    overrides = parse_overrides(settings or [])
    common: dict[str, Any] = {"tokens": tokens, "resume": resume, "device": device, "wandb_project": wandb}
    if grid is not None:
        if recipe is not None:
            raise UserError("--grid names its base recipe itself; leave --recipe out, or --grid")
        from ln_removal.config.sweep import load_sweep

        found = load_sweep(grid, overrides=overrides, steps=steps)
        if dry_run:
            _print_grid_plan(found, device=device, as_json=as_json)
            return
        from ln_removal.pipelines.sweep import run_sweep

        place = out or Path("checkpoints") / f"{found.name}-grid"
        _print_table(run_sweep(found, place, progress=console.progress(), **common), place, as_json=as_json)
        return
    resolved = resolve_pretraining(recipe or DEFAULT_RECIPE, overrides=overrides, steps=steps)
    if dry_run:
        console.print_plan(resolved, control=False, device=device, as_json=as_json)
        return
    from ln_removal.pipelines.pretraining import pretrain as run_pretrain

    place = out or Path("checkpoints") / f"{resolved.name}-run"
    _print_scores(run_pretrain(resolved, place, progress=console.progress(), **common), as_json=as_json)


def _print_scores(result: PretrainResult, *, as_json: bool) -> None:
    if as_json:
        scores = {
            "model": str(result.model),
            "cross_entropy": result.cross_entropy,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.training.tokens,
            "seconds": result.training.seconds,
            "skipped_steps": result.training.skipped_steps,
        }
        typer.echo(json.dumps(scores, indent=2))
        return
    per_byte = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    typer.echo(f"model: {result.model}   validation cross-entropy {result.cross_entropy:.4f} nats per token{per_byte}")


def _print_table(table: SweepTable, place: Path, *, as_json: bool) -> None:
    from ln_removal.report.sweep_table import TABLE_MARKDOWN, render_table

    if as_json:
        typer.echo(json.dumps(table.to_json(), indent=2))
        return
    render_table(table, console.wide_console())
    typer.echo(f"table: {place / TABLE_MARKDOWN}")


def _print_grid_plan(grid: Sweep, *, device: console.Device, as_json: bool) -> None:
    """What --dry-run prints: every arm with tokens, parameters and estimates, and the total."""
    from ln_removal.pipelines.plan import plan_sweep

    found = plan_sweep(grid, device=console.planned_device(device))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    found.render(console.wide_console())


app = console.build(pretrain)


def main() -> None:
    """Entry point of `ln-pretrain`."""
    app()


if __name__ == "__main__":
    main()
