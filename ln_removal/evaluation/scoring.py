"""Score original, control and LN-free side by side: the same validation tokens, the same questions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError
from ln_removal.evaluation.questions import Question

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.hellaswag import ChoiceResult, Protocol
    from ln_removal.evaluation.loss import LossResult, Precision
    from ln_removal.evaluation.results import Results

COMPLETIONS = "completions"
HELLASWAG = "hellaswag"


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
        from ln_removal.data.python_source import held_out_modules
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
    questions: QuestionSet | None = None,
    limit: int | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    progress: bool = False,
    seconds_before: float = 0.0,
) -> Results:
    """Load each model in turn and measure its cross-entropy on the validation split and its accuracy on the questions.

    Args:
        models: names or directories, by role: `original`, `control`, `ln_free`.
        data: prepared tokens; every model must have the tokenizer that made them.
        data_name: the corpus in words, for the results.
        context: tokens in a window.
        max_tokens: score about this many validation tokens; None scores the whole split.
        questions: None asks none.
        limit: ask only so many.
        device: "cpu" or "cuda".
        precision: of the forward passes.
        progress: show progress bars.
        seconds_before: added to the time taken, such as that of the training before.

    Raises:
        UserError: a model does not load, its tokenizer is not the one that made the tokens, or its context is too short.
            What can be known about any of the models is found out before the first one is scored.
    """
    from ln_removal.evaluation.hellaswag import evaluate_choices
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.evaluation.results import Settings, collect
    from ln_removal.models import load_model

    began = time.perf_counter()
    for name in models.values():
        _check_model(name, data, context)
    split = data.split("validation")
    losses: dict[str, LossResult] = {}
    choices: dict[str, ChoiceResult] = {}
    for role, name in models.items():
        loaded = load_model(name, device=device)
        losses[role] = cross_entropy(
            loaded.model,
            split,
            context=context,
            max_tokens=max_tokens,
            precision=precision,
            progress=f"{role}: loss" if progress else False,
        )
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
    seconds = seconds_before + time.perf_counter() - began
    return collect(losses, choices, models=models, settings=settings, seconds=seconds, device=device_name(device))


def _check_model(name: str, data: TokenDataset, context: int) -> None:
    from ln_removal.models import load_config, load_tokenizer

    positions = load_config(name).n_positions
    if context > positions:
        raise UserError(f"the context of {context} tokens is longer than the {positions} positions of {name}; lower it")
    check_same_tokenizer(load_tokenizer(name), name, data)


def check_same_tokenizer(tokenizer: object, name: str, data: TokenDataset) -> None:
    """Refuse a model whose tokenizer did not make the tokens.

    Raises:
        UserError: the fingerprints differ.
    """
    from ln_removal.models import tokenizer_fingerprint

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
