"""Score original, control and LN-free on the same validation tokens and the same questions.

`scoring_inputs` goes from what the user names (a run, a model inside one, any model) to models, tokens and limits; `score`
measures them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError
from ln_removal.files.run_directory import RECIPE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ln_removal.config.recipe import Recipe, WindowKind
    from ln_removal.data.tokens import TokenDataset, Tokens
    from ln_removal.evaluation.choices import Prompt
    from ln_removal.evaluation.compare import Array, Comparison
    from ln_removal.evaluation.hellaswag import ChoiceResult, QuestionSet
    from ln_removal.evaluation.loss import LossResult
    from ln_removal.evaluation.prompts import PromptSet
    from ln_removal.evaluation.results import ResidualStd, Results, Samples, StressText

DEFAULT_CONTEXT = 2048
"""Tokens in a window of models with more positions, where neither a run nor the user says: windows of 131,072 tokens, as Llama 3 could
read them, would hold many documents and take hours."""

STRESS_SEQUENCES = 16
"""Sequences of each kind of stress text that `ln-evaluate --odd-text` scores."""


@dataclass(frozen=True)
class ScoringInputs:
    """Which models are scored on which tokens.

    Attributes:
        models: names or directories by role, in the order of `results.ROLES`.
        data_sets: prepared tokens by the name that the results give them. The first data set gives the values at the top
            of results.json.
        context: tokens in a window.
        max_tokens: score about this many validation tokens of each data set; None scores whole splits.
        windows: of a stream, or documents from their start.
        names: by role, what the results call models that are not called by their name or directory.
    """

    models: Mapping[str, str]
    data_sets: Mapping[str, TokenDataset]
    context: int
    max_tokens: int | None = None
    windows: WindowKind = "stream"
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoringOptions:
    """What is measured besides the loss, and how.

    Attributes:
        stride: tokens between the beginnings of two windows; None: the context.
        questions: the accuracy on them is measured; None asks none.
        stress_sequences: how many sequences of every kind of stress text are scored.
        prompts: each model continues each of them.
        seed: of the bootstrap, the stress texts and the samples.
        device: "cpu" or "cuda".
        progress: show progress bars.
    """

    stride: int | None = None
    questions: QuestionSet | None = None
    stress_sequences: int = 0
    prompts: Sequence[str] = ()
    seed: int = 0
    device: str = "cpu"
    progress: bool = False


@dataclass(frozen=True)
class _ModelScores:
    """What one model scored, besides what its comparisons keep; the loss is that on the first data set."""

    loss: LossResult
    residual_std: ResidualStd | None
    choices: ChoiceResult | None
    prompt_losses: dict[tuple[str, bool], Array]
    stress_losses: dict[bool, dict[str, Array]]  # without and with the end-of-text token in front
    texts: list[str]


def score(inputs: ScoringInputs, options: ScoringOptions, *, seconds_before: float = 0.0) -> Results:
    """Load each model in turn and measure its losses on the validation splits and its accuracy on the questions.

    Args:
        seconds_before: added to the time taken; the time of the training that came before.

    Raises:
        UserError: a model does not load, its tokenizer did not make the tokens, or its context is too short. All models
            are checked before the first one is scored.
    """
    from ln_removal.data.stress_text import stress_sequences
    from ln_removal.evaluation.hellaswag import choice_prompts
    from ln_removal.evaluation.prompts import compare_prompts, prompt_sets
    from ln_removal.evaluation.results import Settings, collect

    began = time.perf_counter()
    tokenizer = _checked_tokenizer(inputs, options)
    comparisons = _comparisons(inputs, options)
    count, seed = options.stress_sequences, options.seed
    stress = stress_sequences(tokenizer, context=max(3, inputs.context + 1), count=count, seed=seed) if count else {}
    prompts = prompt_sets(
        tokenizer,
        comparisons[0].data.split("validation"),
        positions=min(map(_positions, inputs.models.values())),
        max_tokens=inputs.max_tokens,
        seed=seed,
    )
    questions = options.questions
    asked = None
    if questions is not None and questions.questions:
        asked = choice_prompts(tokenizer, questions.questions, questions.protocol)
    found = {
        role: _score_model(role, name, inputs, options, comparisons, stress, prompts, asked)
        for role, name in inputs.models.items()
    }
    by_data = [comparison.scores(tokenizer, seed=seed) for comparison in comparisons]
    choices = {role: one.choices for role, one in found.items() if one.choices is not None}
    return collect(
        {role: one.loss for role, one in found.items()},
        choices,
        models={**inputs.models, **inputs.names},
        settings=Settings(
            data=next(iter(inputs.data_sets)),
            context=inputs.context,
            windows=inputs.windows,
            questions=next(iter(choices.values())).questions if choices else 0,
            question_set=questions.name if questions else "",
            protocol=questions.protocol if questions else "",
        ),
        seconds=seconds_before + time.perf_counter() - began,
        device=device_name(options.device),
        by_data=by_data,
        prompts=compare_prompts(prompts, {role: one.prompt_losses for role, one in found.items()}, seed=seed),
        residual_std={role: one.residual_std for role, one in found.items() if one.residual_std is not None},
        stress_texts=_stress_texts(tokenizer, stress, found),
        samples=list(_samples(found, options)),
    )


def _comparisons(inputs: ScoringInputs, options: ScoringOptions) -> list[Comparison]:
    """One for each data set; no model is in them yet."""
    from ln_removal.evaluation.compare import Comparison

    return [
        Comparison(
            name,
            data,
            context=inputs.context,
            windows=inputs.windows,
            stride=options.stride,
            max_tokens=inputs.max_tokens,
        )
        for name, data in inputs.data_sets.items()
    ]


def _checked_tokenizer(inputs: ScoringInputs, options: ScoringOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of the models, once everything is checked that can be known without loading their weights."""
    from ln_removal.evaluation.compare import encode_prompt
    from ln_removal.models.checks import say_what_is_left_out
    from ln_removal.models.loading import load_tokenizer

    positions = {name: _positions(name) for name in inputs.models.values()}
    context = inputs.context
    for name in inputs.models.values():
        if context > positions[name]:
            raise UserError(
                f"the context of {context} tokens is longer than the {positions[name]} positions of {name}; lower it"
            )
        for data in inputs.data_sets.values():
            check_same_tokenizer(load_tokenizer(name), name, data)
    if options.stride is not None and options.stride > context:
        raise UserError(f"the stride of {options.stride} tokens is longer than the context of {context}; lower it")
    name = next(iter(inputs.models.values()))
    tokenizer = load_tokenizer(name)
    say_what_is_left_out(tokenizer, inputs.names.get("original", name))
    for prompt in options.prompts:
        encode_prompt(tokenizer, prompt, min(positions.values()))
    return tokenizer


