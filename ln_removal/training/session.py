"""The session: everything that the loop needs for one training, built from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ln_removal.data.documents import DocumentSampler
from ln_removal.data.sampler import Sampler, WindowSampler, evenly, plan_windows
from ln_removal.data.stress_text import Mixture, stress_sequences
from ln_removal.errors import UserError
from ln_removal.files.atomic import check_room_for_run
from ln_removal.models.attention import EntropyRegulariser
from ln_removal.models.checks import begins_texts
from ln_removal.models.precision import export_bytes
from ln_removal.training.checkpoint import BESIDE_TENSORS, checkpoints
from ln_removal.training.divergence import WaitingSchedule
from ln_removal.training.loss import Auxiliary, Distillation, EntropyPenalty, Objective
from ln_removal.training.metrics import Tracker
from ln_removal.training.probe import Probe
from ln_removal.training.setup import choose_micro_batch, compile_if_worthwhile, training_attention

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import DataSpec, Recipe, TrainingSpec
    from ln_removal.data.tokens import TokenDataset, Tokens
    from ln_removal.norms.schedule import RemovalSchedule
    from ln_removal.norms.surgery import NormSites

ODD_SEQUENCES = 64
"""Sequences of each kind of odd text; the ones that are mixed into the training are drawn from them."""

ODD_SEED = 1_000_003


@dataclass(frozen=True)
class Removal:
    """What makes a fine-tuning a removal: the installed sites, and the schedule that says when each one freezes."""

    sites: NormSites
    schedule: RemovalSchedule | WaitingSchedule

    @property
    def waiting_schedule(self) -> WaitingSchedule | None:
        """The schedule if it is one that waits while the loss spikes."""
        return self.schedule if isinstance(self.schedule, WaitingSchedule) else None


@dataclass(frozen=True)
class Session:
    """What the loop trains, on what, and where it writes; see `open_session`.

    Attributes:
        objective: model and loss, already on the accelerator's device.
        sampler: gives the sequences of every step.
        spec: the recipe's [training].
        accelerator: device, and gradient averaging over ranks.
        tracker: open; receives metrics.
        state_directory: where checkpoints go.
        micro_batch: sequences of one forward pass.
        removal: None trains with whatever norms the model has.
        evaluate: called every `evaluate_every` steps and at the end with the model in evaluation mode.
        probe: looks at the model between backward pass and update of the steps that it chooses.
        resume: continue from the newest whole checkpoint if there is one.
    """

    objective: Objective
    sampler: Sampler
    spec: TrainingSpec
    accelerator: Accelerator
    tracker: Tracker
    state_directory: Path
    micro_batch: int
    removal: Removal | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    probe: Probe | None = None
    resume: bool = False

    def stage_at(self, step: int) -> str:
        """The stage of the removal in a step, in words; "training" without a removal."""
        if self.removal is None:
            return "training"
        stage = self.removal.schedule.stage(step)
        return "shrinking" if stage == "real" and self.spec.outlier_weight > 0 else stage


def sampler_of(recipe: Recipe, data: TokenDataset, tokenizer: PreTrainedTokenizerBase | None = None) -> Sampler:
    """The training sequences that the recipe takes from `data`.

    Args:
        recipe: its [data], seed and batch.
        data: the train split is sampled.
        tokenizer: writes the odd text that `data.odd_text` asks for; without one there is none.

    Raises:
        UserError: there are too few tokens, or data.weights names a source that is not there.
    """
    kind = DocumentSampler if recipe.data.windows == "document" else WindowSampler
    return kind(
        data.split("train"),
        context=recipe.data.context,
        sequences_per_step=recipe.training.tokens_per_step // recipe.data.context,
        seed=recipe.seed,
        weights=recipe.data.weights,
        mixed_in=None if tokenizer is None else _odd_text(recipe, tokenizer),
        bos_rows=recipe.data.bos_rows,
        copies=recipe.data.copies,
        first_token=None if tokenizer is None else begins_texts(tokenizer),
    )


def _odd_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Mixture | None:
    if recipe.data.odd_text == 0:
        return None
    # The evaluation has another seed, and the first sequence of a kind is the same for all seeds. So what is scored is not
    # trained on.
    kinds = stress_sequences(
        tokenizer, context=recipe.data.context + 1, count=ODD_SEQUENCES + 1, seed=recipe.seed + ODD_SEED
    )
    sequences = np.concatenate([rows[1:] for rows in kinds.values()])
    if tokenizer.eos_token_id is not None:  # every second one begins with it, as a prompt does
        sequences[::2] = np.concatenate(
            [np.full((len(sequences[::2]), 1), tokenizer.eos_token_id), sequences[::2, :-1]], 1
        )
    return Mixture(sequences, recipe.data.odd_text)


@contextmanager
def open_session(
    model: PreTrainedModel,
    recipe: Recipe,
    data: TokenDataset,
    directory: Path,
    *,
    accelerator: Accelerator,
    tracker: Tracker,
    evaluate: Callable[[], dict[str, float]],
    removal: Removal | None = None,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
) -> Iterator[Session]:
    """Set up the training of `model`, moved to the accelerator's device, as the recipe's [training] says.

    Args:
        model: trained in place; with `removal`, its freezable norms are installed.
        recipe: batches, optimizer and lengths.
        data: the train split is sampled.
        directory: receives state/.
        accelerator: device and ranks.
        tracker: entered here.
        evaluate: measures the model while training pauses.
        removal: sites and schedule; None keeps the norms (pretraining, control) and leaves out the losses of a removal.
        teacher: for `training.distillation`: the model as it was, see `loss.as_teacher`.
        tokenizer: the model's, for `data.odd_text`.
        resume: continue from the newest checkpoint in `directory`.

    Raises:
        UserError: as `Sampler`, `Tracker` and `choose_micro_batch`.
    """
    spec = recipe.training
    sampler = sampler_of(recipe, data, tokenizer)
    probe = _probe(recipe, data)  # on every rank, so that all of them find what is wrong with it
    objective = _objective(model.to(accelerator.device), spec, data.eot_token_id, removal=removal, teacher=teacher)
    with _attention(objective, recipe.data), tracker:
        if warning := _disk_space_warning(objective, recipe, directory):
            tracker.say(warning)
        micro_batch = choose_micro_batch(recipe, objective, accelerator)
        compile_if_worthwhile(objective, spec.compile, tokens=recipe.tokens, device=accelerator.device)
        yield Session(
            objective,
            sampler,
            spec,
            accelerator=accelerator,
            tracker=tracker,
            state_directory=directory / "state",
            micro_batch=micro_batch,
            removal=removal,
            evaluate=evaluate,
            probe=probe if accelerator.is_main_process else None,
            resume=resume,
        )


@contextmanager
def _attention(objective: Objective, spec: DataSpec) -> Iterator[None]:
    """The attention of a training, for the model and for its teacher."""
    with ExitStack() as stack:
        # The entropy penalty looks at the probabilities.
        shown = objective.entropy is not None
        stack.enter_context(training_attention(objective.model, context=spec.context, shown=shown))
        if objective.teacher is not None:
            stack.enter_context(training_attention(objective.teacher, context=spec.context))
        yield


def _disk_space_warning(objective: Objective, recipe: Recipe, directory: Path) -> str | None:
    """As `check_room_for_run`. A checkpoint is counted with AdamW's two moments of every parameter; Muon's is smaller."""
    saved = checkpoints(directory / "state")
    if saved and saved[-1][0] >= recipe.training.steps:  # nothing is left to train
        return None
    tensors = objective.trained.state_dict().values()
    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())  # a tied weight once
    moments = 2 * sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    forms = 1 if recipe.schedule is None else len(recipe.export.formats)
    return check_room_for_run(
        directory,
        checkpoint=weights + moments + BESIDE_TENSORS,
        keep=recipe.training.keep_checkpoints,
        exports=forms * export_bytes(objective.model, recipe.export.dtype),
    )


def _probe(recipe: Recipe, data: TokenDataset) -> Probe | None:
    """The probe that the recipe's [observation] asks for. Its batch is spread evenly over the held-out tokens or documents."""
    spec, split, context = recipe.observation, data.split("validation"), recipe.data.context
    if spec is None:
        return None
    if recipe.data.windows == "document":
        beginnings = split.beginnings(spec.sequences, context)
        if beginnings is None:
            raise UserError(
                f"observation.sequences = {spec.sequences}, but {data.directory} does not hold out so many documents of two "
                "tokens or more; lower it, or prepare more text"
            )
        return _probe_of(beginnings, recipe)
    windows = [
        window for window in plan_windows([shard.tokens for shard in split.shards], context) if window.count == context
    ]
    if len(windows) < spec.sequences:
        raise UserError(
            f"observation.sequences = {spec.sequences}, but {data.directory} holds out only {len(windows)} sequences of {context} "
            "tokens; lower one of the two, or prepare more text"
        )
    chosen = evenly(windows, spec.sequences)
    tokens = np.stack([split.read(window.shard, window.start, context) for window in chosen])
    return _probe_of(tokens, recipe)


def _probe_of(tokens: Tokens, recipe: Recipe) -> Probe:
    assert recipe.observation is not None
    spec = recipe.training
    return Probe(torch.from_numpy(tokens), every=recipe.observation.every, steps=spec.steps, precision=spec.precision)


def _objective(
    model: PreTrainedModel,
    spec: TrainingSpec,
    eot_token_id: int | None,
    *,
    removal: Removal | None,
    teacher: PreTrainedModel | None,
) -> Objective:
    if removal is None:
        return Objective(model, eot_token_id=eot_token_id, entropy=_entropy_penalty(model, spec))
    distillation = None
    if spec.distillation > 0:
        assert teacher is not None, "the caller keeps a copy of the original model"
        distillation = Distillation(teacher.to(model.device), spec.distillation, spec.distillation_lag)
    return Objective(model, eot_token_id=eot_token_id, auxiliary=Auxiliary.of(spec), distillation=distillation)


def _entropy_penalty(model: PreTrainedModel, spec: TrainingSpec) -> EntropyPenalty | None:
    if spec.entropy_weight == 0:
        return None
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    return EntropyPenalty(spec.entropy_weight, EntropyRegulariser(layers, heads, tolerance=spec.entropy_tolerance))
