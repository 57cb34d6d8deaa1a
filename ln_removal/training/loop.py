"""The training loop: step, evaluate, save. Removal, its control and pretraining all run through it.

A step that logs nothing does not wait for the device: losses and gradient norms stay there until the next log step.

Shape legend: B batch, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ln_removal.data.sampler import WindowSampler, read_ahead
from ln_removal.files.signals import deferred
from ln_removal.models.precision import LOSS_SCALE, autocast
from ln_removal.training.checkpoint import TrainerState, load_newest, prune, save_checkpoint
from ln_removal.training.divergence import BadSteps, SpikeSchedule, StepFigures, are_finite, roll_back
from ln_removal.training.optimizers import (
    build_optimizers,
    distillation_at,
    learning_rate_at,
    set_learning_rate,
    step_unless_bad,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel

    from ln_removal.config.recipe import TrainingSpec
    from ln_removal.norms.schedule import RemovalSchedule
    from ln_removal.norms.surgery import NormSites
    from ln_removal.training.loss import Objective
    from ln_removal.training.metrics import Metrics, Tracker
    from ln_removal.training.probe import Figures, Observer

LOG_EVERY = 10
"""Steps between two synchronisations with the device, at which metrics are written and the bar moves."""


@dataclass(frozen=True)
class Removal:
    """What turns a fine-tuning into a removal: the installed sites and when each one freezes."""

    sites: NormSites
    schedule: RemovalSchedule | SpikeSchedule


@dataclass(frozen=True)
class TrainResult:
    """What a finished loop reports.

    Attributes:
        tokens: trained on, over all sessions. seconds: of training, over all sessions.
        tokens_per_second: in this session, evaluation and checkpoints left out.
        skipped_steps: whose loss or gradient was not finite.
        last_loss: the last finite one of this session, nats per token; None when there was no step left to train.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    skipped_steps: int
    last_loss: float | None


