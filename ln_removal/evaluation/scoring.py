"""Score original, control and LN-free side by side: the same validation tokens, the same questions.

`models_to_score` goes from what the user names (a run, a model inside one, any model) to the models, tokens and limits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.evaluation.questions import Question
from ln_removal.files.run_directory import RECIPE_FILE

if TYPE_CHECKING:
    from ln_removal.config.recipe import Recipe
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.hellaswag import ChoiceResult, Protocol
    from ln_removal.evaluation.loss import LossResult
    from ln_removal.evaluation.results import Results
    from ln_removal.models.precision import Precision

COMPLETIONS = "completions"
HELLASWAG = "hellaswag"

ODD_SEQUENCES = 16
"""Sequences of each kind of odd text that `ln-evaluate --odd-text` scores."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions, their name, and the protocol that suits them."""

    name: str
    protocol: Protocol
    questions: list[Question]


def load_question_set(name: str, *, protocol: Protocol | None = None) -> QuestionSet:
    """The questions that `name` stands for.

    Args:
        name: `completions` (Python, built from this machine's held-out modules), `hellaswag` (from the Hub), or a file.
        protocol: default: `code` for completions, else `lm-eval`.

    Raises:
        UserError: the Hub is out of reach, or the file is not one of questions.
    """
    from ln_removal.evaluation.questions import load_from_hub, load_questions

    if name == COMPLETIONS:
        from ln_removal.data.open_corpus import held_out_modules
        from ln_removal.evaluation.completions import build_completions

        return QuestionSet(question_set_name(name), protocol or "code", build_completions(held_out_modules()))
    if name == HELLASWAG:
        return QuestionSet(question_set_name(name), protocol or "lm-eval", load_from_hub())
    return QuestionSet(question_set_name(name), protocol or "lm-eval", load_questions(name))


def question_set_name(name: str) -> str:
    """The name in the results of the questions that `load_question_set(name)` gives, without loading them."""
    return {COMPLETIONS: "Python completions", HELLASWAG: "HellaSwag validation"}.get(name, Path(name).name)


