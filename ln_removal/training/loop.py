"""The training loop of removal, control and pretraining: it makes steps, evaluates and saves.

A step that logs nothing does not wait for the device. Losses and gradient norms stay there until the next log step.

Shape legend: B batch, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ln_removal.data.sampler import read_ahead
from ln_removal.files.signals import deferred
from ln_removal.models.precision import LOSS_SCALE, autocast
from ln_removal.training.checkpoint import TrainerState, load_newest, prune, save_checkpoint
from ln_removal.training.divergence import BadSteps, StepMetrics, are_finite, roll_back
from ln_removal.training.optimizers import (
    build_optimizers,
    distillation_at,
    learning_rate_at,
    set_learning_rate,
    to_step,
)
from ln_removal.training.setup import compiler_faults

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ln_removal.errors import DivergedError
    from ln_removal.training.loss import Objective
    from ln_removal.training.metrics import Metrics
    from ln_removal.training.probe import Figures
    from ln_removal.training.session import Session

LOG_EVERY = 10
"""Metrics are read from the device, and written, every so many steps."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training reports.

    Attributes:
        tokens: training tokens of all sessions.
        seconds: training time of all sessions, without evaluation and checkpoints.
        tokens_per_second: the speed of this session, without evaluation, checkpoints and its first step, which may compile.
        skipped_steps: the number of steps whose loss or gradient was not finite.
        last_loss: the last finite loss of this session, nats per token; None if there was no step left to train.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    skipped_steps: int
    last_loss: float | None


def train(session: Session) -> TrainResult:
    """Train the session's objective for `spec.steps` optimizer steps.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the step was finished and a checkpoint saved.
        DivergedError: loss or gradient was not finite for several steps in a row; run and model are back at the last sound
            checkpoint.
    """
    accelerator, spec, probe = session.accelerator, session.spec, session.probe
    training = _Training(session)
    steps = range(training.state.step, spec.steps)
    batches_ahead = read_ahead(_batches_of_steps(session, steps))
    stops = deferred("step", ranks=accelerator.num_processes, speak=accelerator.is_main_process)
    with stops as stop, closing(batches_ahead) as batches_of_steps:
        for step, batches in zip(steps, batches_of_steps, strict=True):
            rate = training.follow_schedules(step)
            loss, norm = training.forward_backward(batches)
            if probe is not None and probe.wants(step):
                training.observe(step)
            bad = training.pending.add(loss, norm, rate)
            for optimizer in to_step(training.optimizers, bad):
                optimizer.step()
            training.finish_step(step, bad)

            last = step + 1 == spec.steps
            at_log_step = (step + 1) % LOG_EVERY == 0
            stopping = stop.agreed(accelerator, together=at_log_step or last)
            saves = (step + 1) % spec.checkpoint_every == 0 or last or stopping
            # The metrics are written before the checkpoint, because a run that is resumed from it does not train these steps again.
            if at_log_step or saves:
                training.log(step, saves=saves)
            with training.paused():
                if (step + 1) % spec.evaluate_every == 0 or last:
                    training.evaluate(step)
                # After a bad step the weights are those of the step before, and may be the reason why it was bad.
                if saves and (not training.bad_steps.streak or last or stopping):
                    training.save()
                if stopping:
                    raise stop.interrupted(f"step {step + 1:,} of {spec.steps:,} is saved in {session.state_directory}")
    return training.result()


