"""Tasks: prompts that end before a token which only what came earlier decides, with a right and a wrong answer of one token each.

A clean prompt has a corrupt twin of the same length, in which one token is another and the wrong answer becomes the right one.
Activation patching moves activations from the clean run into the corrupt one. Some tasks have prompts without a twin
(`Task.paired`); these measure behaviour only.

    task = make_task("brackets", models.tokenizer, count=32, prepend_bos=False, seed=0)
    task = read_task("prompts.jsonl", models.tokenizer, prepend_bos=False)
    clean, corrupt = logit_differences(models.ln_free, task)          # (P,) each, in logits

The prompts are made of templates with a seed. Those which the tokenizer cuts in another way, so that an answer has two tokens
or a twin another length, are not used.

Shape legend: P prompts, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError
from ln_removal.interpret import templates

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Array = npt.NDArray[np.float64]

TRIES = 100
"""Draws for each prompt that is wanted. A task has fewer prompts if no more were found in so many draws."""

FIELDS = ("clean", "corrupt", "answer", "wrong")
"""The entries of a line of a user's file; `corrupt` may be left out."""


class NotUsable(ValueError):
    """A prompt that a tokenizer cuts in a way that does not fit the task; the message says how."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, of its corrupt twin, and of both answers.

    Attributes:
        clean: T ids, the BOS included if the task has one.
        answer, wrong: the right next token and the one that it is compared with. Behind the twin, `wrong` is right.
        corrupt: T ids of the twin; None if there is none.
    """

    clean: tuple[int, ...]
    answer: int
    wrong: int
    corrupt: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one length as tensors: clean and corrupt (P, T), answer and wrong (P,); `places` in the task."""

    places: list[int]
    clean: Tensor
    corrupt: Tensor | None
    answer: Tensor
    wrong: Tensor


@dataclass(frozen=True)
class Task:
    """Prompts of one kind.

    Attributes:
        name: of the task, or of the user's file.
        title: what it asks for, in a few words.
        prepend_bos: whether the end-of-text token, which TransformerLens calls BOS, stands in front of each prompt.
        seed: of the draw; None for a user's own prompts.
    """

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    prepend_bos: bool
    seed: int | None

    @property
    def paired(self) -> bool:
        """Whether every prompt has a corrupt twin."""
        return all(one.corrupt is not None for one in self.prompts)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(one.clean) for one in self.prompts)

    def batches(self, bridge: TransformerBridge, size: int = 64) -> Iterator[PromptBatch]:
        """Prompts of equal length together, at most `size` at once, on the device of a model.

        Raises:
            UserError: a prompt is longer than the context of the model.
        """
        import torch

        if self.length > (context := int(bridge.cfg.n_ctx)):
            raise UserError(
                f"the task {self.name} has a prompt of {self.length} tokens; the models read {context}; shorten it"
            )
        device = next(bridge.parameters()).device
        for length in sorted({len(one.clean) for one in self.prompts}):
            places = [place for place, one in enumerate(self.prompts) if len(one.clean) == length]
            for start in range(0, len(places), size):
                some = [self.prompts[place] for place in places[start : start + size]]
                twins = [one.corrupt for one in some if one.corrupt is not None]
                yield PromptBatch(
                    places[start : start + size],
                    torch.tensor([one.clean for one in some], device=device),
                    torch.tensor(twins, device=device) if len(twins) == len(some) else None,
                    torch.tensor([one.answer for one in some], device=device),
                    torch.tensor([one.wrong for one in some], device=device),
                )

    def to_json(self) -> dict[str, Any]:
        """What was asked, without the token ids."""
        return {
            "name": self.name,
            "asks_for": self.title,
            "prompts": len(self.prompts),
            "tokens_of_the_longest": self.length,
            "prepend_bos": self.prepend_bos,
            "seed": self.seed,
        }


def logit_differences(bridge: TransformerBridge, task: Task) -> tuple[Array, Array | None]:
    """(P,) logit of the answer minus that of the wrong one behind the clean prompts, and behind their corrupt twins (or None).

    A model has a prompt right if the first is above 0, and its twin if the second is below 0.
    """
    import torch

    found = np.empty((2, len(task.prompts)))
    with torch.no_grad():
        for batch in task.batches(bridge):
            for row, tokens in zip(found, (batch.clean, batch.corrupt if task.paired else None), strict=True):
                if tokens is not None:
                    logits = bridge(tokens)[:, -1].double()  # (P, V)
                    answers = torch.stack([batch.answer, batch.wrong], dim=1)
                    right, wrong = logits.gather(1, answers).unbind(1)
                    row[batch.places] = (right - wrong).cpu().numpy()
    return found[0], found[1] if task.paired else None


def make_task(
    name: str, tokenizer: PreTrainedTokenizerBase, *, count: int = 32, prepend_bos: bool, seed: int = 0
) -> Task:
    """Draw the prompts of a task by its name in TASKS; the same arguments give the same prompts.

    Args:
        tokenizer: of the models that will read them.
        count: of prompts, all different. Fewer come back where the templates have no more for this tokenizer.
        prepend_bos: put the end-of-text token in front, as TransformerLens does by default.

    Raises:
        UserError: there is no such task, or none of its prompts suits the tokenizer.
    """
    if name not in TASKS:
        raise UserError(f"there is no task {name}; choose from {', '.join(TASKS)}, or give a jsonl file of prompts")
    title, draws = TASKS[name]
    found: dict[tuple[int, ...], Prompt] = {}
    reason = ""
    tries = draws(tokenizer, seed)
    for _ in range(TRIES * count):
        try:
            one = as_prompt(tokenizer, *next(tries), prepend_bos=prepend_bos, one_token=True)
        except NotUsable as error:
            reason = str(error)
            continue
        found.setdefault(one.clean, one)
        if len(found) == count:
            break
    if not found:
        raise UserError(
            f"the task {name} has no prompt for this tokenizer ({reason}); choose another task, or give a jsonl file of "
            "prompts"
        )
    return Task(name, title, tuple(found.values()), prepend_bos, seed)


def read_task(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool) -> Task:
    """A user's own prompts: a file of one JSON object a line with clean, corrupt, answer, wrong, all texts.

    `{"clean": "Then Tom and Ann met. Tom saw", "corrupt": "Then Tom and Ann met. Ann saw", "answer": " Ann", "wrong": " Tom"}`

    Clean and corrupt have the same number of tokens, and may differ in several. Without `corrupt` in any line, the prompts
    measure behaviour only.

    Raises:
        UserError: the file cannot be read or has no prompts; or a line is no such object, has an answer of several tokens, or a
            corrupt prompt of another length. The message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read prompts from {path}: {error}; give a jsonl file with {', '.join(FIELDS)}"
        ) from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            one = as_prompt(tokenizer, *_texts(line, where), prepend_bos=prepend_bos)
        except NotUsable as error:
            raise UserError(f"{where}: {error}") from error
        if prompts and (one.corrupt is None) != (prompts[0].corrupt is None):
            raise UserError(f"{where}: some prompts have a corrupt twin and some have none; give one to all or to none")
        prompts.append(one)
    if not prompts:
        raise UserError(f"{path} has no prompts; give one JSON object a line, with {', '.join(FIELDS)}")
    return Task(path.name, "the user's own prompts", tuple(prompts), prepend_bos, None)


