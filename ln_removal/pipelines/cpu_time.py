"""How long a run takes on this machine's CPU: measured on a model of random weights, before anything is downloaded or trained."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ln_removal.config.estimate import estimate_memory, has_teacher, readable_duration
from ln_removal.files.atomic import readable
from ln_removal.models.norm_choice import build_model
from ln_removal.models.precision import autocast
from ln_removal.norms.surgery import install
from ln_removal.pipelines.plan import Plan, architecture_of, plan, run_flops
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher
from ln_removal.training.setup import training_attention

if TYPE_CHECKING:
    from ln_removal.config.recipe import ArchitectureSpec, Recipe
    from ln_removal.pipelines.context import RunContext

logger = logging.getLogger(__name__)

SECONDS_TO_MEASURE = 20.0
FIRST_TOKENS = 32
DAY = 86_400.0

CERTAINLY_LESS_THAN_A_DAY = 1e15
"""FLOPs of a run that even a slow core (12 GFLOP/s) makes in a day; such a run is not measured before it starts."""


class Speed(NamedTuple):
    """Tokens a second that were measured, or None; and what was measured, or why not, in a sentence."""

    tokens_per_second: float | None
    note: str


def plan_on_cpu(recipe: Recipe, *, control: bool = False) -> Plan:
    """As `plan.plan`, with the time of the run on this machine's CPU. Takes about half a minute for a large model.

    Raises:
        UserError: as `plan.plan`.
    """
    drawn = plan(recipe, control=control)
    speed = measure(recipe, drawn.architecture, drawn.micro_batch)
    return plan(
        recipe,
        drawn.architecture,
        control=control,
        tokens_per_second=speed.tokens_per_second,
        note=speed.note,
    )


def warn_of_days(context: RunContext, recipe: Recipe, *, control: bool = False) -> None:
    """Log a sentence before a new run that will take more than a day on this machine's CPU.

    Only a run that may be so long is measured. One whose step does not fit into the memory is not, and gets no sentence.

    Raises:
        UserError: as `plan.plan`.
    """
    if context.resume or not context.is_main or context.accelerator.device.type != "cpu":
        return
    if run_flops(recipe, architecture_of(recipe), control=control) < CERTAINLY_LESS_THAN_A_DAY:
        return
    seconds = plan_on_cpu(recipe, control=control).seconds
    if seconds is not None and seconds > DAY:
        logger.warning(
            "this run will take about %s on this CPU; press Ctrl-C and give it fewer steps (--steps N) or a machine with a GPU, or "
            "let it run",
            readable_duration(seconds),
        )


def measure(recipe: Recipe, shape: ArchitectureSpec, micro_batch: int) -> Speed:
    """The training speed on this CPU, from forward and backward passes, with those of the teacher, of growing batches.

    They grow up to a micro-batch as long as the next one should end within SECONDS_TO_MEASURE. If that is not reached, its time
    is a line through the last two sizes: a pass has fixed costs, such as those of writing all gradients.
    """
    needed, free = _memory_needed(recipe, shape, micro_batch), available_memory()
    if needed > free:
        note = (
            f"the time on this CPU was not measured: that takes {readable(needed)} of memory, {readable(free)} are free"
        )
        return Speed(None, note)
    context, began = recipe.data.context, time.perf_counter()
    found: dict[int, float] = {}  # seconds of a pass by its tokens
    with torch.random.fork_rng(devices=[]), ExitStack() as attention:
        objective = _objective(recipe, shape)
        for model in filter(None, (objective.model, objective.teacher)):
            attention.enter_context(training_attention(model, context=context))
        for sequences, length in _sizes(micro_batch, context):
            spent = time.perf_counter() - began
            if len(found) > 1 and spent + 2 * max(found.values()) > SECONDS_TO_MEASURE:
                break
            found[sequences * length] = _seconds_of_pass(objective, recipe, sequences, length)
    tokens, seconds = micro_batch * context, _seconds_at(micro_batch * context, found)
    teacher = ", with the teacher's" if objective.teacher is not None else ""
    note = (
        f"CPU time of forward and backward passes{teacher}, of up to {max(found):,} tokens through random weights: "
        f"{tokens / seconds:,.0f} tokens/s in a micro-batch, not compiled, without evaluation and checkpoints"
    )
    return Speed(tokens / seconds, note)


def _sizes(micro_batch: int, context: int) -> Iterator[tuple[int, int]]:
    """Sequences and their length, pass by pass. The first and the last size come twice: to warm up, and to be sure."""
    length, sequences = min(FIRST_TOKENS, context), 1
    yield sequences, length
    while True:
        yield sequences, length
        if length < context:
            length = min(2 * length, context)
        elif sequences < micro_batch:
            sequences = min(2 * sequences, micro_batch)
        else:
            yield sequences, length
            return


def _seconds_at(tokens: int, found: dict[int, float]) -> float:
    """Seconds of a pass of so many tokens, by a line through those of the two largest sizes."""
    *_, large = sizes = sorted(found)
    if large == tokens or len(sizes) == 1:
        return found[large] * tokens / large
    small = sizes[-2]
    slope = max(0.0, found[large] - found[small]) / (large - small)
    return found[large] + slope * (tokens - large) if slope else found[large] * tokens / large


def _seconds_of_pass(objective: Objective, recipe: Recipe, sequences: int, length: int) -> float:
    tokens = torch.randint(objective.model.config.vocab_size, (sequences, length + 1))
    began = time.perf_counter()
    with autocast(torch.device("cpu"), recipe.training.precision):
        loss = objective(tokens)
    loss.total.backward()
    seconds = time.perf_counter() - began
    objective.zero_grad(set_to_none=True)
    return seconds


def _objective(recipe: Recipe, shape: ArchitectureSpec) -> Objective:
    """A model of this architecture with random weights, and the loss of the recipe; a penalty on entropies is left out."""
    spec = recipe.training
    model = build_model(shape, eot_token_id=0)
    if recipe.schedule is None:
        return Objective(model, eot_token_id=0).train()
    distillation = None
    if has_teacher(recipe):
        distillation = Distillation(
            as_teacher(copy.deepcopy(model), spec.precision), spec.distillation, spec.distillation_lag
        )
    install(model, eot_token_id=0, **recipe.freezing)
    return Objective(model, eot_token_id=0, auxiliary=Auxiliary.of(spec), distillation=distillation).train()


def _memory_needed(recipe: Recipe, shape: ArchitectureSpec, micro_batch: int) -> int:
    """Bytes: those of a step that is not compiled, without the optimizer, and a second copy of the weights for a moment."""
    training = recipe.training.model_copy(update={"compile": False})
    memory = estimate_memory(recipe.model_copy(update={"training": training}), shape, micro_batch)
    return memory.total - memory.optimizer + (memory.parameters if has_teacher(recipe) else 0)


def available_memory() -> int:
    """Bytes that this machine can give without swapping; half of its memory where the system does not say (not Linux)."""

    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
