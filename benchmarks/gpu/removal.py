"""Removals of one model at equal tokens on one GPU: each arm a process, all at once; then their scores beside the control's.

    python benchmarks/gpu/removal.py --model DIR --tokens DIR --out DIR --steps 120

The arms and the columns of the table are those of removal_quality.py. OUT/ARM.json is written when an arm is done, and the table
after each arm. The same command again runs only what is missing. It ends with an error if an arm has no result; a removal
that diverged has one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import cores, machine, write_result
from removal_arms import ARMS, CONTROLS
from removal_quality import BASE, recipe_of, run_arm, scores_on_prompts, show, table, without_infinity

from ln_removal.errors import DivergedError

CHOSEN = ("control-prompts", "paper-2-prompts", "gpt2", "gpt2-together", "gpt2-no-teacher")
"""The control, the published schedule, the recipe's method and two variants of it; all train on the same rows."""


def run_one(options: argparse.Namespace) -> None:
    """One arm, to OUT/ARM.json."""
    place: Path = options.out
    recipe = recipe_of(options.arm, str(options.model), 0, options.steps, options.layers)
    work = place / f"work-{options.arm}"
    try:
        result = run_arm(recipe, options.tokens, work, control=options.arm in CONTROLS, device=options.device)
    except DivergedError as error:  # a result, and no other error is
        result = {"failed": str(error)}
    partial = place / f"{options.arm}.json.part"
    partial.write_text(json.dumps(without_infinity({"of": identity(options), **result}), indent=1))
    partial.replace(place / f"{options.arm}.json")


def identity(options: argparse.Namespace) -> list[int]:
    """What an arm's result belongs to: steps, tokens a step, and when the model was written."""
    written = (options.model / "config.json").stat().st_mtime_ns
    return [options.steps, options.tokens_per_step, written]


def finished(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results of the arms that are done with this model and these steps."""
    results = {}
    for arm in options.arms:
        file = options.out / f"{arm}.json"
        if file.exists() and (result := json.loads(file.read_text())).get("of") == identity(options):
            results[arm] = result
    return results


def write_table(options: argparse.Namespace, original: dict[str, Any]) -> None:
    """OUT/removal.json: the table and the figures of all arms that are done."""
    results = finished(options)
    good = {arm: {0: result} for arm, result in results.items() if "failed" not in result}
    rows = table(good, options.tokens_per_step, {}, dict.fromkeys(results.keys() - good.keys(), 1))
    report = {
        "steps": options.steps,
        "base": BASE,
        "machine": machine(options.device),
        "about": {arm: ARMS[arm].about if arm in ARMS else "LayerNorm kept" for arm in options.arms},
        "original": original,
        "table": rows,
        "arms": results,
        "missing": [arm for arm in options.arms if arm not in results],
    }
    write_result("", without_infinity(report), options.json or options.out / "removal.json")
    print(show(rows), flush=True)


def main() -> None:
    """Run the arms that have no result yet, all at once, and write the table after each of them."""
    options = _parse()
    BASE.update(
        {
            "data.context": options.context,
            "data.validation_tokens": options.validation_tokens,
            "training.tokens_per_step": options.tokens_per_step,
            "training.micro_batch": options.micro_batch,
            "training.compile": options.device == "cuda",
            "training.evaluation_tokens": options.validation_tokens // 8,
        }
    )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.arm:
        run_one(options)
        return
    missing = [arm for arm in options.arms if arm not in finished(options)]
    running = start(missing, options)
    try:
        from ln_removal.models.loading import load_model

        loaded = load_model(str(options.model), device=options.device)
        original = scores_on_prompts(loaded, options.tokens, options.context)
        del loaded
        while running:
            time.sleep(0.5)
            if ended := [arm for arm, process in running.items() if process.poll() is not None]:
                for arm in ended:
                    del running[arm]
                write_table(options, original)
    finally:
        for process in running.values():
            process.terminate()
    write_table(options, original)
    print("original", json.dumps(original))
    if without := [arm for arm in options.arms if arm not in finished(options)]:
        for arm in without:
            print(f"--- {arm}\n{(options.out / f'{arm}.log').read_text()[-1500:]}", file=sys.stderr)
        sys.exit(f"no result: {', '.join(without)}")


def start(arms: list[str], options: argparse.Namespace) -> dict[str, subprocess.Popen[str]]:
    """One process for each arm; its output goes to OUT/ARM.log."""
    threads = max(1, cores() // max(1, len(arms)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = {}
    for arm in arms:
        with (options.out / f"{arm}.log").open("w") as log:
            running[arm] = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--arm", arm],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
            )
    return running


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens-per-step", type=int, default=65_536)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--validation-tokens", type=int, default=524_288)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arm", help="run this one only, in this process")
    parser.add_argument("--arms", nargs="+", default=CHOSEN)
    parser.add_argument("--json", type=Path, help="where the table goes; default OUT/removal.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