def as_prompt(
    tokenizer: PreTrainedTokenizerBase,
    clean: str,
    corrupt: str | None,
    answer: str,
    wrong: str,
    *,
    prepend_bos: bool,
    one_token: bool = False,
) -> Prompt:
    """Texts as token ids.

    Args:
        one_token: the twins may differ in one token only, and an answer must be what the tokenizer makes of the text behind
            its prompt: a token must not reach across the end of the prompt.

    Raises:
        NotUsable: an answer is not one token, both are the same, the prompt is empty, or the twins have different lengths,
            are the same, or break a rule of `one_token`.
    """
    cut = _Cut(tokenizer)
    texts = [clean] if corrupt is None else [clean, corrupt]
    rows = [cut.ids(text) for text in texts]
    if not rows[0]:
        raise NotUsable("the clean prompt is empty")
    right, other = cut.single(answer, "the answer"), cut.single(wrong, "the wrong answer")
    if right == other:
        raise NotUsable(f"the answer and the wrong answer are both {answer!r}")
    if corrupt is not None:
        differ = cut.differences(*rows)
        if one_token and differ != 1:
            raise NotUsable(f"the clean and the corrupt prompt differ in {differ} tokens")
    if one_token:
        for text, row in zip(texts, rows, strict=True):
            for ending, token in ((answer, right), (wrong, other)):
                if (found := cut.ids(text + ending)) != [*row, token]:
                    raise NotUsable(f"the tokenizer joins the end of the prompt with the answer: {cut.shown(found)}")
    front = [_bos(tokenizer)] if prepend_bos else []
    clean_ids, *twin = (tuple(front + row) for row in rows)
    return Prompt(clean_ids, right, other, twin[0] if twin else None)


