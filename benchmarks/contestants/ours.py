"""This project's training: `training.loop.train` itself, with a tracker that keeps the benchmark's time.

The loop reports after every LOG_EVERY (10) steps, which is where it first waits for the device: a sample is a multiple of 10.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pacing import Finished, Pace
from shapes import Shape

from ln_removal.config.recipe import ArchitectureSpec, DataSpec, Recipe, TrainingSpec
from ln_removal.data.documents import DocumentSampler
from ln_removal.data.sampler import Sampler, WindowSampler, trained_targets
from ln_removal.data.tokens import TokenDataset
from ln_removal.models.layout import all_sites
from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel
from ln_removal.norms.schedule import Event, RemovalSchedule
from ln_removal.norms.surgery import install
from ln_removal.training.loop import LOG_EVERY, train
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher
from ln_removal.training.session import Removal, Session
from ln_removal.training.setup import build_accelerator, choose_micro_batch, compile_if_worthwhile, training_attention

NEVER = 10**6


class PacedTracker:
    """What `train` tells about its progress, turned into step boundaries."""

    def __init__(self, pace: Pace, last_step: int, watch: SyncWatch | None = None) -> None:
        self._pace = pace
        self._watch = watch
        self._last_step = last_step

    def forget_after(self, step: int) -> None: ...

    def log(self, kind: str, step: int, metrics: dict[str, Any]) -> None: ...

    def say(self, line: str) -> None: ...

    def show(self, step: int, *, stage: str, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        if self._watch is not None:  # not before: the first step compiles, and waits while it does
            self._watch.start()
            self._watch = None
        self._pace.details = {"stage": stage, "loss": loss, "graphs": compiled_graphs(), "after_step": step}
        self._pace.steps_done(LOG_EVERY)
        if step >= self._last_step:
            raise Finished


class SyncWatch:
    """Counts the places where the host waits for a GPU: the innermost line, and the innermost of this project (CUDA only)."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self._note

    def _note(self, message: Warning | str, *rest: Any) -> None:
        if "synchroniz" in str(message):
            stack = traceback.extract_stack()[:-1]
            ours = [frame for frame in stack if "ln_removal/" in frame.filename]
            self.places[
                " < ".join(f"{frame.filename}:{frame.lineno} {frame.line}" for frame in (stack[-1:] + ours[-1:]))
            ] += 1


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


def recipe_of(settings: dict[str, Any], shape: Shape) -> Recipe:
    """A pretraining recipe of this shape that never evaluates or saves."""
    return Recipe(
        name="benchmark",
        model="random",
        data=DataSpec(corpus="random", context=shape.context, windows=settings.get("windows", "stream")),
        architecture=ArchitectureSpec(
            family=shape.family,
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


def main() -> None:
    """Settings: shape, precision, compile, tokens_per_step, half_at, all_at, folded, device, last_step.

    Also: teacher (with the losses of recipes/gpt2.toml), windows ("document"), watch_syncs.
    """
    pace = Pace()
    settings = pace.settings
    watch = SyncWatch() if settings.get("watch_syncs") else None
    shape = Shape(**settings["shape"])
    documents = settings.get("windows") == "document"
    recipe = recipe_of(settings, shape)
    torch.manual_seed(0)
    folded = settings.get("folded", False)
    model = NormFreeGPT2LMHeadModel(NormFreeGPT2Config(**shape.sizes)) if folded else shape.model()
    accelerator = build_accelerator(settings["device"])
    removal = None
    if not folded:
        schedule = stages(shape.n_layer, settings.get("half_at", NEVER - 1), settings.get("all_at", NEVER - 1))
        removal = Removal(install(model, eot_token_id=shape.eot_token_id), schedule)
    spec = recipe.training
    teacher = None
    if settings.get("teacher"):  # which only a removal recipe has
        spec = spec.model_copy(update={"distillation": 1.0})
        teacher = as_teacher(shape.model(), spec.precision).to(accelerator.device)
    objective = Objective(
        model.to(accelerator.device),
        eot_token_id=shape.eot_token_id,
        auxiliary=None if teacher is None else Auxiliary(0.1, "constants", "all"),
        distillation=None if teacher is None else Distillation(teacher, 1.0, 0.3),
    )
    sampler = open_sampler(shape, TokenDataset.open(settings["tokens"]), spec, documents)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as attention:
        for each in (model, teacher):
            if each is not None:
                attention.enter_context(training_attention(each, context=shape.context))
        micro_batch = choose_micro_batch(recipe, objective, accelerator)
        compile_if_worthwhile(objective, spec.compile, tokens=recipe.tokens, device=accelerator.device)
        try:
            session = Session(
                objective,
                sampler,
                spec,
                accelerator=accelerator,
                tracker=PacedTracker(pace, settings.get("last_step", NEVER), watch),
                state_directory=Path(directory),
                micro_batch=micro_batch,
                removal=removal,
            )
            train(session)
        except Finished:
            pace.details = {
                "micro_batch": micro_batch,
                "graphs": compiled_graphs(),
                "trained_share": trained_share(sampler),
            }
            if watch is not None:
                pace.details["synchronisations"] = dict(watch.places)
            pace.close()
        except torch.OutOfMemoryError:
            pace.out_of_memory()


def trained_share(sampler: Sampler) -> float:
    """The share of the positions whose loss counts; in a stream all do."""
    starts = sampler.document_starts(0, 0, sampler.windows_per_epoch)
    return 1.0 if starts is None else float(trained_targets(starts) / starts[:, 1:].size)


def open_sampler(shape: Shape, data: TokenDataset, spec: TrainingSpec, documents: bool) -> Sampler:
    """The sampler of the benchmark's tokens."""
    kind: type[Sampler] = DocumentSampler if documents else WindowSampler
    rows = spec.tokens_per_step // shape.context
    return kind(data.split("train"), context=shape.context, sequences_per_step=rows, seed=0)


if __name__ == "__main__":
    main()
