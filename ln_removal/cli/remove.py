"""`ln-remove`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError


def remove(
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a directory or a Hub id.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A built-in recipe or a TOML file. Default: the model's own.", show_default=False
        ),
    ] = None,
    settings: console.SettingsOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Shorten or lengthen the run together with its schedule.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run. Default: checkpoints/NAME of the recipe or model.", show_default=False
        ),
    ] = None,
    tokens: console.TokensOption = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the control that keeps its LayerNorms.")
    ] = False,
    questions: Annotated[
        str, typer.Option(metavar="auto|completions|hellaswag|none|FILE", help="What accuracy is measured on.")
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --out from its newest checkpoint; its recipe is the default."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe, schedule and estimates; do nothing.")
    ] = False,
    wandb: console.WandbOption = None,
    push_to_hub: console.PushOption = None,
    private: console.PrivateOption = False,
    tag: console.TagOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Remove the LayerNorms of a GPT-2 by fine-tuning, fold them away, export and score the result.

    \b
    Examples:
      ln-remove --model tiny --control --out checkpoints/demo
      ln-remove --model gpt2 --dry-run
      ln-remove --model gpt2 --control --out checkpoints/gpt2
      ln-remove --recipe gpt2-fast --set seed=1 --set data.corpus=texts/ --out checkpoints/mine
      ln-remove --control --out checkpoints/gpt2 --resume
      ln-remove --model gpt2 --control --out checkpoints/gpt2 --push-to-hub alice/gpt2-without-layernorm
    """
    import sys

    from ln_removal.config.recipe import parse_overrides
    from ln_removal.export.hub import named_target
    from ln_removal.pipelines.plan import resolve_recipe

    if resume and out is not None and model is None and recipe is None:
        if not (out / "recipe.toml").is_file():
            raise UserError(f"{out} holds no recipe.toml, so there is no run to resume; name the run's own directory")
        recipe = str(out / "recipe.toml")
    resolved = resolve_recipe(model=model, recipe=recipe, overrides=parse_overrides(settings or []), steps=steps)
    target = named_target(push_to_hub, private=private, tag=tag)
    if dry_run:
        console.print_plan(resolved, control=control, device=device, as_json=as_json)
        return
    # A model without a recipe of its own borrows one: the run is still named after the model.
    own = Path(model).name if model is not None and recipe is None else ""
    place = out or Path("checkpoints") / (own or resolved.name)

    from ln_removal.export.hub import check_target
    from ln_removal.pipelines.removal import remove as run_removal
    from ln_removal.report.tables import render

    if target is not None:
        check_target(target)  # now, not after hours of training
    results = run_removal(
        resolved,
        place,
        tokens=tokens,
        control=control,
        questions=None if questions == "none" else questions,
        resume=resume,
        device=device,
        wandb_project=wandb,
        progress=True if sys.stderr.isatty() else "lines",
    )
    if as_json:
        typer.echo(results.model_dump_json(indent=2))
    else:
        render(results, console.wide_console())
        typer.echo(f"LN-free model: {place / 'model'}   scores: {place / 'results.json'}")
    if target is not None:
        from accelerate import PartialState

        from ln_removal.pipelines.publishing import publish_run

        if PartialState().is_main_process:
            published = publish_run(place, target, progress=sys.stderr.isatty())
            typer.echo(published.line, err=as_json)


app = console.build(remove)


def main() -> None:
    """Entry point of `ln-remove`."""
    app()


if __name__ == "__main__":
    main()