def train(
    objective: Objective,
    sampler: WindowSampler,
    spec: TrainingSpec,
    *,
    accelerator: Accelerator,
    tracker: Tracker,
    state_directory: Path,
    micro_batch: int,
    removal: Removal | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    observer: Observer | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train `objective` for `spec.steps` optimizer steps.

    Args:
        objective: model and loss, already on the accelerator's device.
        sampler: gives the sequences of every step.
        spec: the recipe's [training].
        accelerator: device, autocast and gradient averaging over ranks.
        tracker: open; receives metrics.
        state_directory: where checkpoints go.
        micro_batch: sequences of one forward pass.
        removal: None trains with whatever norms the model has.
        evaluate: called every `evaluate_every` steps and at the end with the model in evaluation mode.
        observer: looks at the model between backward pass and update of the steps that it chooses.
        resume: continue from the newest whole checkpoint if there is one.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the step was finished and a checkpoint saved.
        DivergedError: loss or gradient was not finite for several steps in a row; the run is back at its last sound
            checkpoint, and so is the model.
    """
    besides = () if objective.entropy is None else objective.entropy.parameters()
    optimizers = build_optimizers(objective.model, spec, besides=besides)
    state = TrainerState()
    if resume:
        found, faults = load_newest(state_directory, objective.trained, optimizers)
        state = found or state
        for fault in faults:
            tracker.say(f"warning: {fault}")
        if found is not None and not faults and accelerator.is_main_process:
            prune(state_directory, keep=spec.keep_checkpoints)  # the run may have been killed just before it did
    delayed = removal.schedule if removal is not None and isinstance(removal.schedule, SpikeSchedule) else None
    if delayed is not None:
        delayed.restore(state.schedule, state.step)
    tracker.forget_after(state.step)
    model = _over_ranks(objective, accelerator)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    pending, bad_steps = StepFigures(accelerator), BadSteps()
    stage_at = (lambda step: "training") if removal is None else removal.schedule.stage
    go_back = partial(
        roll_back,
        bad_steps,
        spec,
        state_directory=state_directory,
        model=objective.trained,
        optimizers=optimizers,
        accelerator=accelerator,
        tracker=tracker,
        stage_at=stage_at,
    )
    began = time.perf_counter()
    seconds_before, skipped_before, first_step = state.seconds, state.skipped, state.step
    paused = 0.0
    last_loss: float | None = None
    objective.train()

    steps = range(state.step, spec.steps)
    batches_ahead = read_ahead(_batches_of_steps(sampler, steps, accelerator, micro_batch))
    stops = deferred("step", ranks=accelerator.num_processes, speak=accelerator.is_main_process)
    with stops as stop, closing(batches_ahead) as batches_of_steps:
        for step, batches in zip(steps, batches_of_steps, strict=True):
            if removal is not None:
                _apply_schedule(removal, step, tracker)
            rate = learning_rate_at(step, spec)
            set_learning_rate(optimizers, rate)
            if objective.teacher is not None:
                objective.set_share(distillation_at(step, spec))
            loss, norm = _forward_backward(model, batches, accelerator, parameters, spec)
            if observer is not None and observer.wants(step):
                _look(observer, objective.model, step, tracker)
            bad = pending.add(loss, norm, rate)
            step_unless_bad(optimizers, bad)
            if removal is not None and step < removal.schedule.complete_at:
                # Every step, so that the number of ranks changes nothing, and a checkpoint of one rank serves all.
                removal.sites.average_over_ranks()
                removal.sites.update_running(spec.std_momentum, discard=bad)
            state.step, state.tokens = step + 1, state.tokens + spec.tokens_per_step

            last = state.step == spec.steps
            stopping = stop.agreed(accelerator, together=state.step % LOG_EVERY == 0 or last)
            saves = state.step % spec.checkpoint_every == 0 or last or stopping
            # A checkpoint's metrics are written before it: a run resumed from it does not train their steps again.
            if state.step % LOG_EVERY == 0 or saves:
                rows = pending.read()
                elapsed = time.perf_counter() - began - paused
                state.seconds = seconds_before + elapsed
                speed = (state.step - first_step) * spec.tokens_per_step / max(elapsed, 1e-9)
                for number, (row_loss, row_norm, row_rate) in enumerate(rows, start=state.step - len(rows)):
                    tracker.log(
                        "train",
                        number,
                        {
                            "loss": row_loss,
                            "gradient_norm": row_norm,
                            "learning_rate": row_rate,
                            "tokens_per_second": speed,
                        },
                    )
                    bad_steps.note(number, row_loss, row_norm, tracker)
                    if delayed is not None:
                        _log_incidents(delayed.observe(row_loss), number, tracker)
                state.skipped = skipped_before + bad_steps.total
                last_loss = next((value for value, _, _ in reversed(rows) if math.isfinite(value)), last_loss)
                tracker.show(state.step, stage=stage_at(step), loss=rows[-1][0], tokens_per_second=speed)
                if saves and not are_finite(objective.trained):
                    bad_steps.blame_weights(step)
                if bad_steps.diverged:
                    raise go_back(seen=_look(observer, objective.model, step, tracker))
                # Not wherever something is saved: a stop and --resume change nothing.
                if delayed is not None and state.step % LOG_EVERY == 0:
                    _log_incidents(delayed.decide(state.step + LOG_EVERY), step, tracker)
            pause = time.perf_counter()
            if evaluate is not None and (state.step % spec.evaluate_every == 0 or last):
                objective.eval()
                figures = evaluate()
                tracker.log("evaluation", state.step, dict(figures))
                objective.train()
                if last and bad_steps.streak and not all(map(math.isfinite, figures.values())):
                    bad_steps.blame_weights(step)
                    raise go_back(seen=_look(observer, objective.model, step, tracker))
            # After a bad step the weights are as they were a step before, and may be why it was bad.
            if saves and (not bad_steps.streak or last or stopping):
                state.schedule = None if delayed is None else delayed.state()
                if accelerator.is_main_process:
                    save_checkpoint(state_directory, state, objective.trained, optimizers, keep=spec.keep_checkpoints)
                accelerator.wait_for_everyone()
            if stopping:
                raise stop.interrupted(f"step {state.step:,} of {spec.steps:,} is saved in {state_directory}")
            paused += time.perf_counter() - pause

    elapsed = max(time.perf_counter() - began - paused, 1e-9)
    return TrainResult(
        tokens=state.tokens,
        seconds=state.seconds,
        tokens_per_second=(state.step - first_step) * spec.tokens_per_step / elapsed,
        skipped_steps=state.skipped,
        last_loss=last_loss,
    )


def _over_ranks(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """`objective` itself, or wrapped so that the ranks average their gradients.

    Not accelerator.prepare_model, which keeps a reference for the life of the process: the control trains after the
    removal in the same one.
    """
    if accelerator.num_processes == 1:
        return objective
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    # Buffers are statistics and mixes: averaged or set in step on every rank, so there is nothing to broadcast.
    return torch.nn.parallel.DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)


def _look(observer: Observer | None, model: PreTrainedModel, step: int, tracker: Tracker) -> Figures | None:
    """Observe and log."""
    if observer is None:
        return None
    figures = observer.observe(model)
    tracker.log("observation", step, figures)
    return figures


def _apply_schedule(removal: Removal, step: int, tracker: Tracker) -> None:
    for change in removal.schedule.changes(step):
        if change.action == "freeze":
            removal.sites.set_mix(change.site, change.value)
        else:
            removal.sites.set_special(change.site, change.value)
        tracker.log("event", step, {"site": change.site, "action": change.action, "value": change.value})


def _log_incidents(incidents: Iterable[Metrics], step: int, tracker: Tracker) -> None:
    for incident in incidents:
        tracker.log("incident", step, incident)


def _batches_of_steps(
    sampler: WindowSampler, steps: range, accelerator: Accelerator, micro_batch: int
) -> Iterator[list[Tensor]]:
    """This rank's micro-batches of every step, in pinned memory where a GPU will fetch them."""
    pin = accelerator.device.type == "cuda"
    for step in steps:
        batches = sampler.micro_batches(
            step, rank=accelerator.process_index, ranks=accelerator.num_processes, micro_batch=micro_batch
        )
        tensors = (torch.from_numpy(batch) for batch in batches)
        yield [tensor.pin_memory() if pin else tensor for tensor in tensors]


def _forward_backward(
    model: torch.nn.Module,
    batches: list[Tensor],
    accelerator: Accelerator,
    parameters: list[torch.nn.Parameter],
    spec: TrainingSpec,
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of one step; returns its mean cross-entropy and the gradient norm before clipping."""
    share = sum(len(batch) for batch in batches)
    scale = LOSS_SCALE[spec.precision]
    total: Tensor | None = None
    for number, batch in enumerate(batches):
        weight = len(batch) / share
        synchronise = nullcontext() if number == len(batches) - 1 else accelerator.no_sync(model)
        tokens = batch.to(accelerator.device, non_blocking=True)
        with synchronise:
            with autocast(accelerator.device, spec.precision):
                loss = model(tokens)
            (loss.total * (weight * scale)).backward()
        part = loss.cross_entropy * weight
        total = part if total is None else total + part
    assert total is not None, "a step has at least one micro-batch"
    if scale != 1:
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip, foreach=True)
    return total, norm
