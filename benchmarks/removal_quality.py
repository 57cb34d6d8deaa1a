"""How good is a removal: arms that differ in schedule and loss, trained on equal tokens and equal batches.

    python benchmarks/removal_quality.py --model tiny --tokens DIR --out DIR --seeds 0 1 2
    python benchmarks/removal_quality.py --model /tmp/testbed/model --name massive --tokens DIR --out DIR --arms at-once taper

Each (arm, seed) is one run of `ln_removal.remove`, written to OUT/NAME/ARM-SEED.json when it is done; what is there already is
not trained again. The table has, for each arm, mean and standard error over seeds of the held-out cross-entropy, of the gap
(minus the control's with the same seed), of the tokens until the gap is at most 0.05, and the worst training loss.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import machine
from removal_arms import ARMS, CONTROL

from ln_removal.recipe import Recipe, load_recipe, parse_overrides
from ln_removal.removal import remove

CLOSE = 0.05
"""Nats per token: the gap whose tokens are counted."""

BASE: dict[str, Any] = {
    "data.context": 256,
    "data.validation_tokens": 131_072,
    "training.tokens_per_step": 2_048,
    "training.learning_rate": 6e-4,
    "training.minimum_learning_rate": 6e-5,
    "training.warmup_steps": 10,
    "training.evaluate_every": 20,
    "training.evaluation_tokens": 32_768,
    "training.checkpoint_every": 100_000,
    "training.compile": False,
    "export.formats": ["normfree"],
}


def recipe_of(arm: str, model: str, seed: int, steps: int, n_layer: int) -> Recipe:
    """The shared recipe with an arm's changes. The control's schedule is never used."""
    changed = {**BASE, "model": model, "seed": seed, "training.steps": steps, "name": f"{arm}-{seed}"}
    chosen = ARMS["at-once" if arm == CONTROL else arm]
    changed |= {f"training.{key}": value for key, value in chosen.training.items() if arm != CONTROL}
    changed |= {f"data.{key}": value for key, value in chosen.data.items()}
    changed["schedule"] = chosen.schedule(n_layer, steps).model_dump(exclude_none=True)
    return load_recipe("tiny", changed)


def run_arm(recipe: Recipe, tokens: Path, work: Path, *, control: bool, device: str) -> dict[str, Any]:
    """Train one arm; the control is the run's own control, trained without a removal."""
    began = time.perf_counter()
    if work.exists():
        shutil.rmtree(work)
    if control:
        train_control(recipe, tokens, work, device)
        rows = read_rows(work / "control" / "metrics.jsonl")
    else:
        remove(recipe, work, tokens=tokens, questions=None, device=device, progress=False)
        rows = read_rows(work / "metrics.jsonl")
    evaluations = [(row["step"], row["cross_entropy"]) for row in rows if row["kind"] == "evaluation"]
    training = [row["loss"] for row in rows if row["kind"] == "train"]
    return {
        "arm": recipe.name,
        "evaluations": evaluations,
        "worst_training_loss": max((loss if math.isfinite(loss) else math.inf) for loss in training),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows if row["kind"] == "train"),
        "seconds": round(time.perf_counter() - began, 1),
        **scores(recipe, work / ("control/model" if control else "model"), tokens),
    }


def train_control(recipe: Recipe, tokens: Path, work: Path, device: str) -> None:
    """The vanilla control alone."""
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.removal import train_vanilla_control
    from ln_removal.training.setup import build_accelerator

    train_vanilla_control(
        recipe, work, data=TokenDataset.open(tokens), accelerator=build_accelerator(device), progress=False
    )


def scores(recipe: Recipe, model: Path, tokens: Path) -> dict[str, Any]:
    """Held-out cross-entropy and loss on odd text of a finished model."""
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.models import load_model

    loaded = load_model(str(model))
    loss = cross_entropy(
        loaded.model,
        TokenDataset.open(tokens).split("validation"),
        context=recipe.data.context,
        max_tokens=recipe.data.validation_tokens,
    )
    return {"cross_entropy": loss.cross_entropy, "odd_text": odd_losses(loaded, recipe.data.context)}


