"""A training small enough for a test: 2 layers, width 32, 8 sequences of 16 tokens a step, well under a second.

Two ranks in processes of their own run `main`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ln_removal.config.recipe import ScheduleSpec, TrainingSpec
from ln_removal.data.sampler import WindowSampler
from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, write_index
from ln_removal.files.atomic import checksum
from ln_removal.models.attention import fused_attention
from ln_removal.norms.schedule import RemovalSchedule, expand
from ln_removal.norms.surgery import NormSites, install
from ln_removal.training.divergence import WaitingSchedule
from ln_removal.training.loop import TrainResult, train
from ln_removal.training.loss import Auxiliary, Distillation, Objective, StepLoss, as_teacher
from ln_removal.training.metrics import Tracker
from ln_removal.training.probe import Probe
from ln_removal.training.session import Removal, Session
from ln_removal.training.setup import build_accelerator

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

VOCABULARY, EOT = 64, 63
CONTEXT, SEQUENCES = 16, 8
LAYERS = 2
STEPS = 24


def tiny_model(seed: int = 0, positions: int = CONTEXT) -> GPT2LMHeadModel:
    """Fresh, with GPT-2's own dropout of 0.1 in its configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=32,
        n_layer=LAYERS,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=EOT,
        eos_token_id=EOT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def write_tokens(directory: Path, tokens: int = 6000) -> TokenDataset:
    """A corpus in which the next token is likely the last one plus one, with an end-of-text here and there."""
    if not (directory / "index.json").exists():
        directory.mkdir(parents=True)
        random = np.random.default_rng(0)
        jumps = random.random(tokens) < 0.2
        data = np.cumsum(np.where(jumps, random.integers(0, EOT, tokens), 1)) % EOT
        data[random.random(tokens) < 0.03] = EOT
        index = TokenIndex({"name": "test"}, {"name": "test", "sha256": ""}, VOCABULARY, EOT, "uint16")
        for split in ("train", "validation"):
            file = directory / f"{split}-test-00000.bin"
            data.astype("uint16").tofile(file)
            index.shards.append(Shard(file.name, split, "test", tokens, 1, tokens, checksum(file)))
        write_index(directory, index)
    return TokenDataset.open(directory)


def tiny_spec(**changes: Any) -> TrainingSpec:
    values: dict[str, Any] = {
        "steps": STEPS,
        "tokens_per_step": CONTEXT * SEQUENCES,
        "learning_rate": 3e-3,
        "minimum_learning_rate": 3e-4,
        "warmup_steps": 4,
        "precision": "float32",
        "compile": False,
        "evaluate_every": 1000,
        "checkpoint_every": 5,
        "keep_checkpoints": 3,
    }
    return TrainingSpec.model_validate(values | changes)


def tiny_schedule(steps: int = STEPS) -> RemovalSchedule:
    """Freezes from step 3, tapered; both special constants are gone by step 20."""
    spec = ScheduleSpec(
        ln_2_start=3, ln_2_gap=2, qk_gap=1, v_gap=2, eot_after=2, first_after=1, taper=2, special_taper=2
    )
    return expand(spec, LAYERS, steps)


class Stop(Exception):
    """Ends a training from inside, as a crash would."""


class FaultyObjective(Objective):
    """Goes wrong at chosen steps, which it counts by its calls: train it with one batch a step."""

    bad_steps: frozenset[int] = frozenset()
    """Loss and gradients are NaN, and the residual stream is enormous."""

    infinite_loss_steps: frozenset[int] = frozenset()
    """The loss is infinite; the gradients are right."""

    stop_at: int | None = None
    calls = 0

    def forward(self, tokens: torch.Tensor) -> StepLoss:
        step, self.calls = self.calls, self.calls + 1
        if step == self.stop_at:
            raise Stop
        if step in self.bad_steps:
            hook = self.model.transformer.drop.register_forward_hook(lambda module, args, output: output * 1e15)
            loss = super().forward(tokens)
            hook.remove()
            return StepLoss(loss.total * torch.nan, loss.cross_entropy * torch.nan)
        loss = super().forward(tokens)
        if step in self.infinite_loss_steps:
            return StepLoss(loss.total, loss.cross_entropy + torch.inf)
        return loss


