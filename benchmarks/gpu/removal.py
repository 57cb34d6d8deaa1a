"""Removals of one model at equal tokens on one GPU: each arm a process, all at once; then their scores beside the control's.

    python benchmarks/gpu/removal.py --model DIR --tokens DIR --out DIR --steps 140

The arms and the columns of the table are those of removal_quality.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from measuring import cores, machine, write_result
from removal_arms import CONTROLS
from removal_quality import BASE, recipe_of, run_arm, scores_on_prompts, show, table

ARMS = (*CONTROLS, "paper-2", "at-once", "staged-teacher", "together-teacher", "staged-fading")


def run_one(options: argparse.Namespace) -> None:
    """One arm, to OUT/ARM.json."""
    place: Path = options.out
    recipe = recipe_of(options.arm, str(options.model), 0, options.steps, options.layers)
    work = place / f"work-{options.arm}"
    try:
        result = run_arm(recipe, options.tokens, work, control=options.arm in CONTROLS, device=options.device)
    except ValueError as error:  # a run that diverged is a result
        result = {"failed": str(error)}
    (place / f"{options.arm}.json").write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens-per-step", type=int, default=65_536)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--validation-tokens", type=int, default=524_288)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arm", help="run this one only, in this process")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    options = parser.parse_args()
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
    from ln_removal.models.loading import load_model

    if options.arm:
        run_one(options)
        return
    threads = max(1, cores() // len(options.arms))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = {}
    for arm in options.arms:
        log = (options.out / f"{arm}.log").open("w")
        running[arm] = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--arm", arm],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        original = scores_on_prompts(
            load_model(str(options.model), device=options.device), options.tokens, options.context
        )
    finally:
        for process in running.values():
            process.wait()
    results = {
        arm: json.loads(file.read_text())
        if (file := options.out / f"{arm}.json").exists()
        else {"failed": "see its log"}
        for arm in options.arms
    }
    finished = {arm: {0: result} for arm, result in results.items() if "failed" not in result}
    rows = table(finished, options.tokens_per_step, {}, dict.fromkeys(results.keys() - finished.keys(), 1))
    print(show(rows))
    print("original", json.dumps(original))
    about = {"steps": options.steps, "base": BASE, "machine": machine(options.device)}
    write_result("", {**about, "original": original, "table": rows, "arms": results}, options.out / "removal.json")


if __name__ == "__main__":
    main()
