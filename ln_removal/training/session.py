"""One training from a recipe: batches, objective, micro-batch, compilation and tracking put together around the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ln_removal.data.sampler import WindowSampler, plan_windows
from ln_removal.data.stress_text import Mixture, stress_sequences
from ln_removal.errors import UserError
from ln_removal.files.atomic import check_room_for_run
from ln_removal.models.attention import EntropyRegulariser
from ln_removal.models.precision import export_bytes
from ln_removal.training.checkpoint import BESIDE_TENSORS, checkpoints
from ln_removal.training.loop import Removal, TrainResult, train
from ln_removal.training.loss import Auxiliary, Distillation, EntropyPenalty, Objective
from ln_removal.training.metrics import Progress, Tracker
from ln_removal.training.probe import Observer
from ln_removal.training.setup import choose_micro_batch, compile_if_worthwhile, training_attention

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import Recipe, TrainingSpec
    from ln_removal.data.tokens import TokenDataset

ODD_SEQUENCES = 64
"""Of each kind, from which those that are mixed in are drawn."""

ODD_SEED = 1_000_003


def sampler_of(recipe: Recipe, data: TokenDataset, tokenizer: PreTrainedTokenizerBase | None = None) -> WindowSampler:
    """The training sequences that the recipe takes from `data`.

    Args:
        recipe: its [data], seed and batch.
        data: the train split is sampled.
        tokenizer: writes the odd text that `data.odd_text` asks for; without one there is none.

    Raises:
        UserError: there are too few tokens, or data.weights names a source that is not there.
    """
    return WindowSampler(
        data.split("train"),
        context=recipe.data.context,
        sequences_per_step=recipe.training.tokens_per_step // recipe.data.context,
        seed=recipe.seed,
        weights=recipe.data.weights,
        mixed_in=None if tokenizer is None else _odd_text(recipe, tokenizer),
    )


def _odd_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Mixture | None:
    if recipe.data.odd_text == 0:
        return None
    # Another seed than that of evaluation, and not the first of a kind, which is the same for all seeds: what is scored was
    # not trained on.
    kinds = stress_sequences(
        tokenizer, context=recipe.data.context + 1, count=ODD_SEQUENCES + 1, seed=recipe.seed + ODD_SEED
    )
    return Mixture(np.concatenate([rows[1:] for rows in kinds.values()]), recipe.data.odd_text)


def train_model(
    model: PreTrainedModel,
    recipe: Recipe,
    data: TokenDataset,
    directory: Path,
    *,
    accelerator: Accelerator,
    label: str,
    evaluate: Callable[[], dict[str, float]],
    removal: Removal | None = None,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    wandb_project: str | None = None,
    progress: Progress = True,
) -> TrainResult:
    """Train `model`, moved to the accelerator's device, as the recipe's [training] says.

    Args:
        model: trained in place; with `removal`, its freezable norms are installed.
        recipe: batches, optimizer and lengths.
        data: the train split is sampled.
        directory: receives metrics.jsonl and state/.
        accelerator: device and precision.
        label: names the training on its progress bar and in wandb.
        evaluate: measures the model while training pauses.
        removal: sites and schedule; None keeps the norms (pretraining, control) and leaves out the losses of a removal.
        teacher: for `training.distillation`: the model as it was, see `loss.as_teacher`.
        tokenizer: the model's, for `data.odd_text`.
        resume: continue from the newest checkpoint in `directory`.
        wandb_project: also log to this Weights & Biases project.
        progress: how steps are shown.

    Raises:
        UserError: as `train`, `WindowSampler` and `choose_micro_batch`.
    """
    spec = recipe.training
    sampler = sampler_of(recipe, data, tokenizer)
    observer = _observer(recipe, data)  # on every rank, so that all of them find what is wrong with it
    objective = _objective(model.to(accelerator.device), spec, data.eot_token_id, removal=removal, teacher=teacher)
    tracker = Tracker(
        directory / "metrics.jsonl",
        total_steps=spec.steps,
        tokens_per_step=spec.tokens_per_step,
        label=label,
        enabled=accelerator.is_main_process,
        progress=progress,
        wandb_project=wandb_project,
        config=recipe.model_dump(),
    )
    with ExitStack() as attention, tracker:
        for each in (model, objective.teacher):
            if each is not None:
                shown = each is model and objective.entropy is not None  # the penalty looks at the probabilities
                attention.enter_context(training_attention(each, context=recipe.data.context, shown=shown))
        if warning := _room(objective, recipe, directory):
            tracker.say(warning)
        micro_batch = choose_micro_batch(recipe, objective, accelerator)
        compile_if_worthwhile(objective, spec.compile, tokens=recipe.tokens, device=accelerator.device)
        return train(
            objective,
            sampler,
            spec,
            accelerator=accelerator,
            tracker=tracker,
            state_directory=directory / "state",
            micro_batch=micro_batch,
            removal=removal,
            evaluate=evaluate,
            observer=observer if accelerator.is_main_process else None,
            resume=resume,
        )


def _room(objective: Objective, recipe: Recipe, directory: Path) -> str | None:
    """As `check_room_for_run`, with AdamW's two moments of every parameter in a checkpoint (Muon has fewer)."""
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


def _observer(recipe: Recipe, data: TokenDataset) -> Observer | None:
    """Reads whole windows that are spread evenly over the held-out tokens."""
    spec, split, context = recipe.observation, data.split("validation"), recipe.data.context
    if spec is None:
        return None
    windows = [
        window for window in plan_windows([shard.tokens for shard in split.shards], context) if window.count == context
    ]
    if len(windows) < spec.sequences:
        raise UserError(
            f"observation.sequences = {spec.sequences}, but {data.directory} holds out only {len(windows)} sequences of {context} "
            "tokens; lower one of the two, or prepare more text"
        )
    chosen = [windows[(2 * i + 1) * len(windows) // (2 * spec.sequences)] for i in range(spec.sequences)]
    probe = np.stack([split.read(window.shard, window.start, context) for window in chosen])
    return Observer(
        torch.from_numpy(probe), every=spec.every, steps=recipe.training.steps, precision=recipe.training.precision
    )


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
        distillation = Distillation(teacher.to(model.device), spec.distillation)
    auxiliary = Auxiliary(spec.auxiliary_weight, spec.auxiliary_target, spec.auxiliary_sites)
    return Objective(model, eot_token_id=eot_token_id, auxiliary=auxiliary, distillation=distillation)


def _entropy_penalty(model: PreTrainedModel, spec: TrainingSpec) -> EntropyPenalty | None:
    if spec.entropy_weight == 0:
        return None
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    return EntropyPenalty(spec.entropy_weight, EntropyRegulariser(layers, heads, tolerance=spec.entropy_tolerance))
