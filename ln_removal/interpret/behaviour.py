"""What models do where researchers look: calibration, document starts, copying, and tasks, each with and without BOS.

    calibration error    mean distance between the probability of the likeliest token and how often it is right, over 10 bins of
                         that probability, weighted by tokens (Guo et al. 2017, arXiv 1706.04599)
    loss                 of the prompts of `evaluation.prompts`: document starts, second copies of random tokens and of text, nats
    logit difference     of the right and the wrong answer behind a prompt of `interpret.tasks`; a prompt is answered rightly if it
                         is above 0

BOS is the end-of-text token in front of a text. The same tokens are scored with it and without it.

Shape legend: N documents, T predicted positions, P prompts, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval, bootstrap_means
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.entropies import nullable
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.passes import Array, ByModel, each_model, mean_interval, passes
from ln_removal.interpret.tasks import TASKS, Task, logit_differences, make_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from ln_removal.data.tokens import Tokens
    from ln_removal.evaluation.prompts import PromptSet

BINS = 10
"""Of the calibration error, as in the published comparison."""

PROMPTS = 64
"""Most prompts of a kind whose loss is taken."""

TASK_PROMPTS = 32
"""Prompts of a task."""


@dataclass(frozen=True)
class Behaviour:
    """Of one model; keys are without (False) and with BOS (True).

    Attributes:
        confidence: (N, T) probability of the likeliest token.
        right: (N, T) whether it was the next token.
        losses: (P,) mean loss of each prompt, nats, by kind and BOS.
        scored: (P,) scored tokens of each prompt, by kind.
        differences: (P,) logit of the right minus the wrong answer, by task and BOS.
    """

    confidence: Mapping[bool, Array]
    right: Mapping[bool, npt.NDArray[np.bool_]]
    losses: Mapping[tuple[str, bool], Array]
    scored: Mapping[str, npt.NDArray[np.int64]]
    differences: Mapping[tuple[str, bool], Array]

    def calibration(self, bos: bool, *, seed: int = 0) -> Interval:
        """Expected calibration error with its 95 % interval over documents, between 0 and 1."""
        return calibration_error(self.confidence[bos], self.right[bos], seed=seed)

    def reliability(self, bos: bool) -> tuple[Array, Array, Array]:
        """(B,) mean confidence, accuracy and share of tokens of each bin; NaN for an empty bin."""
        bins = _bins(self.confidence[bos])
        counts = np.bincount(bins.ravel(), minlength=BINS)
        sums = (
            np.bincount(bins.ravel(), weights=one.ravel(), minlength=BINS)
            for one in (self.confidence[bos], self.right[bos])
        )
        confidence, accuracy = (np.divide(one, counts, out=np.full(BINS, np.nan), where=counts > 0) for one in sums)
        return confidence, accuracy, counts / counts.sum()

    def loss(self, kind: str, bos: bool, *, seed: int = 0) -> Interval:
        """Mean loss per scored token, nats, with its 95 % interval over prompts."""
        counts = self.scored[kind]
        (found,) = bootstrap_means((self.losses[kind, bos] * counts)[None], counts, seed=seed)
        return found

    def accuracy(self, task: str, bos: bool, *, seed: int = 0) -> Interval:
        """Share of prompts whose right answer has the higher logit of the two, with its 95 % interval over prompts."""
        return mean_interval((self.differences[task, bos] > 0).astype(float), seed=seed)

    def logit_difference(self, task: str, bos: bool, *, seed: int = 0) -> Interval:
        """Mean logit difference with its 95 % interval over prompts."""
        return mean_interval(self.differences[task, bos], seed=seed)

    @property
    def kinds(self) -> list[str]:
        """Kinds of prompt whose loss was taken."""
        return list(self.scored)

    @property
    def tasks(self) -> list[str]:
        """Tasks that were asked."""
        return list(dict.fromkeys(task for task, _ in self.differences))

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Calibration, losses and tasks, each without and with BOS."""
        names = {False: "without_bos", True: "with_bos"}

        def both(measure: Any) -> dict[str, Any]:
            return {name: measure(bos) for bos, name in names.items()}

        return {
            "calibration_error": both(lambda bos: interval_json(self.calibration(bos, seed=seed))),
            "reliability": both(
                lambda bos: dict(
                    zip(
                        ("confidence", "accuracy", "share_of_tokens"), map(nullable, self.reliability(bos)), strict=True
                    )
                )
            ),
            "loss_nats": {
                kind: both(lambda bos, kind=kind: interval_json(self.loss(kind, bos, seed=seed))) for kind in self.kinds
            },
            "tasks": {
                task: both(
                    lambda bos, task=task: {
                        "accuracy": interval_json(self.accuracy(task, bos, seed=seed)),
                        "logit_difference_logits": interval_json(self.logit_difference(task, bos, seed=seed)),
                    }
                )
                for task in self.tasks
            },
        }


