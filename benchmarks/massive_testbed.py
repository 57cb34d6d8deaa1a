"""The hard testbed of removal_quality.py: the embedded model, taught to carry a massive activation at position 0.

Published GPT-2s hold 30 to 50 times the usual residual std at position 0, written by the MLP of an early layer and taken
away by the last ones; it is what breaks a careless removal. A model of 3.5M parameters and 23M tokens has no such thing, and
planting a constant in the position embedding makes one that no optimizer can move. So here it is learned: fine-tuning with
every LayerNorm kept and one more term in the loss,

    0.1 mean over the inner blocks of log(std at position 0 / (ratio * mean std elsewhere))^2

for the first half of the run; the second half is plain fine-tuning, in which the model may undo what it does not want.

    python benchmarks/massive_testbed.py --out /tmp/testbed --tokens DIRECTORY      # about 8 minutes on one core

Shape legend: B batch, T positions, D model width.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ln_removal.config.recipe import Recipe, load_recipe
from ln_removal.data.tokens import TokenDataset
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.export.write import save_model
from ln_removal.models.attention import fused_attention
from ln_removal.models.loading import load_model
from ln_removal.training.loop import train
from ln_removal.training.loss import Objective, StepLoss
from ln_removal.training.metrics import Tracker
from ln_removal.training.session import Session, sampler_of
from ln_removal.training.setup import build_accelerator, compile_if_worthwhile

WEIGHT = 0.1


class MassiveObjective(Objective):
    """The usual loss plus the pull towards a massive activation at position 0, while `pull` is 1."""

    pull: Tensor

    def __init__(self, model: Any, *, eot_token_id: int | None, ratio: float) -> None:
        super().__init__(model, eot_token_id=eot_token_id)
        self.ratio = ratio
        self.register_buffer("pull", torch.ones(()))
        self._stds: list[Tensor] = []
        for block in list(model.transformer.h)[1:-1]:
            block.register_forward_hook(self._keep_std)

    def _keep_std(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._listening:  # an evaluation between two steps
            return
        residual = output[0] if isinstance(output, tuple) else output
        self._stds.append(residual.float().std(dim=-1))

    def forward(self, tokens: Tensor) -> StepLoss:
        loss = super().forward(tokens)
        terms = [(std[:, 0] / (self.ratio * std[:, 1:].mean().detach())).log().square().mean() for std in self._stds]
        self._stds = []
        return StepLoss(loss.total + WEIGHT * self.pull * torch.stack(terms).mean(), loss.cross_entropy)


def ratios(model: nn.Module, tokens: Tensor) -> list[float]:
    """Residual std at position 0 over the mean elsewhere, after the embedding and after each block; `tokens` is (B, T)."""
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states[:-1]
    stds = [state.float().std(dim=-1) for state in states]
    return [round(float(std[:, 0].mean() / std[:, 1:].mean()), 2) for std in stds]


def build(recipe: Recipe, data: TokenDataset, out: Path, *, ratio: float) -> dict[str, Any]:
    """Train the testbed, write it to `out/model` and say what it is like."""
    loaded = load_model(recipe.model)
    accelerator = build_accelerator("cpu")
    model = loaded.model
    held_out = torch.from_numpy(
        next(data.split("validation").windows(recipe.data.context, limit_tokens=16_384, batch=32))
    ).long()[:, :-1]

    def loss() -> dict[str, float]:
        result = cross_entropy(model, data.split("validation"), context=recipe.data.context, max_tokens=65_536)
        return {"cross_entropy": result.cross_entropy, "largest_ratio": max(ratios(model, held_out))}

    report: dict[str, Any] = {"before": loss() | {"ratios": ratios(model, held_out)}}
    objective = MassiveObjective(model, eot_token_id=data.eot_token_id, ratio=ratio)
    halves = [("pulled", recipe.training.steps // 2, 1.0), ("free", recipe.training.steps, 0.0)]
    with fused_attention(model):
        compile_if_worthwhile(objective, recipe.training.compile, tokens=recipe.tokens, device=accelerator.device)
        for name, steps, pull in halves:
            objective.pull.fill_(pull)
            spec = recipe.training.model_copy(update={"steps": steps, "decay_steps": recipe.training.steps})
            tracker = Tracker(
                out / "metrics.jsonl",
                total_steps=steps,
                label=name,
                progress="lines",
            )
            with tracker:
                session = Session(
                    objective,
                    sampler_of(recipe, data),
                    spec,
                    accelerator=accelerator,
                    tracker=tracker,
                    state_directory=out / "state",
                    micro_batch=spec.tokens_per_step // recipe.data.context,
                    evaluate=loss,
                    resume=True,
                )
                train(session)
            report[name] = loss() | {"ratios": ratios(model, held_out)}
    save_model(model, loaded.tokenizer, out / "model", dtype="float32")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="prepared tokens of the embedded model's tokenizer")
    parser.add_argument("--ratio", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    recipe = load_recipe(
        "tiny",
        {
            "training.steps": given.steps,
            "training.warmup_steps": 20,
            "training.learning_rate": 1e-3,
            "training.minimum_learning_rate": 0.0,
            "training.decay": "linear",
            "training.evaluate_every": 100,
            "training.checkpoint_every": 100,
            "data.context": 256,
            "seed": 100,
        },
    )
    data = TokenDataset.open(given.tokens)
    report = {
        "ratio": given.ratio,
        "recipe": copy.deepcopy(recipe.model_dump()),
        **build(recipe, data, given.out, ratio=given.ratio),
    }
    (given.out / "testbed.json").write_text(json.dumps(report, indent=1))
    print(json.dumps({key: report[key] for key in ("before", "pulled", "free")}, indent=1))


if __name__ == "__main__":
    main()
