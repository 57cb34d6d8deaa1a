"""Four-way multiple choice under the protocols in use for HellaSwag, and one for source code.

A model scores differently under different protocols, so a score is always quoted with its protocol:

- `lm-eval` (lm-evaluation-harness 0.4, task hellaswag 1.0): the query is the cleaned `activity_label: ctx_a Ctx_b`, the
  endings are cleaned too; query + " " + ending is tokenised as a whole and cut after the query's number of tokens.
  acc compares summed log-probabilities, acc_norm the same divided by the *characters* of the ending.
- `nanogpt` (the evaluation of llm.c and build-nanogpt): ctx as it is, no label; ctx and " " + ending are tokenised
  apart. acc compares sums, acc_norm means over the ending's tokens.
- `code`: ctx + ending verbatim, tokenised as a whole; acc compares sums, acc_norm sums divided by the ending's UTF-8
  bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import compare_accuracies
from ln_removal.evaluation.choices import Prompt, ending_log_probs
from ln_removal.evaluation.questions import Question, load_from_hub, load_questions
from ln_removal.models.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Protocol = Literal["lm-eval", "nanogpt", "code"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

Texts = tuple[str, tuple[str, ...]]
"""A context and its endings, as they are tokenised."""

COMPLETIONS = "completions"
HELLASWAG = "hellaswag"


@dataclass(frozen=True)
class QuestionSet:
    """Questions, their name, and the protocol that suits them."""

    name: str
    protocol: Protocol
    questions: list[Question]


def load_question_set(name: str | Path, *, protocol: Protocol | None = None) -> QuestionSet:
    """The questions that `name` stands for.

    Args:
        name: `completions` (Python, built from this machine's held-out modules), `hellaswag` (from the Hub), or a file.
        protocol: default: `code` for completions, else `lm-eval`.

    Raises:
        UserError: the Hub is out of reach, or the file does not hold questions.
    """
    if name == COMPLETIONS:
        from ln_removal.data.open_corpus import held_out_modules
        from ln_removal.evaluation.completions import build_completions

        return QuestionSet(question_set_name(name), protocol or "code", build_completions(held_out_modules()))
    questions = load_from_hub() if name == HELLASWAG else load_questions(name)
    return QuestionSet(question_set_name(name), protocol or "lm-eval", questions)


def question_set_name(name: str | Path) -> str:
    """The name in the results of the questions that `load_question_set(name)` gives, without loading them."""
    return {COMPLETIONS: "Python completions", HELLASWAG: "HellaSwag validation"}.get(str(name), Path(name).name)


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """One question: the right ending, the choices under the rules of acc and acc_norm, and the values that the rules compare.

    Attributes:
        choice, choice_norm: index of the ending chosen under acc and under acc_norm.
        log_probs: of the four endings, nats.
        normalised: the same divided as the protocol says.
    """

    ind: int
    label: int
    choice: int
    choice_norm: int
    log_probs: tuple[float, ...]
    normalised: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """Accuracy of one model. Standard errors are None for a single question."""

    protocol: Protocol
    questions: int
    acc: float
    acc_standard_error: float | None
    acc_norm: float
    acc_norm_standard_error: float | None
    per_question: tuple[QuestionScore, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single questions, ready for JSON."""
        return {
            "protocol": self.protocol,
            "questions": self.questions,
            "acc": self.acc,
            "acc_standard_error": self.acc_standard_error,
            "acc_norm": self.acc_norm,
            "acc_norm_standard_error": self.acc_norm_standard_error,
        }

    def right(self, *, normalised: bool) -> npt.NDArray[np.bool_]:
        """(N,) whether each question was answered rightly, by acc_norm's rule or by acc's."""
        return np.array(
            [(score.choice_norm if normalised else score.choice) == score.label for score in self.per_question]
        )

    def per_question_json(self) -> list[dict[str, Any]]:
        """One JSON object for each question. A value that is not finite (of an ending that cleaning left empty) is null."""
        return [
            {**asdict(score), "normalised": [value if math.isfinite(value) else None for value in score.normalised]}
            for score in self.per_question
        ]


def compare_choices(first: ChoiceResult, second: ChoiceResult, *, seed: int = 0) -> dict[str, Any]:
    """Two models on the same questions: second minus first, under both rules, ready for JSON.

    Returns:
        For "acc" and "acc_norm" a dictionary: `difference` of the accuracies with `low` and `high`, its paired bootstrap interval
        (95 %), `p_value` of the exact McNemar test, `only_first` and `only_second`, the questions that one alone got right.

    Raises:
        UserError: they did not answer the same questions under the same protocol.
    """
    asked = [[(score.ind, score.label) for score in result.per_question] for result in (first, second)]
    if first.protocol != second.protocol or asked[0] != asked[1]:
        raise UserError(
            f"a paired comparison needs the same questions under the same protocol; found {len(asked[0]):,} under {first.protocol} "
            f"and {len(asked[1]):,}, some of them others, under {second.protocol}; score both models in one call"
        )
    found: dict[str, Any] = {}
    for rule in ("acc", "acc_norm"):
        normalised = rule == "acc_norm"
        compared = compare_accuracies(
            first.right(normalised=normalised), second.right(normalised=normalised), seed=seed
        )
        found[rule] = {
            "difference": compared.difference.value,
            "low": compared.difference.low,
            "high": compared.difference.high,
            "p_value": compared.p_value,
            "only_first": compared.only_first,
            "only_second": compared.only_second,
        }
    return found


def evaluate_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    protocol: Protocol,
    limit: int | None = None,
    prompts: Sequence[Prompt] | None = None,
    batch_tokens: int | Literal["auto"] = "auto",
    packed: bool | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    progress: bool | str = False,
) -> ChoiceResult:
    """Answer questions with a model.

    Args:
        tokenizer: the model's own.
        protocol: see the module's docstring.
        limit: answer only the first this many questions.
        prompts: of these questions, from `choice_prompts`, for several models that have the same tokenizer.
        batch_tokens, packed, device, precision, progress: as in `choices.ending_log_probs`.

    Raises:
        UserError: no questions, an unknown protocol, an ending that gives no token or does not fit, scores not finite.
    """
    chosen = list(islice(questions, limit))
    if not chosen:
        raise UserError(
            f"no questions to answer ({len(questions)} given, limit {limit}); give some, and a limit of 1 or more"
        )
    texts = [texts_of(question, protocol) for question in chosen]
    if prompts is None:
        prompts = choice_prompts(tokenizer, chosen, protocol)
    log_probs = ending_log_probs(
        model,
        prompts,
        batch_tokens=batch_tokens,
        packed=packed,
        device=device,
        precision=precision,
        progress=progress,
    )
    scores: list[QuestionScore] = []
    for question, (_, endings), prompt, sums in zip(chosen, texts, prompts, log_probs, strict=True):
        with np.errstate(divide="ignore"):  # an ending that cleaning left empty gets minus infinity and is never chosen
            normalised = sums / np.asarray(_lengths(endings, prompt, protocol), dtype=np.float64)
        scores.append(
            QuestionScore(
                ind=question.ind,
                label=question.label,
                choice=int(np.argmax(sums)),
                choice_norm=int(np.argmax(normalised)),
                log_probs=tuple(sums.tolist()),
                normalised=tuple(normalised.tolist()),
            )
        )
    acc, acc_error = _proportion([score.choice == score.label for score in scores])
    acc_norm, acc_norm_error = _proportion([score.choice_norm == score.label for score in scores])
    return ChoiceResult(protocol, len(scores), acc, acc_error, acc_norm, acc_norm_error, tuple(scores))