@dataclass(frozen=True)
class _Cut:
    """How a tokenizer cuts texts."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def shown(self, tokens: list[int]) -> str:
        return " ".join(repr(self.tokenizer.decode([token])) for token in tokens)

    def single(self, text: str, what: str) -> int:
        """The id of an answer, which is one token."""
        tokens = self.ids(text)
        if len(tokens) != 1:
            raise NotUsable(
                f"{what} {text!r} has {len(tokens)} tokens ({self.shown(tokens)}); answers have one, and in most texts begin "
                "with a space"
            )
        return tokens[0]

    def differences(self, clean: list[int], corrupt: list[int]) -> int:
        """In how many tokens twins differ, which have the same number of tokens."""
        if len(clean) != len(corrupt):
            raise NotUsable(
                f"the clean prompt has {len(clean)} tokens and the corrupt one {len(corrupt)} ({self.shown(clean)} against "
                f"{self.shown(corrupt)}); they must have the same number"
            )
        differ = sum(one != two for one, two in zip(clean, corrupt, strict=True))
        if not differ:
            raise NotUsable("the clean and the corrupt prompt are the same")
        return differ


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError("the tokenizer has no end-of-text token to put in front; ask for prompts without BOS")
    return int(found)


def _texts(line: str, where: str) -> tuple[str, str | None, str, str]:
    """Clean, corrupt (or None), answer and wrong answer of a line of a user's file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise UserError(f"{where}: not JSON ({reason}); expected one prompt a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    unknown = sorted(set(record) - set(FIELDS))
    missing = [name for name in FIELDS if name != "corrupt" and name not in record]
    if unknown or missing:
        found = f"no {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise UserError(f"{where}: {found}; a prompt has {', '.join(FIELDS)}")
    for name in FIELDS:
        value = record.get(name)
        if not isinstance(value, str) and not (name == "corrupt" and value is None):
            raise UserError(f"{where}: {name} is {json.dumps(value)[:60]}; give a text")
    return record["clean"], record.get("corrupt"), record["answer"], record["wrong"]


Texts = tuple[str, str | None, str, str]
"""Clean, corrupt, answer, wrong answer."""

Draws = Callable[["PreTrainedTokenizerBase", int], Iterator[Texts]]


def _from(template: Callable[[Random], Texts]) -> Draws:
    """Endless draws of a template that does not ask what the tokenizer is."""

    def draws(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Texts]:
        random = Random(seed)
        while True:
            yield template(random)

    return draws


def _ioi(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Texts]:
    """Indirect object identification (Wang et al. 2023, arXiv 2211.00593), drawn by TransformerLens' IOIDataset.

    The corrupt twin names the other person as the giver.
    """
    import random

    from transformer_lens.evals import IOIDataset

    while True:
        before = random.getstate()
        drawn = IOIDataset(
            tokenizer,
            templates=templates.ioi_templates(),
            names=list(templates.PEOPLE),
            nouns={name: list(words) for name, words in templates.NOUNS.items()},
            num_samples=64,
            prepend_bos=False,
            seed=seed,
        )
        random.setstate(before)  # the data set seeds the generator of the whole process
        for one in drawn.samples:
            text, indirect, subject = one["text"], one["IO"], one["S"]
            clean = text[: text.rindex(indirect)]
            place = clean.rindex(subject)
            corrupt = clean[:place] + indirect + clean[place + len(subject) :]
            yield clean, corrupt, indirect, subject
        seed += 1_000_003


TASKS: dict[str, tuple[str, Draws]] = {
    "brackets": ("the closing bracket", _from(templates.bracket)),
    "repeat": ("the next token of a repeated text", _from(templates.repeat)),
    "quotes": ("the closing quote", _from(templates.quote)),
    "self": ("the argument that an attribute is set to", _from(templates.attribute)),
    "return": ("the variable to return", _from(templates.returned)),
    "with": ("the name of an opened file", _from(templates.opened)),
    "ioi": ("the indirect object", _ioi),
    "greater-than": ("a year after the first", _from(templates.greater_than)),
}
"""Name, title and draws of each task. The first six suit models of Python, the last two the real GPT-2."""

PAIRED = ("brackets", "repeat", "quotes", "self", "ioi", "greater-than")
"""Tasks whose prompts have corrupt twins."""