def _score_model(
    role: str,
    name: str,
    inputs: ScoringInputs,
    options: ScoringOptions,
    comparisons: Sequence[Comparison],
    stress: Mapping[str, Tokens],
    prompts: Mapping[str, PromptSet],
    asked: Sequence[Prompt] | None,
) -> _ModelScores:
    """Load one model, add it to the comparisons and take everything else that the options ask for."""
    from ln_removal.evaluation.compare import sample_text, stress_losses
    from ln_removal.evaluation.hellaswag import evaluate_choices
    from ln_removal.evaluation.prompts import prompt_losses
    from ln_removal.evaluation.statistics import residual_std
    from ln_removal.models.checks import begins_texts
    from ln_removal.models.loading import load_model

    loaded = load_model(name, device=options.device)
    losses = []
    for comparison in comparisons:
        label = role if len(comparisons) == 1 else f"{role}, {comparison.name}"
        losses.append(comparison.add(role, loaded.model, progress=f"{label}: loss" if options.progress else False))
    first, questions = comparisons[0].data, options.questions
    front = begins_texts(loaded.tokenizer)
    front = first.eot_token_id if front is None else front
    return _ModelScores(
        loss=losses[0],
        residual_std=residual_std(
            loaded.model,
            first.split("validation"),
            context=inputs.context,
            eot_token_id=first.eot_token_id,
            windows=inputs.windows,
        ),
        choices=None
        if questions is None
        else evaluate_choices(
            loaded.model,
            loaded.tokenizer,
            questions.questions,
            protocol=questions.protocol,
            prompts=asked,
            progress=f"{role}: questions" if options.progress else False,
        ),
        prompt_losses=prompt_losses(loaded.model, prompts, eot_token_id=front),
        stress_losses={bos: stress_losses(loaded.model, stress, bos=front if bos else None) for bos in (False, True)},
        texts=[sample_text(loaded.model, loaded.tokenizer, prompt, seed=options.seed) for prompt in options.prompts],
    )