class _Training:
    """A training in progress: optimizers, counters and a clock. It begins at the newest checkpoint if the session resumes."""

    def __init__(self, session: Session) -> None:
        objective, removal = session.objective, session.removal
        self.session = session
        besides = () if objective.entropy is None else objective.entropy.parameters()
        self.optimizers = build_optimizers(objective.model, session.spec, besides=besides)
        self.state = self._newest_checkpoint() if session.resume else TrainerState()
        self.waiting = None if removal is None else removal.waiting_schedule
        if self.waiting is not None:
            self.waiting.restore(self.state.schedule, self.state.step)
        session.tracker.forget_after(self.state.step)
        self.model = _over_ranks(objective, session.accelerator)
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.pending, self.bad_steps = StepMetrics(session.accelerator), BadSteps()
        self.last_loss: float | None = None
        self._before = replace(self.state)  # what earlier sessions did
        self._began, self._paused_seconds = time.perf_counter(), 0.0
        self._first_step_seconds = self._evaluation_seconds = self._checkpoint_seconds = 0.0
        objective.train()

    def _newest_checkpoint(self) -> TrainerState:
        """Load the newest whole checkpoint; a fresh state where there is none."""
        session = self.session
        found, faults = load_newest(session.state_directory, session.objective.trained, self.optimizers)
        for fault in faults:
            session.tracker.say(f"warning: {fault}")
        if found is not None and not faults and session.accelerator.is_main_process:
            # The run may have been killed just before it did this.
            prune(session.state_directory, keep=session.spec.keep_checkpoints)
        return found or TrainerState()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that the block takes out of the training time."""
        began = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - began

    def _elapsed(self) -> float:
        """Seconds of training in this session."""
        return time.perf_counter() - self._began - self._paused_seconds

    def follow_schedules(self, step: int) -> float:
        """Set mixes, learning rate and the teacher's share for this step; returns the learning rate."""
        session = self.session
        if session.removal is not None:
            for change in session.removal.schedule.changes(step):
                if change.action == "freeze":
                    session.removal.sites.set_mix(change.site, change.value)
                elif change.action == "drop_special":
                    session.removal.sites.set_special(change.site, change.value)
                else:
                    session.removal.sites.lift_cap(change.value)
                session.tracker.log(
                    "event", step, {"site": change.site, "action": change.action, "value": change.value}
                )
        rate = learning_rate_at(step, session.spec)
        set_learning_rate(self.optimizers, rate)
        if session.objective.teacher is not None:
            session.objective.set_share(distillation_at(step, session.spec))
        return rate

    def forward_backward(self, batches: list[_Batch]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of one step; returns its mean cross-entropy and the gradient norm before clipping."""
        accelerator, spec = self.session.accelerator, self.session.spec
        scale = LOSS_SCALE[spec.precision]
        total: Tensor | None = None
        for number, (inputs, weight) in enumerate(batches):
            synchronise = nullcontext() if number == len(batches) - 1 else accelerator.no_sync(self.model)
            there = [tensor.to(accelerator.device, non_blocking=True) for tensor in inputs]
            with synchronise, compiler_faults():
                with autocast(accelerator.device, spec.precision):
                    loss = self.model(*there)
                (loss.total * (weight * scale)).backward()
            part = loss.cross_entropy * weight
            total = part if total is None else total + part
        assert total is not None, "a step has at least one micro-batch"
        if scale != 1:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, spec.clip, foreach=True)
        return total, norm

    def observe(self, step: int) -> Figures | None:
        """Measure the model with the probe and log the observation; None without a probe."""
        session = self.session
        if session.probe is None:
            return None
        figures = session.probe.observe(session.objective.model)
        session.tracker.log("observation", step, figures)
        return figures

    def finish_step(self, step: int, bad: Tensor) -> None:
        """Drop the gradients, update the running statistics and count the step. `bad` is 1.0 if it was skipped, else 0.0."""
        removal, spec = self.session.removal, self.session.spec
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if removal is not None and step < removal.schedule.complete_at:
            # In every step, so that the number of ranks changes nothing and the checkpoint of one rank is right for all.
            removal.sites.average_over_ranks()
            removal.sites.update_running(spec.std_momentum, discard=bad)
        self.state.step, self.state.tokens = step + 1, self.state.tokens + spec.tokens_per_step
        if step == self._before.step:
            self._first_step_seconds = self._elapsed()

    def log(self, step: int, *, saves: bool) -> None:
        """Write the metrics of the steps since the last call. Waits for the device.

        Args:
            step: the one just made.
            saves: a checkpoint follows, so check that the weights are finite.

        Raises:
            DivergedError: the run has gone back to its last sound checkpoint.
        """
        session, state = self.session, self.state
        tracker = session.tracker
        rows = self.pending.read()
        elapsed = self._elapsed()
        state.seconds = self._before.seconds + elapsed
        speed = self._tokens_per_second(elapsed)
        for number, (loss, norm, rate) in enumerate(rows, start=state.step - len(rows)):
            row = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "tokens_per_second": speed}
            if number == state.step - 1 and session.removal is not None and (over := session.removal.sites.over_cap()):
                row["over_cap"] = sum(over.values())  # since the last log
            tracker.log("train", number, row)
            self.bad_steps.note(number, loss, norm, tracker)
            if self.waiting is not None:
                self._log_incidents(self.waiting.observe(loss), number)
        state.skipped = self._before.skipped + self.bad_steps.total
        self.last_loss = next((loss for loss, _, _ in reversed(rows) if math.isfinite(loss)), self.last_loss)
        tracker.show(
            state.step,
            stage=self.session.stage_at(step),
            loss=rows[-1][0],
            tokens_per_second=speed,
            seconds_left=self._seconds_left(speed),
        )
        if saves and not are_finite(self.session.objective.trained):
            self.bad_steps.blame_weights(step)
        if self.bad_steps.diverged:
            raise self._roll_back(step)
        # Only in log steps, and not wherever a checkpoint is saved: a run that was stopped and resumed decides the same.
        if self.waiting is not None and state.step % LOG_EVERY == 0:
            self._log_incidents(self.waiting.decide(state.step + LOG_EVERY), step)

    def _log_incidents(self, incidents: Iterable[Metrics], step: int) -> None:
        for incident in incidents:
            self.session.tracker.log("incident", step, incident)

    def _roll_back(self, step: int) -> DivergedError:
        session = self.session
        seen = self.observe(step)
        return roll_back(
            self.bad_steps,
            session.spec,
            state_directory=session.state_directory,
            model=session.objective.trained,
            optimizers=self.optimizers,
            accelerator=session.accelerator,
            tracker=session.tracker,
            stage=session.stage_at(self.bad_steps.streak[0]),
            seen=seen,
        )

    def evaluate(self, step: int) -> None:
        """Measure the model in evaluation mode and log the figures.

        Raises:
            DivergedError: this is the end of the run, its last steps were bad, and so are the figures.
        """
        session = self.session
        if session.evaluate is None:
            return
        began = time.perf_counter()
        session.objective.eval()
        figures = session.evaluate()
        session.tracker.log("evaluation", self.state.step, dict(figures))
        session.objective.train()
        self._evaluation_seconds = time.perf_counter() - began
        last = self.state.step == session.spec.steps
        if last and self.bad_steps.streak and not all(map(math.isfinite, figures.values())):
            self.bad_steps.blame_weights(step)
            raise self._roll_back(step)

    def save(self) -> None:
        """Write a checkpoint. Every rank calls this, and all wait for the main one."""
        session, began = self.session, time.perf_counter()
        self.state.schedule = None if self.waiting is None else self.waiting.state()
        if session.accelerator.is_main_process:
            keep = session.spec.keep_checkpoints
            save_checkpoint(session.state_directory, self.state, session.objective.trained, self.optimizers, keep=keep)
        session.accelerator.wait_for_everyone()
        self._checkpoint_seconds = time.perf_counter() - began

    def _tokens_per_second(self, elapsed: float) -> float:
        """The average speed after the session's first step, which may compile; that of the first step while it is the only one."""
        steps = self.state.step - self._before.step
        if steps > 1:
            steps, elapsed = steps - 1, elapsed - self._first_step_seconds
        return steps * self.session.spec.tokens_per_step / max(elapsed, 1e-9)

    def _seconds_left(self, tokens_per_second: float) -> float:
        """Of the whole run at this speed. A pause to come is as long as the last one of its kind; before that, nothing."""
        spec, done = self.session.spec, self.state.step

        def to_come(every: int) -> int:  # one is due after the last step; that of this step has not been made yet
            return -(-spec.steps // every) - (done - 1) // every

        training = (spec.steps - done) * spec.tokens_per_step / max(tokens_per_second, 1e-9)
        evaluations = to_come(spec.evaluate_every) * self._evaluation_seconds
        return training + evaluations + to_come(spec.checkpoint_every) * self._checkpoint_seconds

    def result(self) -> TrainResult:
        """What the finished training reports."""
        return TrainResult(
            tokens=self.state.tokens,
            seconds=self.state.seconds,
            tokens_per_second=self._tokens_per_second(self._elapsed()),
            skipped_steps=self.state.skipped,
            last_loss=self.last_loss,
        )


def _over_ranks(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """`objective` itself, or wrapped so that the ranks average their gradients.

    accelerator.prepare_model would keep a reference to it as long as the process lives, in which the control trains after the
    removal.
    """
    if accelerator.num_processes == 1:
        return objective
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    # Buffers hold statistics and mixes, which every rank averages or sets by itself, so there is nothing to broadcast.
    return torch.nn.parallel.DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)


_Batch = tuple[list[Tensor], float]
"""The arguments of `Objective.forward`, and the weight of its loss in that of the step."""


def _batches_of_steps(session: Session, steps: range) -> Iterator[list[_Batch]]:
    """This rank's micro-batches of every step, in pinned memory where a GPU will fetch them."""
    accelerator = session.accelerator
    pin = accelerator.device.type == "cuda"
    for step in steps:
        batches = session.sampler.micro_batches(
            step,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            micro_batch=session.micro_batch,
        )
        found: list[_Batch] = []
        for tokens, document_starts, weight in batches:
            inputs = [torch.from_numpy(array) for array in (tokens, document_starts) if array is not None]
            found.append(([tensor.pin_memory() if pin else tensor for tensor in inputs], weight))
        yield found