def choice_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], protocol: Protocol
) -> list[Prompt]:
    """The tokens of questions and of their endings, one prompt for each question.

    Raises:
        UserError: an unknown protocol, or an ending that gives no token.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    encode = {"lm-eval": _encode_lm_eval, "nanogpt": _encode_nanogpt, "code": _encode_code}[protocol]
    texts = [texts_of(question, protocol) for question in questions]
    return encode(tokenizer, texts, [f"question {question.ind}" for question in questions])


@dataclass(frozen=True)
class ModelsOnQuestions:
    """Several models on the same questions.

    Attributes:
        data: name of the questions.
        device: "cpu" or "cuda".
        results: by model, in the order in which they were named.
        comparisons: of every model after the first with the first, see `compare_choices`.
    """

    data: str
    device: str
    results: dict[str, ChoiceResult]
    comparisons: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """What `evaluate-hellaswag --json` prints."""
        models = {name: result.summary() for name, result in self.results.items()}
        return {"data": self.data, "device": self.device, "models": models, "comparisons": self.comparisons}

    def per_question_json(self) -> list[dict[str, Any]]:
        """One JSON object for each model and question."""
        return [
            {"model": name, **score} for name, result in self.results.items() for score in result.per_question_json()
        ]


def score_models(
    models: Sequence[str | Path],
    questions: QuestionSet,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> ModelsOnQuestions:
    """Ask several models, one after the other, the same questions, and compare each of them with the first.

    Args:
        models: names or directories; one that is repeated is asked once.
        limit: ask only the first this many questions.
        seed: of the bootstrap.

    Raises:
        UserError: a model does not load, or as `evaluate_choices`.
    """
    from ln_removal.models.checks import say_what_is_left_out
    from ln_removal.models.loading import load_model

    results: dict[str, ChoiceResult] = {}
    for name in dict.fromkeys(map(str, models)):
        loaded = load_model(name, device=device)
        say_what_is_left_out(loaded.tokenizer, name)
        results[name] = evaluate_choices(
            loaded.model,
            loaded.tokenizer,
            questions.questions,
            protocol=questions.protocol,
            limit=limit,
            progress=name if progress else False,
        )
        del loaded  # two models need not fit into memory
    first, *others = results
    comparisons = [
        {"first": first, "second": name, **compare_choices(results[first], results[name], seed=seed)} for name in others
    ]
    return ModelsOnQuestions(questions.name, device, results, comparisons)


def clean(text: str) -> str:
    """lm-eval's cleaning: " [title]" becomes a full stop, other bracketed marks are removed, double spaces become one."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def texts_of(question: Question, protocol: Protocol) -> Texts:
    """The context and the endings that a protocol reads."""
    if protocol == "lm-eval":
        query = f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}"
        return clean(query), tuple(clean(ending) for ending in question.endings)
    return question.ctx, question.endings


