"""Whole training steps of arms of the ladder (recipes/normfree/ladder.toml), in turns in one process.

    python benchmarks/ladder_throughput.py
    python benchmarks/ladder_throughput.py --arms "LN + GELU" "no norm + ReLU" --width 768 --layers 12

The steps are those of `ln-pretrain`: the arm's model, compiled, autocast, clipping and the arm's optimizers, on random tokens.
Every round times some steps of each arm, one arm after the other. A ratio is the median over the rounds of the baseline's time to
that of the arm in the same round, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import cores, device_label, machine, spread, table, write_result
from pacing import synchronise
from revival_throughput import ratio

from ln_removal.config.recipe import Recipe, with_overrides
from ln_removal.config.sweep import load_sweep
from ln_removal.models.attention import fused_attention
from ln_removal.models.norm_choice import build_model
from ln_removal.training.loss import Objective
from ln_removal.training.optimizers import build_optimizers

LADDER = Path(__file__).parent.parent / "recipes" / "normfree" / "ladder.toml"
ARMS = (
    "LN + GELU + unit + gain + 1/k",
    "no norm + GELU + unit + gain + 1/k",
    "no norm + ReLU + unit + gain + 1/k",
    "LN + GELU",
    "no norm + ReLU",
    "no norm but QK-RMSNorm + ReLU",
    "DyT + ReLU + unit",
    "Derf + ReLU + unit",
)


def training_step(recipe: Recipe, device: str) -> Callable[[], None]:
    """One optimizer step of an arm on random weights and tokens, to be called again and again."""
    assert recipe.architecture is not None
    shape, spec = recipe.architecture, recipe.training
    torch.manual_seed(0)
    model = build_model(shape, eot_token_id=0).to(device)
    objective = Objective(model, eot_token_id=0)
    objective.compile(dynamic=False)
    objective.train()
    optimizers = build_optimizers(model, spec)
    tokens = torch.randint(
        1, shape.vocab_size, (spec.tokens_per_step // recipe.data.context, recipe.data.context + 1), device=device
    )

    def step() -> None:
        with fused_attention(model), torch.autocast(device, dtype=torch.bfloat16):
            loss = objective(tokens).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], count: int) -> float:
    """Seconds a step, of `count` steps."""
    synchronise()
    began = time.perf_counter()
    for _ in range(count):
        step()
    synchronise()
    return (time.perf_counter() - began) / count


def main() -> None:
    """Time the arms, write benchmarks/results/ladder_throughput-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="names in the sweep; the first is the baseline")
    parser.add_argument("--width", type=int, help="default: the sweep's")
    parser.add_argument("--layers", type=int, help="default: the sweep's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps of an arm in a round")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64
    sizes = {"architecture.n_embd": options.width, "architecture.n_layer": options.layers}
    chosen = {key: value for key, value in sizes.items() if value is not None}
    recipes = {arm.name: with_overrides(arm.recipe, chosen) for arm in load_sweep(LADDER).arms}
    steps = {name: training_step(recipes[name], options.device) for name in options.arms}
    for step in steps.values():
        timed(step, 5)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, options.steps))
    baseline = seconds[options.arms[0]]
    found: dict[str, dict[str, Any]] = {
        name: {
            "seconds_a_step": spread(samples),
            "speed_to_baseline": ratio(baseline, samples),
        }
        for name, samples in seconds.items()
    }
    tokens = recipes[options.arms[0]].training.tokens_per_step
    rows = [["arm", "tokens/s", f"to {options.arms[0]}"]]
    rows += [
        [name, f"{tokens / each['seconds_a_step']['median']:,.0f}", f"{each['speed_to_baseline']:.3f}"]
        for name, each in found.items()
    ]
    print(table(rows))
    result = {
        "machine": machine(options.device, options.threads),
        "sizes": chosen,
        "tokens_per_step": tokens,
        "arms": found,
    }
    write_result(f"ladder_throughput-{device_label(options.device)}", result, options.out)


if __name__ == "__main__":
    main()
