"""From what the user names (a run, a model inside one, any model) to the models, tokens and limits to score."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError
from ln_removal.run_directory import RECIPE_FILE

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.recipe import Recipe


@dataclass(frozen=True)
class ToScore:
    """What `scoring.score` needs: models by role, data (`also`: further data by name), window and limit."""

    models: dict[str, str]
    data: TokenDataset
    data_name: str
    context: int
    max_tokens: int | None
    also: dict[str, TokenDataset] = field(default_factory=dict)


def models_to_score(
    source: str,
    *,
    tokens: Sequence[Path] = (),
    corpora: Sequence[str] = (),
    workplace: Path | None = None,
    original: str | None = None,
    control: str | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
) -> ToScore:
    """Work out what to score.

    A run brings its original, its control if it has one, its LN-free model, its tokens, context and limit. A model inside a
    run brings itself and the run's tokens, context and limit. What is given explicitly wins.

    Args:
        source: a run, a model inside one, or any model.
        tokens: directories of prepared tokens, in place of the run's.
        corpora: corpora or files, in place of the run's tokens or after those given; their held-out text is prepared.
        workplace: an empty directory for the tokens of `corpora`.
        original, control: models to set beside it.
        context, max_tokens: in place of the run's.

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
    ordered: dict[str, str] = {role: models[role] for role in ("original", "control", "ln_free") if role in models}
    chosen = bool(tokens or corpora)
    own = None if chosen else recipe
    if context is None:
        context = recipe.data.context if recipe is not None else min(map(_positions, models.values()))
    limit = max_tokens or (own.data.validation_tokens if own is not None else None)
    if not chosen and run is None:
        raise UserError(
            f"{source} is not part of a run, so there are no tokens to score it on; prepare some with ln-prepare and pass "
            "--tokens DIR, or name text with --corpus"
        )
    data_sets: dict[str, TokenDataset] = {}
    for directory in tokens if chosen else [run / "tokens"] if run is not None else []:
        data = TokenDataset.open(directory)
        name = own.data.corpus if own is not None else data.corpus_name
        _add(data_sets, f"{name}, validation split", data, where=str(directory))
    for number, name in enumerate(corpora):
        assert workplace is not None, "corpora need a place for their tokens"
        data = _held_out(name, next(iter(ordered.values())), workplace / str(number), limit)
        _add(data_sets, f"{name}, held out" if not Path(name).exists() else name, data, where=name)
    first, *_ = data_sets
    return ToScore(ordered, data_sets.pop(first), first, context, limit, data_sets)


def _add(data_sets: dict[str, TokenDataset], name: str, data: TokenDataset, *, where: str) -> None:
    """Under its name, or under a longer one where that is taken."""
    data_sets[name if name not in data_sets else f"{name} ({where}, {len(data_sets) + 1})"] = data


def _held_out(name: str, model: str, directory: Path, max_tokens: int | None) -> TokenDataset:
    from ln_removal.evaluation.held_out import held_out_tokens
    from ln_removal.models import load_tokenizer

    return held_out_tokens(name, load_tokenizer(model), directory, tokenizer_name=model, max_tokens=max_tokens)


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

    return int(load_config(name).max_position_embeddings)
