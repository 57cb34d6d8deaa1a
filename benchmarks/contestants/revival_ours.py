"""This project's training of the same model: `training.loop.train` as ln-pretrain runs it, observed at every step or never.

The loop reports after every LOG_EVERY (10) steps, which is where it first waits for the device: a sample is a multiple of 10.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from ours import NEVER, PacedTracker, compiled_graphs
from pacing import Finished, Pace
from shapes import Shape, random_tokens

from ln_removal.config.recipe import ArchitectureSpec, DataSpec, Recipe, TrainingSpec
from ln_removal.data.sampler import WindowSampler
from ln_removal.data.tokens import TokenDataset
from ln_removal.models.attention import fused_attention
from ln_removal.models.norm_choice import build_model
from ln_removal.training.loop import train
from ln_removal.training.loss import Objective
from ln_removal.training.probe import Probe
from ln_removal.training.session import Session
from ln_removal.training.setup import build_accelerator, choose_micro_batch, compile_if_worthwhile


def main() -> None:
    """Settings: shape, precision, compile, tokens_per_step, tokens, micro_batch, device, observe."""
    pace = Pace()
    settings = pace.settings
    shape = Shape(**settings["shape"])
    sequences = settings["tokens_per_step"] // shape.context
    recipe = Recipe(
        name="benchmark",
        model="random",
        data=DataSpec(corpus="random", context=shape.context),
        architecture=ArchitectureSpec(
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            n_positions=shape.context,
            vocab_size=shape.vocab_size,
            block_norm="none",
            biases="paper",
            activation="relu",
        ),
        training=TrainingSpec(
            steps=NEVER,
            tokens_per_step=settings["tokens_per_step"],
            micro_batch=settings["micro_batch"],
            learning_rate=1e-3,
            warmup_steps=100,
            decay="linear",
            weight_decay=0.1,
            betas=(0.9, 0.999),
            precision=settings["precision"],
            compile=settings["compile"],
            evaluate_every=NEVER,
            checkpoint_every=NEVER,
        ),
    )
    torch.manual_seed(0)
    accelerator = build_accelerator(settings["device"])
    assert recipe.architecture is not None
    model = build_model(recipe.architecture, eot_token_id=shape.eot_token_id).to(accelerator.device)
    objective = Objective(model, eot_token_id=shape.eot_token_id)
    spec = recipe.training
    sampler = WindowSampler(
        TokenDataset.open(settings["tokens"]).split("train"),
        context=shape.context,
        sequences_per_step=sequences,
        seed=0,
    )
    probe = None
    if settings["observe"]:  # as many sequences as the peer looks at: its micro-batch
        looked_at = settings["micro_batch"]
        rows = random_tokens(shape, looked_at * shape.context, seed=1).astype("int64")
        rows_of_probe = torch.from_numpy(rows).view(looked_at, shape.context)
        probe = Probe(rows_of_probe, every=1, steps=NEVER, precision=spec.precision)
    with fused_attention(model), tempfile.TemporaryDirectory() as directory:
        micro_batch = choose_micro_batch(recipe, objective, accelerator)
        compile_if_worthwhile(objective, spec.compile, tokens=recipe.tokens, device=accelerator.device)
        try:
            session = Session(
                objective,
                sampler,
                spec,
                accelerator=accelerator,
                tracker=PacedTracker(pace, NEVER),
                state_directory=Path(directory),
                micro_batch=micro_batch,
                probe=probe,
            )
            train(session)
        except Finished:
            pace.details = {"micro_batch": micro_batch, "graphs": compiled_graphs()}
            pace.close()
        except torch.OutOfMemoryError:
            pace.out_of_memory()


if __name__ == "__main__":
    main()