def _stress_texts(
    tokenizer: PreTrainedTokenizerBase, stress: Mapping[str, Tokens], found: Mapping[str, _ModelScores]
) -> list[StressText]:
    """The losses on stress text: each kind without the end-of-text token in front, then each kind with it."""
    from ln_removal.evaluation.compare import compare_stress_texts

    texts: list[StressText] = []
    for bos in (False, True):
        losses = {role: one.stress_losses[bos] for role, one in found.items()}
        texts += compare_stress_texts(tokenizer, stress, losses, bos=bos)
    return texts


def _samples(found: Mapping[str, _ModelScores], options: ScoringOptions) -> Iterator[Samples]:
    """What the models wrote after each prompt."""
    from ln_removal.evaluation.compare import TEMPERATURE
    from ln_removal.evaluation.results import ByRole, Samples

    for number, prompt in enumerate(options.prompts):
        texts = ByRole[str](**{role: one.texts[number] for role, one in found.items()})
        yield Samples(prompt=prompt, temperature=TEMPERATURE, seed=options.seed, texts=texts)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, data: TokenDataset) -> None:
    """Refuse a model whose tokenizer gives other ids than the one that made the tokens.

    Raises:
        UserError: the fingerprints differ, and so do the ids.
    """
    from ln_removal.data.tokens import ids_sha256, is_same_tokenizer
    from ln_removal.models.loading import tokenizer_fingerprint

    found = {"sha256": tokenizer_fingerprint(tokenizer)}
    if found["sha256"] != data.tokenizer["sha256"]:
        found["ids_sha256"] = ids_sha256(tokenizer)
    if not is_same_tokenizer(found, data.tokenizer):
        raise UserError(
            f"the tokens in {data.directory} were made with another tokenizer ({data.tokenizer['name']}) than that of "
            f"{name}; prepare the corpus again with `ln-prepare ... --tokenizer {name}`"
        )


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


@contextmanager
def scoring_inputs(
    source: str | Path,
    tokens: Sequence[Path | str] = (),
    corpora: Sequence[str | Path] = (),
    *,
    original: str | Path | None = None,
    control: str | Path | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    windows: WindowKind | None = None,
) -> Iterator[ScoringInputs]:
    """Work out what to score. Tokens that are prepared for it are deleted at the end of the block.

    A run brings its original, its control if it has one, its LN-free model, its tokens, context, limit and kind of windows. A
    model inside a run brings itself and all but the other models. Arguments replace what the run brings. The weights of the
    original are compared with those that the run was made from.

    Args:
        source: a run, a model inside one, or any model.
        tokens: directories of prepared tokens.
        corpora: corpora or files whose held-out text is prepared; they come after `tokens`.
        original, control: models to compare with.

    Raises:
        UserError: there is no such model, it has changed since the run, no tokens can be found, or the directory is neither a
            run nor a model.
    """
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.models.identity import model_of_run

    run = run_of(Path(source))
    recipe = None if run is None else recipe_of(run)
    named = {role: str(model) for role, model in (("original", original), ("control", control)) if model is not None}
    found = _models_of(str(source), run, recipe) | named
    names: dict[str, str] = {}
    if recipe is not None and recipe.schedule is not None and run == Path(source) and original is None:
        found["original"], names["original"] = model_of_run(run, recipe.model), recipe.model
    models: dict[str, str] = {role: found[role] for role in ("original", "control", "ln_free") if role in found}
    if context is None:
        context = recipe.data.context if recipe is not None else min(DEFAULT_CONTEXT, *map(_positions, models.values()))
    if windows is None:
        windows = recipe.data.windows if recipe is not None else "stream"
    if tokens or corpora:
        first_model = next(iter(models.values()))
        with tempfile.TemporaryDirectory(prefix="ln-evaluate-") as workplace:
            data_sets = _named_data_sets(tokens, list(map(str, corpora)), first_model, Path(workplace), max_tokens)
            yield ScoringInputs(models, data_sets, context, max_tokens, windows, names)
        return
    if run is None or recipe is None:
        raise UserError(
            f"{source} is not part of a run, so there are no tokens to score it on; prepare some with ln-prepare and pass "
            "--tokens DIR, or name text with --corpus"
        )
    data_sets = {f"{recipe.data.corpus}, validation split": TokenDataset.open(run / "tokens")}
    yield ScoringInputs(models, data_sets, context, max_tokens or recipe.data.validation_tokens, windows, names)