def _lengths(endings: Sequence[str], prompt: Prompt, protocol: Protocol) -> list[int]:
    """What acc_norm divides by: characters (lm-eval), tokens (nanogpt), UTF-8 bytes (code)."""
    if protocol == "lm-eval":
        return [len(ending) for ending in endings]
    if protocol == "code":
        return [len(ending.encode()) for ending in endings]
    return [len(tokens) for tokens in prompt.endings]


def _encode_lm_eval(tokenizer: PreTrainedTokenizerBase, texts: list[Texts], names: list[str]) -> list[Prompt]:
    # White space at the end of the query counts as the endings', where it is part of a token.
    contexts = _tokens(tokenizer, [context.rstrip() for context, _ in texts])
    wholes = iter(_tokens(tokenizer, [context + " " + ending for context, endings in texts for ending in endings]))
    return [
        _prompt(tokenizer, name, tokens, [next(wholes)[len(tokens) :] for _ in endings])
        for tokens, (_, endings), name in zip(contexts, texts, names, strict=True)
    ]


def _encode_nanogpt(tokenizer: PreTrainedTokenizerBase, texts: list[Texts], names: list[str]) -> list[Prompt]:
    contexts = _tokens(tokenizer, [context for context, _ in texts])
    apart = iter(_tokens(tokenizer, [" " + ending for _, endings in texts for ending in endings]))
    return [
        _prompt(tokenizer, name, tokens, [next(apart) for _ in endings])
        for tokens, (_, endings), name in zip(contexts, texts, names, strict=True)
    ]


def _encode_code(tokenizer: PreTrainedTokenizerBase, texts: list[Texts], names: list[str]) -> list[Prompt]:
    """The context is the tokens that begin inside it and that all endings agree on.

    A tokenizer for code may join the last line break of the context with the indentation of the ending, or even with
    the symbol before it ("):\\n    "). Cutting the text there would show the model a token sequence it never met in
    training; a token that all endings share adds the same to every score and can as well be given.
    """
    encoded = tokenizer(
        [context + ending for context, endings in texts for ending in endings],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    found = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    prompts: list[Prompt] = []
    for (context, endings), name in zip(texts, names, strict=True):
        wholes, offsets = zip(*islice(found, len(endings)), strict=True)
        inside = sum(start < len(context) for start, _ in offsets[0])
        shared = 0
        while shared < min(inside, *(len(whole) - 1 for whole in wholes)) and len({w[shared] for w in wholes}) == 1:
            shared += 1
        prompts.append(_prompt(tokenizer, name, wholes[0][:shared], [whole[shared:] for whole in wholes]))
    return prompts


def _prompt(tokenizer: PreTrainedTokenizerBase, name: str, context: list[int], endings: list[list[int]]) -> Prompt:
    """A checked prompt; an empty context becomes the end-of-text token, as in lm-eval."""
    if not context:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not isinstance(start, int):
            raise UserError(f"{name}: the context is empty and the tokenizer has no token to begin with; leave it out")
        context = [start]
    if not all(endings):
        raise UserError(f"{name}: ending {endings.index([])} gives no token of its own after the context; leave it out")
    return Prompt(name, context, endings)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _proportion(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Share and its standard error, sqrt(p (1 - p) / (n - 1)): the sample standard deviation over sqrt(n)."""
    count = len(correct)
    share = sum(correct) / count
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
