"""`ln-remove`: take the norms out of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.evaluation.results import Results
    from ln_removal.export.hub import HubTarget

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a directory or a Hub id such as EleutherAI/pythia-70m.",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="A built-in recipe or a TOML file. Default: the model's own.", show_default=False
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(help="Shorten or lengthen the run together with its schedule.", show_default=False)
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Directory of the run. Default: checkpoints/NAME of the recipe or model.", show_default=False),
]
ControlOption = Annotated[bool, typer.Option("--control", help="Also train the control that keeps its norms.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NORMS",
        help="Norms that stay: qk-norms, which Qwen3 requires (its norms of queries and keys). The same as schedule.keep.",
        show_default=False,
    ),
]
QuestionsOption = Annotated[
    str, typer.Option(metavar="auto|completions|hellaswag|none|FILE", help="What accuracy is measured on.")
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --out from its newest checkpoint; its recipe is the default."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print recipe, schedule and estimates; do nothing.")]


def remove(
    model: ModelOption = None,
    recipe: RecipeOption = None,
    settings: console.SettingsOption = None,
    steps: StepsOption = None,
    out: OutOption = None,
    tokens: console.TokensOption = None,
    control: ControlOption = False,
    keep: KeepOption = None,
    questions: QuestionsOption = "auto",
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    wandb: console.WandbOption = None,
    push_to_hub: console.PushOption = None,
    private: console.PrivateOption = False,
    tag: console.TagOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Remove the LayerNorms or RMSNorms of a model by fine-tuning, fold them away, export and score the result.

    Models are GPT-2, Pythia, Llama, Mistral, Qwen2 and Qwen3. One without a recipe gets `gated` or that of the closest GPT-2.

    \b
    Examples:
      ln-remove --model tiny --control --out checkpoints/demo
      ln-remove --model EleutherAI/pythia-70m --dry-run
      ln-remove --recipe gpt2-fast --set seed=1 --set data.corpus=texts/ --out checkpoints/mine
      ln-remove --control --out checkpoints/gpt2 --resume
      ln-remove --model gpt2 --control --out checkpoints/gpt2 --push-to-hub alice/gpt2-without-layernorm
    """
    from ln_removal.export.hub import check_target, named_target
    from ln_removal.pipelines.plan import resolve_recipe

    recipe = recipe or (_recipe_of_run(out) if resume and out is not None and model is None else None)
    at = _place_of_model(model, out, resume=resume)
    resolved = resolve_recipe(model=model, recipe=recipe, overrides=_overrides(settings, keep), steps=steps, place=at)
    target = named_target(push_to_hub, private=private, tag=tag)
    if dry_run:
        console.print_plan(resolved, control=control, device=device, as_json=as_json)
        return
    if target is not None:
        check_target(target)  # now, not after hours of training
    from ln_removal.pipelines.removal import remove as run_removal

    place = out or Path("checkpoints") / _run_name(model, recipe, resolved.name)
    results = run_removal(
        resolved,
        place,
        tokens=tokens,
        control=control,
        questions=None if questions == "none" else questions,
        resume=resume,
        device=device,
        wandb_project=wandb,
        progress=console.progress(),
    )
    _publish_and_print(results, place, target, as_json=as_json)


def _overrides(settings: list[str] | None, keep: list[str] | None) -> dict[str, object]:
    from ln_removal.config.recipe import parse_overrides

    return parse_overrides(settings or []) | ({"schedule.keep": keep} if keep else {})


def _run_name(model: str | None, recipe: str | None, resolved: str) -> str:
    """The recipe's name, or the model's: a model without a recipe of its own borrows one."""
    return (Path(model).name if model is not None and recipe is None else "") or resolved


def _place_of_model(model: str | None, out: Path | None, *, resume: bool) -> str | None:
    """Where the model is that the run in `out` was begun with, if it is resumed and was begun under this name."""
    from ln_removal.models.identity import in_place, read_identity

    if not resume or model is None:
        return None
    out = out or Path("checkpoints") / Path(model).name
    recorded = read_identity(out)
    return in_place(recorded, out).reference if recorded is not None and recorded.name == model else None


def _recipe_of_run(out: Path) -> str:
    """The recipe of the run that is resumed, as a path."""
    if not (out / "recipe.toml").is_file():
        raise UserError(f"{out} holds no recipe.toml, so there is no run to resume; name the run's own directory")
    return str(out / "recipe.toml")


def _publish_and_print(results: Results, run: Path, target: HubTarget | None, *, as_json: bool) -> None:
    """Publish the run, if there is a target, and print its scores: the one does not depend on the other."""
    import sys

    from accelerate import PartialState

    from ln_removal.pipelines.publishing import publish_run

    published = None
    try:
        if target is not None and PartialState().is_main_process:
            published = publish_run(run, target, progress=sys.stderr.isatty())
    finally:
        note = f"LN-free model: {run / 'model'}   scores: {run / 'results.json'}"
        console.print_results(results, as_json=as_json, note=note)
    if published is not None:
        typer.echo(published.line, err=as_json)


app = console.build(remove)


def main() -> None:
    """Entry point of `ln-remove`."""
    app()


if __name__ == "__main__":
    main()
