"""From what the user names (a run, a model inside one, any model) to the models, tokens and limits to score."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError
from ln_removal.run_directory import RECIPE_FILE

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.recipe import Recipe


@dataclass(frozen=True)
class ToScore:
    """What `scoring.score` needs: models by role, data, window and limit."""

    models: dict[str, str]
    data: TokenDataset
    data_name: str
    context: int
    max_tokens: int | None


def models_to_score(
    source: str,
    *,
    tokens: Path | None = None,
    original: str | None = None,
    control: str | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
) -> ToScore:
    """Work out what to score.

    A run brings its original, its control if it has one, its LN-free model, its tokens, context and limit. A model inside a
    run brings itself and the run's tokens, context and limit. What is given explicitly wins.

    Raises:
        UserError: there is no such model, no tokens can be found, or the directory is neither a run nor a model.
    """
    from ln_removal.data.tokens import TokenDataset

    path = Path(source)
    run = run_of(path)
    recipe = None if run is None else recipe_of(run)
    models: dict[str, str] = {}
    if run is not None and recipe is not None and run == path:
        if not (run / "model").is_dir():
            finish = "ln-pretrain ..." if recipe.schedule is None else "ln-remove"
            raise UserError(f"{run} is a run without a model yet; finish it with {finish} --out {run} --resume")
        if recipe.schedule is None:
            models["original"] = str(run / "model")
        else:
            models["ln_free"] = str(run / "model")
            models["original"] = recipe.model
        if (run / "control" / "model").is_dir():
            models["control"] = str(run / "control" / "model")
    elif path.name == "model" and path.parent.name == "control" and run is not None:
        models["control"] = source
    else:
        models["ln_free" if _is_ln_free(source) else "original"] = source
    if original is not None:
        models["original"] = original
    if control is not None:
        models["control"] = control
    directory = tokens or (run / "tokens" if run is not None else None)
    if directory is None:
        raise UserError(
            f"{source} is not part of a run, so there are no tokens to score it on; prepare some with ln-prepare and pass "
            "--tokens DIR"
        )
    data = TokenDataset.open(directory)
    own = recipe if tokens is None else None
    if context is None:
        context = recipe.data.context if recipe is not None else min(map(_positions, models.values()))
    limit = max_tokens or (own.data.validation_tokens if own is not None else None)
    name = own.data.corpus if own is not None else data.corpus_name
    ordered: dict[str, str] = {role: models[role] for role in ("original", "control", "ln_free") if role in models}
    return ToScore(ordered, data, f"{name}, validation split", context, limit)


def run_of(path: Path) -> Path | None:
    """The run that `path` is, or is a model of; None when it is neither."""
    if not path.is_dir():
        return None
    above = Path(os.path.abspath(path)).parents[:2]
    return next((place for place in (path, *above) if (place / RECIPE_FILE).is_file()), None)


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UserError: it is damaged.
    """
    from ln_removal.recipe import load_recipe

    return load_recipe(str(run / RECIPE_FILE))


def _is_ln_free(name: str) -> bool:
    from ln_removal.export.stock import is_disarmed
    from ln_removal.models import load_config

    config = load_config(name)
    return config.model_type == "normfree_gpt2" or is_disarmed(config)


def _positions(name: str) -> int:
    from ln_removal.models import load_config

    return int(load_config(name).n_positions)
