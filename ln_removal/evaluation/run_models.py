"""From what the user names (a run, a model inside one, any model) to the models, tokens and limits to score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.recipe import Recipe

RECIPE_FILE = "recipe.toml"


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
        UserError: no tokens can be found, or the directory is neither a run nor a model.
    """
    from ln_removal.data.tokens import TokenDataset

    path = Path(source)
    run = run_of(path)
    models: dict[str, str] = {}
    if run is not None and run == path:
        if not (run / "model").is_dir():
            raise UserError(f"{run} is a run without a model yet; finish it with ln-remove ... --out {run} --resume")
        models["ln_free"] = str(run / "model")
        models["original"] = recipe_of(run).model
        if (run / "control" / "model").is_dir():
            models["control"] = str(run / "control" / "model")
    else:
        models["ln_free" if _is_ln_free(path) else "original"] = source
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
    recipe = None if run is None else recipe_of(run)
    own = recipe is not None and tokens is None
    if context is None:
        context = recipe.data.context if recipe is not None else _positions(next(iter(models.values())))
    limit = max_tokens or (recipe.data.validation_tokens if recipe is not None and own else None)
    name = str(data.index.corpus.get("name", directory))
    ordered: dict[str, str] = {role: models[role] for role in ("original", "control", "ln_free") if role in models}
    return ToScore(ordered, data, f"{name}, validation split", context, limit)


def run_of(path: Path) -> Path | None:
    """The run that `path` is, or is a model of; None when it is neither."""
    return next((place for place in (path, path.parent, path.parent.parent) if (place / RECIPE_FILE).is_file()), None)


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UserError: it is damaged.
    """
    from ln_removal.recipe import load_recipe

    return load_recipe(str(run / RECIPE_FILE))


def _is_ln_free(path: Path) -> bool:
    if not path.is_dir():
        return False
    from ln_removal.export.stock import is_disarmed
    from ln_removal.models import load_config

    config = load_config(str(path))
    return config.model_type == "normfree_gpt2" or is_disarmed(config)


def _positions(name: str) -> int:
    from ln_removal.models import load_config

    return int(load_config(name).n_positions)
