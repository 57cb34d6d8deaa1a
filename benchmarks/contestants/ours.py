"""This project's training: `training.loop.train` itself, with a tracker that keeps the benchmark's time.

The loop reports after every LOG_EVERY (10) steps, which is where it first waits for the device: a sample is a multiple of 10.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pacing import Finished, Pace
from shapes import Shape

from ln_removal.config.recipe import ArchitectureSpec, DataSpec, Recipe, TrainingSpec
from ln_removal.data.sampler import WindowSampler
from ln_removal.data.tokens import TokenDataset
from ln_removal.models.layout import all_sites
from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel
from ln_removal.norms.schedule import Event, RemovalSchedule
from ln_removal.norms.surgery import install
from ln_removal.training.loop import LOG_EVERY, train
from ln_removal.training.loss import Objective
from ln_removal.training.session import Removal, Session
from ln_removal.training.setup import build_accelerator, causal_attention, choose_micro_batch, compile_if_worthwhile

NEVER = 10**6


class PacedTracker:
    """What `train` tells about its progress, turned into step boundaries."""

    def __init__(self, pace: Pace, last_step: int) -> None:
        self._pace = pace
        self._last_step = last_step

    def forget_after(self, step: int) -> None: ...

    def log(self, kind: str, step: int, metrics: dict[str, Any]) -> None: ...

    def say(self, line: str) -> None: ...

    def show(self, step: int, *, stage: str, loss: float, tokens_per_second: float) -> None:
        self._pace.details = {"stage": stage, "loss": loss, "graphs": compiled_graphs(), "after_step": step}
        self._pace.steps_done(LOG_EVERY)
        if step >= self._last_step:
            raise Finished


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process; each recompilation adds one."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def stages(n_layer: int, half_at: int, all_at: int) -> RemovalSchedule:
    """Everything real, then from step `half_at` the first half of the sites frozen, from `all_at` everything."""
    names = list(map(str, all_sites(n_layer)))
    half = len(names) // 2
    freezes = [Event(half_at if place < half else all_at, name, "freeze") for place, name in enumerate(names)]
    drops = [Event(all_at, name, "drop_special") for name in ("eot", "first")]
    return RemovalSchedule((*freezes, *drops), n_layer, NEVER)


def main() -> None:
    """Settings: shape, precision, compile, tokens_per_step, half_at, all_at, folded, device, last_step."""
    pace = Pace()
    settings = pace.settings
    shape = Shape(**settings["shape"])
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
        ),
        training=TrainingSpec(
            steps=NEVER,
            tokens_per_step=settings["tokens_per_step"],
            micro_batch=settings.get("micro_batch", "auto"),
            learning_rate=6e-4,
            precision=settings["precision"],
            compile=settings["compile"],
            evaluate_every=NEVER,
            checkpoint_every=NEVER,
        ),
    )
    torch.manual_seed(0)
    folded = settings.get("folded", False)
    model = NormFreeGPT2LMHeadModel(NormFreeGPT2Config(**shape.sizes)) if folded else _gpt2(shape)
    accelerator = build_accelerator(settings["device"])
    data = TokenDataset.open(settings["tokens"])
    removal = None
    if not folded:
        schedule = stages(shape.n_layer, settings.get("half_at", NEVER - 1), settings.get("all_at", NEVER - 1))
        removal = Removal(install(model, eot_token_id=shape.eot_token_id), schedule)
    objective = Objective(model.to(accelerator.device), eot_token_id=shape.eot_token_id)
    spec = recipe.training
    sampler = WindowSampler(
        data.split("train"),
        context=shape.context,
        sequences_per_step=spec.tokens_per_step // shape.context,
        seed=0,
    )
    with causal_attention(model), tempfile.TemporaryDirectory() as directory:
        micro_batch = choose_micro_batch(recipe, objective, accelerator)
        compile_if_worthwhile(objective, spec.compile, tokens=recipe.tokens, device=accelerator.device)
        try:
            session = Session(
                objective,
                sampler,
                spec,
                accelerator=accelerator,
                tracker=PacedTracker(pace, settings.get("last_step", NEVER)),
                state_directory=Path(directory),
                micro_batch=micro_batch,
                removal=removal,
            )
            train(session)
        except Finished:
            pace.details = {"micro_batch": micro_batch, "graphs": compiled_graphs()}
            pace.close()


def _gpt2(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**shape.sizes))


if __name__ == "__main__":
    main()
