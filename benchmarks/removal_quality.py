"""How good is a removal: arms that differ in schedule and loss, trained on equal tokens and equal batches.

    python benchmarks/removal_quality.py --model tiny --tokens DIR --out DIR --seeds 0 1 2
    python benchmarks/removal_quality.py --model /tmp/testbed/model --name massive --tokens DIR --out DIR --arms at-once staged-fading

Each (arm, seed) is one run, written to OUT/NAME/ARM-SEED.json when it is done; what is there already is
not trained again. The table has, for each arm, mean and standard error over seeds of the held-out cross-entropy, of the gap
(minus the control's with the same seed); the tokens until the held-out loss is within 0.05 of the control's, and until it is that
of the best published arm at its end, LayerNorms gone for good in both cases (medians); the worst training loss and the worst loss
on odd text, without and with the end-of-text token (BOS) in front; what the loss on prompts is above the control's, without and
with BOS: the first tokens of documents, the second copy of random tokens and of text. Runs that diverged are counted.
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

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import machine
from removal_arms import ARMS, CONTROLS, Arm, control_of

from ln_removal.config.recipe import Recipe, TrainingSpec, load_recipe, parse_overrides
from ln_removal.data.tokens import TokenDataset
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.evaluation.prompts import KINDS, prompt_losses, prompt_sets
from ln_removal.files.metrics_log import METRICS_FILE
from ln_removal.models.loading import load_model
from ln_removal.norms.schedule import expand
from ln_removal.pipelines import removal
from ln_removal.pipelines.context import run_context
from ln_removal.training.loop import train

CLOSE = 0.05
"""Nats per token: the gap whose tokens are counted."""

BOS = {"without": False, "with": True}
"""The end-of-text token in front of a prompt, by the name of its figure."""

PROMPT_COLUMNS = {
    "document start": "document start: gap",
    "second copy, random tokens": "copied random tokens: gap",
    "second copy, text": "copied text: gap",
}
"""Column of each kind of prompt; each has a figure without and one with BOS."""

BASE: dict[str, Any] = {
    # The schema's defaults, so that an arm has no term of the tiny recipe but those that it names itself.
    **{
        f"training.{name}": field.get_default()
        for name, field in TrainingSpec.model_fields.items()
        if not field.is_required()
    },
    "data.odd_text": 0.0,
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
    chosen = Arm("", ARMS["at-once"].schedule, data=CONTROLS[arm]) if arm in CONTROLS else ARMS[arm]
    changed |= {f"training.{key}": value for key, value in chosen.training.items()}
    changed |= {f"data.{key}": value for key, value in chosen.data.items()}
    changed["schedule"] = chosen.schedule(n_layer, steps).model_dump(exclude_none=True)
    return load_recipe("tiny", changed)


def run_arm(recipe: Recipe, tokens: Path, work: Path, *, control: bool, device: str) -> dict[str, Any]:
    """Train one arm; the control is the run's own control, trained without a removal."""
    began = time.perf_counter()
    if work.exists():
        shutil.rmtree(work)
    model = train_one(recipe, tokens, work, control=control, device=device)
    rows = read_rows(model.parent / METRICS_FILE)
    evaluations = [(row["step"], row["cross_entropy"]) for row in rows if row["kind"] == "evaluation"]
    training = [row["loss"] for row in rows if row["kind"] == "train"]
    return {
        "arm": recipe.name,
        "evaluations": evaluations,
        "complete_at": max((row["step"] for row in rows if row["kind"] == "event"), default=0),
        "worst_training_loss": max(math.inf if loss is None else loss for loss in training),  # null: it was not finite
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows if row["kind"] == "train"),
        "seconds": round(time.perf_counter() - began, 1),
        **scores(recipe, model, tokens, device),
    }


def train_one(recipe: Recipe, tokens: Path, work: Path, *, control: bool, device: str) -> Path:
    """Make the removal, or its control alone, in the directory `work`; returns the model's."""
    work.mkdir(parents=True)
    context = run_context(work, tokens=tokens, device=device, progress=False)
    if control:
        removal.train_control(context, recipe, TokenDataset.open(tokens))
        return work / "control" / "model"
    inputs = removal.prepare(context, recipe)
    with removal.removal_session(context, recipe, inputs) as session:
        trained = train(session)
    removal.export(context, recipe, inputs, trained)
    return work / "model"


def scores(recipe: Recipe, model: Path, tokens: Path, device: str) -> dict[str, Any]:
    """Held-out cross-entropy of a finished model, and its losses on prompts and on odd text."""

    loaded = load_model(str(model), device=device)
    loss = cross_entropy(
        loaded.model,
        TokenDataset.open(tokens).split("validation"),
        context=recipe.data.context,
        max_tokens=recipe.data.validation_tokens,
    )
    return {"cross_entropy": loss.cross_entropy, **scores_on_prompts(loaded, tokens, recipe.data.context)}