def score(
    models: Mapping[str, str],
    data: TokenDataset,
    *,
    data_name: str,
    context: int,
    max_tokens: int | None = None,
    also: Mapping[str, TokenDataset] | None = None,
    stride: int | None = None,
    questions: QuestionSet | None = None,
    limit: int | None = None,
    odd_sequences_each: int = 0,
    prompts: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    precision: Precision = "float32",
    progress: bool = False,
    seconds_before: float = 0.0,
) -> Results:
    """Load each model in turn and measure its losses on the validation splits and its accuracy on the questions.

    Args:
        models: names or directories, by role: `original`, `control`, `ln_free`.
        data: prepared tokens; every model must have the tokenizer that made them.
        data_name: the corpus in words, for the results.
        context: tokens in a window.
        max_tokens: score about this many validation tokens of each data set; None scores whole splits.
        also: further data sets by name, scored in the same way.
        stride: tokens between the beginnings of two windows; None: the context.
        questions: None asks none.
        limit: ask only so many.
        odd_sequences_each: also score so many sequences of every kind of odd text.
        prompts: let each model continue them.
        seed: of the bootstrap, the odd text and the continuations.
        device: "cpu" or "cuda".
        precision: of the forward passes.
        progress: show progress bars.
        seconds_before: added to the time taken, such as that of the training before.

    Raises:
        UserError: a model does not load, its tokenizer is not the one that made the tokens, or its context is too short.
            What can be known about any of the models is found out before the first one is scored.
    """
    from ln_removal.data.stress_text import stress_sequences
    from ln_removal.evaluation.compare import SideBySide, compare_odd_text, odd_losses
    from ln_removal.evaluation.hellaswag import evaluate_choices
    from ln_removal.evaluation.results import Continuation, ResidualStd, Settings, Trio, collect
    from ln_removal.evaluation.samples import TEMPERATURE, encode_prompt, sample_continuation
    from ln_removal.evaluation.statistics import residual_std
    from ln_removal.models.loading import load_config, load_model, load_tokenizer

    began = time.perf_counter()
    data_sets = {data_name: data, **(also or {})}
    for name in models.values():
        for one in data_sets.values():
            _check_model(name, one, context)
    tokenizer = load_tokenizer(next(iter(models.values())))
    if stride is not None and stride > context:
        raise UserError(f"the stride of {stride} tokens is longer than the context of {context}; lower it")
    for prompt in prompts:
        encode_prompt(
            tokenizer, prompt, min(int(load_config(name).max_position_embeddings) for name in models.values())
        )
    readings = [
        SideBySide(name, one, context=context, stride=stride, max_tokens=max_tokens) for name, one in data_sets.items()
    ]
    odd = (
        stress_sequences(tokenizer, context=context + 1, count=odd_sequences_each, seed=seed)
        if odd_sequences_each
        else {}
    )
    losses: dict[str, LossResult] = {}
    choices: dict[str, ChoiceResult] = {}
    stds: dict[str, ResidualStd] = {}
    odd_found: dict[str, dict[str, Any]] = {}
    written: dict[str, list[str]] = {}
    for role, name in models.items():
        loaded = load_model(name, device=device)
        for reading in readings:
            label = role if len(readings) == 1 else f"{role}, {reading.name}"
            found = reading.add(
                role, loaded.model, precision=precision, progress=f"{label}: loss" if progress else False
            )
            losses.setdefault(role, found)
        std = residual_std(
            loaded.model, data.split("validation"), context=context, eot_token_id=data.eot_token_id, precision=precision
        )
        if std is not None:
            stds[role] = std
        if questions is not None:
            choices[role] = evaluate_choices(
                loaded.model,
                loaded.tokenizer,
                questions.questions,
                protocol=questions.protocol,
                limit=limit,
                precision=precision,
                progress=f"{role}: questions" if progress else False,
            )
        if odd:
            odd_found[role] = odd_losses(loaded.model, odd, precision=precision)
        written[role] = [sample_continuation(loaded.model, loaded.tokenizer, prompt, seed=seed) for prompt in prompts]
        del loaded
    asked = next(iter(choices.values())).questions if choices else 0
    settings = Settings(
        data=data_name,
        context=context,
        precision=precision,
        questions=asked,
        question_set=questions.name if questions and asked else "",
        protocol=questions.protocol if questions and asked else "",
    )
    by_data = [reading.scores(tokenizer, seed=seed) for reading in readings]
    return collect(
        losses,
        choices,
        models=models,
        settings=settings,
        seconds=seconds_before + time.perf_counter() - began,
        device=device_name(device),
        by_data=by_data,
        residual_std=stds,
        odd_text=compare_odd_text(tokenizer, odd, odd_found) if odd else (),
        continuations=[
            Continuation(
                prompt=prompt,
                temperature=TEMPERATURE,
                seed=seed,
                texts=Trio[str](**{role: texts[number] for role, texts in written.items()}),
            )
            for number, prompt in enumerate(prompts)
        ],
    )


def _check_model(name: str, data: TokenDataset, context: int) -> None:
    from ln_removal.models.loading import load_config, load_tokenizer

    positions = load_config(name).max_position_embeddings
    if context > positions:
        raise UserError(f"the context of {context} tokens is longer than the {positions} positions of {name}; lower it")
    check_same_tokenizer(load_tokenizer(name), name, data)


def check_same_tokenizer(tokenizer: object, name: str, data: TokenDataset) -> None:
    """Refuse a model whose tokenizer did not make the tokens.

    Raises:
        UserError: the fingerprints differ.
    """
    from ln_removal.models.loading import tokenizer_fingerprint

    found = tokenizer_fingerprint(tokenizer)
    if found != data.tokenizer["sha256"]:
        raise UserError(
            f"the tokens in {data.directory} were made with another tokenizer ({data.tokenizer['name']}) than that of "
            f"{name}; prepare the corpus again with `ln-prepare ... --tokenizer {name}`"
        )


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


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
    from ln_removal.data.open_corpus import held_out_tokens
    from ln_removal.models.loading import load_tokenizer

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
    from ln_removal.config.recipe import load_recipe

    return load_recipe(str(run / RECIPE_FILE))


def _is_ln_free(name: str) -> bool:
    from ln_removal.models.layout import is_disarmed
    from ln_removal.models.loading import load_config

    config = load_config(name)
    return config.model_type == "normfree_gpt2" or is_disarmed(config)


def _positions(name: str) -> int:
    from ln_removal.models.loading import load_config

    return int(load_config(name).max_position_embeddings)