def _models_of(source: str, run: Path | None, recipe: Recipe | None) -> dict[str, str]:
    """The models that a run brings, by role, or the one model that is named."""
    path = Path(source)
    if run is None or recipe is None or run != path:
        is_control = run is not None and path.name == "model" and path.parent.name == "control"
        return {"control" if is_control else "ln_free" if _is_ln_free(source) else "original": source}
    return models_of_run(run)


def models_of_run(run: Path) -> dict[str, str]:
    """The original, LN-free model and control of a run, by role: names or directories. A pretraining has an original.

    Raises:
        UserError: the run has no model yet.
    """
    recipe = recipe_of(run)
    if not (run / "model").is_dir():
        finish = "ln-pretrain ..." if recipe.schedule is None else "ln-remove"
        raise UserError(f"{run} is a run without a model yet; finish it with {finish} --out {run} --resume")
    models = {"original": str(run / "model")}  # of a pretraining
    if recipe.schedule is not None:
        models = {"original": recipe.model, "ln_free": str(run / "model")}
    if (run / "control" / "model").is_dir():
        models["control"] = str(run / "control" / "model")
    return models


def _named_data_sets(
    tokens: Sequence[Path | str], corpora: Sequence[str], model: str, workplace: Path, max_tokens: int | None
) -> dict[str, TokenDataset]:
    """Prepared tokens, and the held-out text of corpora; a name that is taken gets an addition that tells the two apart."""
    from ln_removal.data.open_corpus import held_out_tokens
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.models.loading import load_tokenizer

    data_sets: dict[str, TokenDataset] = {}

    def add(name: str, data: TokenDataset, place: str) -> None:
        data_sets[name if name not in data_sets else f"{name} ({place}, {len(data_sets) + 1})"] = data

    for directory in tokens:
        data = TokenDataset.open(directory)
        add(f"{data.corpus_name}, validation split", data, str(directory))
    for number, name in enumerate(corpora):
        data = held_out_tokens(
            name, load_tokenizer(model), workplace / str(number), tokenizer_name=model, max_tokens=max_tokens
        )
        add(f"{name}, held out" if not Path(name).exists() else name, data, name)
    return data_sets


def run_of(path: Path | str) -> Path | None:
    """The run that `path` is, or that it is a model of; None when it is neither."""
    path = Path(path)
    if not path.is_dir():
        return None
    above = Path(os.path.abspath(path)).parents[:2]
    return next((place for place in (path, *above) if (place / RECIPE_FILE).is_file()), None)


def recipe_of(run: Path | str) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UserError: it is damaged.
    """
    from ln_removal.config.recipe import load_recipe

    return load_recipe(Path(run) / RECIPE_FILE)


def _is_ln_free(name: str) -> bool:
    from ln_removal.models.families import is_norm_free, known_family
    from ln_removal.models.layout import is_disarmed
    from ln_removal.models.loading import load_config

    config = load_config(name)
    return is_norm_free(config) or (known_family(config) is not None and is_disarmed(config))


def _positions(name: str) -> int:
    from ln_removal.models.loading import load_config, positions_of

    return positions_of(load_config(name))