class TinyRun:
    """A model, its data and a directory; `train` trains it as a session of ln-remove would."""

    def __init__(
        self,
        directory: Path,
        *,
        removal: bool = True,
        spec: TrainingSpec | None = None,
        seed: int = 0,
        objective: type[Objective] = Objective,
        on_spike: Literal["wait", "ignore"] = "ignore",
        planned: RemovalSchedule | None = None,
    ) -> None:
        self.directory = directory
        self.on_spike = on_spike
        self.planned = planned
        self.schedule: RemovalSchedule | WaitingSchedule | None = None
        self.spec = spec or tiny_spec()
        self.data = write_tokens(directory.parent / "tokens")
        self.model = tiny_model(seed)
        teacher = as_teacher(copy.deepcopy(self.model), self.spec.precision)
        self.sites: NormSites | None = install(self.model, eot_token_id=EOT) if removal else None
        spec = self.spec
        self.objective = objective(
            self.model,
            eot_token_id=EOT,
            auxiliary=Auxiliary(spec.auxiliary_weight, spec.auxiliary_target, spec.auxiliary_sites)
            if removal
            else None,
            distillation=Distillation(teacher, spec.distillation, spec.distillation_lag) if removal else None,
        )

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def train(
        self,
        *,
        micro_batch: int = SEQUENCES,
        resume: bool = False,
        evaluate: Callable[[], Any] | None = None,
        probe: Probe | None = None,
    ) -> TrainResult:
        accelerator = build_accelerator("cpu")
        sampler = WindowSampler(
            self.data.split("train"), context=CONTEXT, sequences_per_step=SEQUENCES, seed=0, weights={"test": 1}
        )
        removal = None
        if self.sites is not None:
            planned = self.planned or tiny_schedule(self.spec.steps)
            self.schedule = WaitingSchedule(planned) if self.on_spike == "wait" else planned
            removal = Removal(self.sites, self.schedule)
        tracker = Tracker(
            self.directory / "metrics.jsonl",
            total_steps=self.spec.steps,
            label="test",
            enabled=accelerator.is_main_process,
        )
        teacher = self.objective.teacher
        theirs = contextlib.nullcontext() if teacher is None else fused_attention(teacher)
        with fused_attention(self.model), theirs, tracker:
            session = Session(
                self.objective,
                sampler,
                self.spec,
                accelerator=accelerator,
                tracker=tracker,
                state_directory=self.state,
                micro_batch=micro_batch,
                removal=removal,
                evaluate=evaluate,
                probe=probe,
                resume=resume,
            )
            return train(session)

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics()]


def weights_sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """What one rank of several does in the directory of its argument.

    It trains, stops at step 13, resumes compiled and with other initial weights, then trains once more with a loss that is
    infinite on one rank only; writes `rank-N.json`.
    """
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = build_accelerator("cpu")
    rank = accelerator.process_index
    with accelerator.main_process_first():
        write_tokens(directory.parent / "tokens")
    stopped = TinyRun(directory, objective=FaultyObjective)
    stopped.objective.stop_at = 13
    with contextlib.suppress(Stop):
        stopped.train()
    accelerator.wait_for_everyone()
    run = TinyRun(directory, seed=1 + rank)
    run.objective.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    run.train(resume=True, micro_batch=2)
    assert run.sites is not None
    sick = TinyRun(directory.parent / "sick", spec=tiny_spec(steps=6), removal=False, objective=FaultyObjective)
    sick.objective.infinite_loss_steps = frozenset({3} if rank == 1 else ())
    report = {
        "ranks": accelerator.num_processes,
        "constants": run.sites.frozen_constants(),
        "weights": weights_sha256(run.model),
        "sick_skipped": sick.train().skipped_steps,
        "sick_weights": weights_sha256(sick.model),
    }
    (directory / f"rank-{rank}.json").write_text(json.dumps(report))