def behaviour_of_run(
    models: Models,
    documents: Documents,
    tasks: Sequence[tuple[Task, Task]],
    *,
    prompts: int = PROMPTS,
    progress: bool = False,
) -> ByModel[Behaviour]:
    """What every model of a run does on the same documents and prompts.

    Args:
        models: from `load` of a run.
        documents: from `Models.documents` without BOS, for the calibration. With a BOS in front they must fit into the context.
        tasks: each without and with BOS, from `both_ways`.
        prompts: of each kind whose loss is taken, at most.

    Raises:
        UserError: the models have no tokenizer or tokens, or the documents have a BOS or leave no room for one.
    """
    from ln_removal.evaluation.prompts import LENGTH, prompt_losses, prompt_sets

    if models.data is None or models.tokenizer is None:
        raise UserError("prompts are made of a run's tokens and its tokenizer; load the models of a run")
    positions, end_of_text = int(models.any.cfg.n_ctx), models.data.eot_token_id
    if documents.prepend_bos or documents.tokens.shape[1] >= positions:
        raise UserError(
            f"found documents of {documents.tokens.shape[1]} tokens {'with' if documents.prepend_bos else 'without'} BOS; ask for "
            f"some without, which leave room for one in the {positions} positions of the models"
        )
    sets: dict[str, PromptSet] = prompt_sets(
        models.tokenizer,
        models.data.split("validation"),
        positions=positions - 1,
        max_tokens=prompts * min(LENGTH, positions - 1),
        seed=documents.seed,
    )

    def look(bridge: TransformerBridge) -> Behaviour:
        inputs = documents.inputs(bridge)
        confidence, right = {}, {}
        for bos in (False, True):
            confidence[bos], right[bos] = confidences(bridge, inputs, end_of_text if bos else None)
        losses = prompt_losses(bridge.original_model, sets, eot_token_id=end_of_text)
        differences = {
            (task.name, task.prepend_bos): logit_differences(bridge, task)[0] for pair in tasks for task in pair
        }
        return Behaviour(confidence, right, losses, {kind: some.counts for kind, some in sets.items()}, differences)

    return each_model(models, documents, look, "behaviour", progress=progress)


def both_ways(
    models: Models, names: Sequence[str] | None = None, *, count: int = TASK_PROMPTS, seed: int = 0
) -> list[tuple[Task, Task]]:
    """The same prompts of each task without and with BOS.

    Args:
        models: from `load`, with a tokenizer.
        names: of tasks. By default all that have prompts for the tokenizer, which may be none.
        count: of prompts.
        seed: of the draw.

    Raises:
        UserError: a task that is named does not exist or has no prompt for the tokenizer; or there is no tokenizer.
    """
    if models.tokenizer is None:
        raise UserError("there is no tokenizer to make prompts with; load the models from directories")
    found = []
    for name in TASKS if names is None else names:
        try:
            pair = [make_task(name, models.tokenizer, count=count, prepend_bos=bos, seed=seed) for bos in (False, True)]
        except UserError:
            if names is not None:
                raise
            continue
        if max(one.length for one in pair) <= int(models.any.cfg.n_ctx) or names is not None:
            found.append((pair[0], pair[1]))
    return found


def confidences(
    bridge: TransformerBridge, tokens: Tensor, bos: int | None = None
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """(N, T) probability of the likeliest token, and whether it is the next one.

    Args:
        tokens: (N, T + 1) on the bridge's device; the last ones are only predicted.
        bos: a token to put in front, which changes what is read and not what is predicted.
    """
    import torch

    read = tokens if bos is None else torch.cat([torch.full_like(tokens[:, :1], bos), tokens], dim=1)
    found = []
    for rows, logits in passes(bridge, read, {}, numbers=read.shape[1] * int(bridge.cfg.d_vocab)):
        highest, top = logits[:, -tokens.shape[1] : -1].log_softmax(-1).max(-1)
        found.append((highest.exp().double().cpu().numpy(), (top == tokens[rows, 1:]).cpu().numpy()))
    confidence, right = (np.concatenate(one) for one in zip(*found, strict=True))
    return confidence, right


def calibration_error(confidence: Array, right: npt.NDArray[np.bool_], *, seed: int = 0) -> Interval:
    """Expected calibration error of (N, T) confidences in BINS bins, with its 95 % percentile interval over documents.

    A resampled error is larger in the mean than the error itself, because distances do not cancel; so the interval lies high
    where there are few documents.
    """
    from ln_removal.evaluation.statistics import expected_calibration_error

    value = expected_calibration_error(confidence.ravel(), right.ravel(), bins=BINS)
    units = len(confidence)
    surplus = np.zeros((units, BINS))
    np.add.at(surplus, (np.arange(units)[:, None], _bins(confidence)), confidence - right)
    drawn = np.random.default_rng(seed).multinomial(
        units, np.full(units, 1 / units), size=RESAMPLES
    )  # (R, N) times drawn
    errors = np.abs(drawn @ surplus).sum(axis=1) / confidence.size
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(errors, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def _bins(confidence: Array) -> Tokens:
    return np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