def odd_losses(loaded: Any, context: int) -> dict[str, float]:
    """Largest mean loss of a sequence, for each kind of odd text."""
    import torch
    import torch.nn.functional as F

    from ln_removal.evaluation.odd_text import odd_sequences

    worst: dict[str, float] = {}
    for kind, sequences in odd_sequences(loaded.tokenizer, context=context, count=16, seed=0).items():
        ids = torch.from_numpy(sequences)
        with torch.inference_mode():
            logits = loaded.model(ids).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        worst[kind] = float(losses.mean(dim=1).max())
    return worst


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(results: dict[str, dict[int, dict[str, Any]]], tokens_per_step: int) -> list[dict[str, Any]]:
    """One row an arm, over the seeds for which arm and control are done."""
    rows = []
    controls = results.get(CONTROL, {})
    for arm, by_seed in results.items():
        seeds = sorted(set(by_seed) & set(controls))
        if not seeds:
            continue
        gaps = [by_seed[seed]["cross_entropy"] - controls[seed]["cross_entropy"] for seed in seeds]
        reached = []
        for seed in seeds:
            goal = controls[seed]["evaluations"][-1][1] + CLOSE
            below = [step for step, loss in by_seed[seed]["evaluations"] if loss <= goal]
            # LayerNorms still in place would count as a gap of 0: only what stays below to the end.
            last_above = max((step for step, loss in by_seed[seed]["evaluations"] if loss > goal), default=0)
            after = [step for step in below if step > last_above]
            reached.append(after[0] * tokens_per_step if after else math.inf)
        odd = [max(by_seed[seed]["odd_text"].values()) for seed in seeds]
        rows.append(
            {
                "arm": arm,
                "seeds": len(seeds),
                "cross_entropy": mean_and_error([by_seed[seed]["cross_entropy"] for seed in seeds]),
                "gap": mean_and_error(gaps),
                "tokens_to_close": statistics.median(reached),
                "worst_training_loss": max(by_seed[seed]["worst_training_loss"] for seed in seeds),
                "worst_odd_loss": max(odd),
                "tokens_per_second": statistics.median(by_seed[seed]["tokens_per_second"] for seed in seeds),
            }
        )
    return sorted(rows, key=lambda row: row["gap"][0])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def show(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | seeds | cross-entropy | gap | tokens to a gap of 0.05 | worst training loss | worst odd text |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        close = "-" if math.isinf(row["tokens_to_close"]) else f"{row['tokens_to_close']:,.0f}"
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {row['cross_entropy'][0]:.4f} | {row['gap'][0]:+.4f} ± {row['gap'][1]:.4f} "
            f"| {close} | {row['worst_training_loss']:.2f} | {row['worst_odd_loss']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", default="embedded", help="of the testbed, in file names")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="one JSON a run goes to OUT/NAME")
    parser.add_argument("--arms", nargs="+", default=[CONTROL, *ARMS], choices=[CONTROL, *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the shared recipe")
    parser.add_argument("--json", type=Path, help="also write the whole table with every run here")
    given = parser.parse_args()
    from ln_removal.models import load_model

    BASE.update(parse_overrides(given.set))
    loaded = load_model(given.model)
    place = given.out / given.name
    place.mkdir(parents=True, exist_ok=True)
    original = {"odd_text": odd_losses(loaded, BASE["data.context"])}
    n_layer = loaded.model.config.n_layer
    del loaded
    for seed in given.seeds:
        for arm in given.arms:
            file = place / f"{arm}-{given.steps}-{seed}.json"
            if file.exists():
                continue
            recipe = recipe_of(arm, given.model, seed, given.steps, n_layer)
            try:
                result = run_arm(recipe, given.tokens, place / "work", control=arm == CONTROL, device=given.device)
            except ValueError as error:  # a run that diverged is a result
                result = {"failed": str(error)}
            file.write_text(json.dumps(result, indent=1))
            shown = result.get("cross_entropy", result.get("failed"))
            print(f"{given.name} {arm} seed {seed}: {shown} in {result.get('seconds')} s", flush=True)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in (CONTROL, *ARMS):
        for file in sorted(place.glob(f"{arm}-{given.steps}-*.json")):
            if (result := json.loads(file.read_text())) and "failed" not in result:
                results.setdefault(arm, {})[int(file.stem.rpartition("-")[2])] = result
    rows = table(results, BASE["training.tokens_per_step"])
    print(show(rows))
    print("worst odd text of the original:", max(original["odd_text"].values()))
    if given.json:
        report = {
            "testbed": given.name,
            "steps": given.steps,
            "base": BASE,
            "machine": machine(given.device),
            "original": original,
        }
        arms = {arm: ARMS[arm].about for arm in results if arm in ARMS}
        given.json.write_text(json.dumps(report | {"arms": arms, "table": rows, "runs": results}, indent=1))


if __name__ == "__main__":
    main()