def scores_on_prompts(loaded: Any, tokens: Path, context: int) -> dict[str, Any]:
    """Mean loss on each kind of prompt, and the largest mean loss of a sequence of each kind of odd text."""

    data = TokenDataset.open(tokens)
    positions = loaded.model.config.max_position_embeddings
    prompts = prompt_sets(loaded.tokenizer, data.split("validation"), positions=positions)
    losses = prompt_losses(loaded.model, prompts, eot_token_id=data.eot_token_id)
    means = {key: float(np.average(found, weights=prompts[key[0]].counts)) for key, found in losses.items()}
    return {
        "prompts": {kind: {name: means[kind, bos] for name, bos in BOS.items()} for kind in KINDS if kind in prompts},
        "odd_text": worst_stress_losses(loaded, context),
        "odd_text_bos": worst_stress_losses(loaded, context, bos=data.eot_token_id),
    }


def worst_stress_losses(loaded: Any, context: int, *, bos: int | None = None) -> dict[str, float]:
    """Largest mean loss of a sequence, for each kind of odd text, with the token `bos` in front if it is given."""
    from ln_removal.data.stress_text import stress_sequences
    from ln_removal.evaluation.compare import stress_losses

    sequences = stress_sequences(loaded.tokenizer, context=context, count=16, seed=0)
    losses = stress_losses(loaded.model, sequences, bos=bos)
    return {kind: float(found.mean(axis=1).max()) for kind, found in losses.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(
    results: dict[str, dict[int, dict[str, Any]]],
    tokens_per_step: int,
    complete_at: dict[str, int],
    diverged: dict[str, int],
) -> list[dict[str, Any]]:
    """One row an arm, over the seeds for which arm and control are done.

    `complete_at` is the step from which on an arm is constant, where its run does not say; `diverged` counts failed runs.
    """
    rows = []
    for arm, by_seed in results.items():
        controls = results.get(arm if arm in CONTROLS else control_of(arm), {})
        seeds = sorted(set(by_seed) & set(controls))
        if not seeds:
            continue
        gaps = [by_seed[seed]["cross_entropy"] - controls[seed]["cross_entropy"] for seed in seeds]
        constant = {seed: by_seed[seed].get("complete_at", complete_at.get(arm, 0)) for seed in seeds}
        close = {seed: controls[seed]["evaluations"][-1][1] + CLOSE for seed in seeds}
        reached = [stays_below(by_seed[seed], close[seed], constant[seed]) for seed in seeds]
        caught_up = [stays_below(by_seed[seed], best_published(results, seed), constant[seed]) for seed in seeds]
        odd = [max(by_seed[seed]["odd_text"].values()) for seed in seeds]
        rows.append(
            {
                "arm": arm,
                "seeds": len(seeds),
                "diverged": diverged.get(arm, 0),
                "cross_entropy": mean_and_error([by_seed[seed]["cross_entropy"] for seed in seeds]),
                "gap": mean_and_error(gaps),
                "tokens_to_close": tokens_per_step * statistics.median(reached),
                "tokens_to_published": tokens_per_step * statistics.median(caught_up),
                "worst_training_loss": max(by_seed[seed]["worst_training_loss"] for seed in seeds),
                "worst_odd_loss": max(odd),
                "worst_odd_loss_bos": worst_with_bos([by_seed[seed] for seed in seeds]),
                "prompt_gaps": prompt_gaps([by_seed[seed] for seed in seeds], [controls[seed] for seed in seeds]),
                "tokens_per_second": statistics.median(by_seed[seed]["tokens_per_second"] for seed in seeds),
            }
        )
    return sorted(rows, key=lambda row: row["gap"][0])


def worst_with_bos(runs: list[dict[str, Any]]) -> float:
    """The largest loss on odd text with BOS of all runs; NaN where one lacks it."""
    return float(np.max([value for run in runs for value in run.get("odd_text_bos", {"": math.nan}).values()]))


def prompt_gaps(runs: list[dict[str, Any]], controls: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How much higher the loss on each kind of prompt is than the control's; means over seeds, NaN where one lacks it."""

    def loss(run: dict[str, Any], kind: str, name: str) -> float:
        return float(run.get("prompts", {}).get(kind, {}).get(name, math.nan))

    pairs = list(zip(runs, controls, strict=True))
    return {
        kind: {
            name: statistics.mean(loss(run, kind, name) - loss(control, kind, name) for run, control in pairs)
            for name in BOS
        }
        for kind in PROMPT_COLUMNS
    }


def stays_below(result: dict[str, Any], goal: float, complete_at: int) -> float:
    """The first evaluated step from which on the held-out loss is at most `goal`; infinite when it is not in the end.

    A model that still has its LayerNorms is below any goal: it counts from the first evaluation that saw none, one after
    `complete_at`, the step from which on everything is constant.
    """
    not_yet = (step for step, loss in result["evaluations"] if not loss <= goal or step <= complete_at)
    last_above = max(not_yet, default=0)
    return min((step for step, _ in result["evaluations"] if step > last_above), default=math.inf)


def best_published(results: dict[str, dict[int, dict[str, Any]]], seed: int) -> float:
    """The lowest final held-out loss of the published schedules with this seed; NaN when there is none."""
    final = [
        by_seed[seed]["evaluations"][-1][1]
        for arm, by_seed in results.items()
        if arm.startswith("paper-") and seed in by_seed
    ]
    return min(final, default=math.nan)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def show(rows: list[dict[str, Any]]) -> str:
    columns = (
        "arm",
        "seeds",
        "cross-entropy",
        "gap",
        "tokens to 0.05",
        "tokens to the published",
        "worst training",
        "worst odd text",
        "with BOS",
        *(column for title in PROMPT_COLUMNS.values() for column in (title, "with BOS")),
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]

    def tokens(count: float) -> str:
        return f"{count:,.0f}" if math.isfinite(count) else "-"

    def known(value: float, form: str) -> str:
        return "-" if math.isnan(value) else f"{value:{form}}"

    for row in rows:
        error = row["gap"][1]
        cells = (
            row["arm"],
            str(row["seeds"]) + (f" + {row['diverged']} diverged" if row["diverged"] else ""),
            f"{row['cross_entropy'][0]:.4f}",
            f"{row['gap'][0]:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else ""),
            tokens(row["tokens_to_close"]),
            tokens(row["tokens_to_published"]),
            f"{row['worst_training_loss']:,.2f}",
            f"{row['worst_odd_loss']:.2f}",
            known(row["worst_odd_loss_bos"], ".2f"),
            *(known(gap, "+.4f") for gaps in row["prompt_gaps"].values() for gap in gaps.values()),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", default="embedded", help="of the testbed, in file names")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="one JSON a run goes to OUT/NAME")
    parser.add_argument("--arms", nargs="+", default=[*CONTROLS, *ARMS], choices=[*CONTROLS, *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the shared recipe")
    parser.add_argument("--json", type=Path, help="also write the whole table with every run here")
    given = parser.parse_args()

    BASE.update(parse_overrides(given.set))
    loaded = load_model(given.model)
    place = given.out / given.name
    place.mkdir(parents=True, exist_ok=True)
    original = scores_on_prompts(loaded, given.tokens, BASE["data.context"])
    n_layer = loaded.model.config.n_layer
    del loaded
    for seed in given.seeds:
        for arm in given.arms:
            file = place / f"{arm}-{given.steps}-{seed}.json"
            if file.exists():
                continue
            recipe = recipe_of(arm, given.model, seed, given.steps, n_layer)
            try:
                result = run_arm(recipe, given.tokens, place / "work", control=arm in CONTROLS, device=given.device)
            except ValueError as error:  # a run that diverged is a result
                result = {"failed": str(error)}
            file.write_text(json.dumps(result, indent=1))
            shown = result.get("cross_entropy", result.get("failed"))
            print(f"{given.name} {arm} seed {seed}: {shown} in {result.get('seconds')} s", flush=True)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    diverged: dict[str, int] = {}
    for arm in (*CONTROLS, *ARMS):
        for file in sorted(place.glob(f"{arm}-{given.steps}-*.json")):
            if "failed" in (result := json.loads(file.read_text())):
                diverged[arm] = diverged.get(arm, 0) + 1
            else:
                results.setdefault(arm, {})[int(file.stem.rpartition("-")[2])] = result
    complete_at = {
        arm: expand(ARMS[arm].schedule(n_layer, given.steps), n_layer, given.steps).complete_at
        for arm in results
        if arm in ARMS
    }
    rows = table(results, BASE["training.tokens_per_step"], complete_at, diverged)
    print(show(rows))
    if gone := [arm for arm in diverged if arm not in results]:
        print("diverged with every seed:", ", ".join(gone))
    print("original:", json.dumps(original))
    if given.json:
        report = {
            "testbed": given.name,
            "steps": given.steps,
            "base": BASE,
            "machine": machine(given.device),
            "original": original,
            "diverged": diverged,
        }
        arms = {arm: ARMS[arm].about for arm in results if arm in ARMS}
        report |= {"arms": arms, "table": rows, "runs": results}
        given.json.write_text(json.dumps(without_infinity(report), indent=1, allow_nan=False))


def without_infinity(value: Any) -> Any:
    """`value` with null where a number is not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
