"""Recipes for other lengths and depths than they were written for, and the default recipe of every model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ln_removal.config.recipe import ArchitectureSpec, Recipe, ScheduleSpec, load_recipe
from ln_removal.errors import UserError

_MOMENTS = ("ln_2_start", "qk_start", "v_start", "ln_f_at")
_GAPS = ("ln_2_gap", "qk_gap", "v_gap")

_FOR_GPT2 = {"distilgpt2": 6, "gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}
_FOR_GATED = {"gated": 30}
"""The default recipes, for GPT-2 and for models with gated MLPs, and the number of layers of the models that they were written for."""


def default_recipe(model: str | Path, shape: ArchitectureSpec) -> Recipe:
    """The removal recipe for a model when none is named.

    That is the built-in recipe of the model's own name, without a Hub owner and a commit. For any other model it is recipe `gated`, if
    its MLPs are gated, or the GPT-2 recipe written for the closest depth, with gaps and context fitted to the model. Its description
    then says so.

    Args:
        model: "tiny", a local directory or a Hub id.
        shape: the model's architecture, see `plan.architecture_of`.
    """
    model = str(model)
    written_for = _FOR_GATED if shape.parts.gated else _FOR_GPT2
    closest = min(written_for, key=lambda name: abs(written_for[name] - shape.n_layer))
    recipe = load_recipe("tiny" if model == "tiny" else closest)
    same = own_name(model) == own_name(recipe.model) and shape.n_layer == written_for[closest]
    if model != "tiny" and not (same and (shape.parts.gated or shape.family == "gpt2")):
        origin = f"Recipe {closest}, written for the {written_for[closest]} layers of {recipe.model}"
        recipe = with_layers(recipe, written_for=written_for[closest], n_layer=shape.n_layer)
        recipe = recipe.model_copy(
            update={"description": f"{origin} and fitted to the {shape.n_layer} layers of {model}."}
        )
    tokens = recipe.training.tokens_per_step
    fitting = range(min(recipe.data.context, shape.n_positions), 0, -1)
    context = next(length for length in fitting if tokens % length == 0)
    data = recipe.data.model_copy(update={"context": context})
    return Recipe.model_validate(dict(recipe) | {"model": model, "data": data})


def own_name(model: str | Path) -> str:
    """The name of a model without the owner or directory in front and the commit behind it."""
    return str(model).rpartition("/")[2].partition("@")[0]


def is_borrowed(recipe: Recipe) -> bool:
    """Whether a built-in recipe removes the norms of another model than the one that it was written for."""
    default = recipe.name in _FOR_GPT2 or recipe.name in _FOR_GATED
    return default and own_name(recipe.model) != own_name(load_recipe(recipe.name).model)


def resolve_pretraining(
    recipe: str | Path, *, overrides: Mapping[str, object] | None = None, steps: int | None = None
) -> Recipe:
    """The pretraining recipe for what a user names; the arguments are those of `plan.resolve_recipe`.

    Raises:
        UserError: there is no such recipe, it is a removal recipe, or the result has faults.
    """
    found = load_recipe(recipe, overrides)
    check_is_pretraining(found)
    return found if steps is None else with_steps(found, steps)


def check_is_removal(recipe: Recipe) -> None:
    """Raises UserError for a pretraining recipe."""
    if recipe.schedule is None:
        raise UserError(f"recipe {recipe.name} has no [schedule]; it trains from scratch: run it with ln-pretrain")


def check_is_pretraining(recipe: Recipe) -> None:
    """Raises UserError for a removal recipe."""
    if recipe.architecture is None:
        raise UserError(f"recipe {recipe.name} has no [architecture]; it removes LayerNorm: run it with ln-remove")


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """Change the number of steps of a run; schedule, warm-up and decay are scaled with it.

    Step 1 stays step 1, because statistics need one step before the first freeze, and the last step stays the last. Numbers are
    rounded down. A schedule that fits its run therefore also fits the scaled run, whatever the model's depth.

    Raises:
        UserError: too few steps. A removal needs 2: one that gathers statistics and one with everything frozen.
    """
    least = 1 if recipe.schedule is None else 2
    if steps < least:
        raise UserError(f"a run of {steps} steps is too short for recipe {recipe.name!r}; give at least {least}")
    old = recipe.training.steps
    changes: dict[str, object] = {"steps": steps, "warmup_steps": recipe.training.warmup_steps * steps // old}
    if recipe.training.decay_steps is not None:
        changes["decay_steps"] = max(1, recipe.training.decay_steps * steps // old)
    schedule = recipe.schedule
    if schedule is not None and old > 2:
        schedule = _scaled(schedule, steps - 2, old - 2)
    training = recipe.training.model_copy(update=changes)
    return Recipe.model_validate(dict(recipe) | {"training": training, "schedule": schedule})


def with_layers(recipe: Recipe, *, written_for: int, n_layer: int) -> Recipe:
    """Fit a removal to a model of another depth. The gaps change so that no kind of site takes longer than before.

    Args:
        recipe: a removal recipe; a pretraining recipe is returned unchanged.
        written_for: the number of layers that the recipe was written for.
        n_layer: the number of layers of the model.
    """
    if recipe.schedule is None or written_for == n_layer:
        return recipe
    changes = {key: getattr(recipe.schedule, key) * written_for // n_layer for key in _GAPS}
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update=changes)})


def _scaled(spec: ScheduleSpec, new: int, old: int) -> ScheduleSpec:
    """The schedule with every duration multiplied by new / old and rounded down; so are moments, counted from step 1."""
    changes: dict[str, object] = {}
    for key, value in dict(spec).items():
        if key in _MOMENTS and value is not None:
            changes[key] = 1 + (value - 1) * new // old if value > 0 else 0
        elif isinstance(value, int):
            changes[key] = value * new // old
    return spec.model_copy(update=changes)
