"""Removals of one model at equal tokens on one GPU: each arm a process, all at once; then their scores beside the control's.

    python benchmarks/gpu/removal.py --model DIR --tokens DIR --out DIR --steps 140

The arms are those of removal_arms.py. Beside the held-out cross-entropy the table has the losses where interpretability tools read a
model: the first 128 tokens of documents, and the second copy of 64 random tokens, each with and without end-of-text in front.

Shape legend: B batch, T positions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import cores, machine, write_result
from removal_arms import CONTROL
from removal_quality import BASE, recipe_of, run_arm

ARMS = (CONTROL, "paper-2", "at-once", "short-std-fading", "staged-std-fading")
START, COPIED = 128, 64


def document_starts(split: Any, eot: int, count: int) -> np.ndarray[Any, Any]:
    """(B, START) first tokens of held-out documents that are at least so long."""
    rows = []
    for shard in range(len(split.shards)):
        tokens = split.read(shard, 0, split.shards[shard].tokens)
        ends = np.flatnonzero(tokens == eot)
        for first, last in zip(np.concatenate([[0], ends[:-1] + 1]), ends, strict=True):
            if last - first >= START:
                rows.append(tokens[first : first + START])
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return np.stack([rows[number] for number in chosen]).astype(np.int64)


@torch.inference_mode()
def row_losses(model: Any, rows: np.ndarray[Any, Any], eot: int, *, bos: bool, after: int) -> float:
    """Mean loss, nats per token, of the targets from column `after` of `rows` (B, T) on; the same targets with and without BOS."""
    tokens = torch.from_numpy(rows).to(model.device)
    if bos:
        tokens = torch.cat([torch.full_like(tokens[:, :1], eot), tokens], dim=1)
    losses = []
    for batch in tokens.split(16):
        logits = model(batch[:, :-1]).logits.float()
        targets = batch[:, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    found = torch.cat(losses)
    return float(found[:, after - 1 + int(bos) :].mean())


def score(directory: str, tokens: Path, device: str) -> dict[str, float]:
    """The four losses of a model."""
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.models.loading import load_model

    model = load_model(directory, device=device).model.eval()
    data = TokenDataset.open(tokens)
    starts = document_starts(data.split("validation"), data.eot_token_id, 200)
    half = np.random.default_rng(0).integers(1, min(data.vocab_size, 10_000), size=(64, COPIED))
    copies = np.concatenate([half, half], axis=1).astype(np.int64)
    found = {}
    for name, rows, after in (("document starts", starts, 1), ("second copy", copies, COPIED)):
        for bos in (False, True):
            found[name + (", BOS" if bos else "")] = row_losses(model, rows, data.eot_token_id, bos=bos, after=after)
    return found


def run_one(options: argparse.Namespace) -> None:
    """One arm, to OUT/ARM.json."""
    place: Path = options.out
    recipe = recipe_of(options.arm, str(options.model), 0, options.steps, options.layers)
    work = place / f"work-{options.arm}"
    try:
        result = run_arm(recipe, options.tokens, work, control=options.arm == CONTROL, device=options.device)
    except ValueError as error:  # a run that diverged is a result
        result = {"failed": str(error)}
    else:
        model = work / ("control/model" if options.arm == CONTROL else "model")
        result["rows"] = score(str(model), options.tokens, options.device)
    (place / f"{options.arm}.json").write_text(json.dumps(result, indent=1))


def show(results: dict[str, Any]) -> str:
    """The table as text."""
    lines = []
    control = results.get(CONTROL, {})
    for arm, result in results.items():
        if "cross_entropy" not in result:
            lines.append(f"{arm:20} {result.get('failed', '')}")
            continue
        gap = result["cross_entropy"] - control.get("cross_entropy", float("nan"))
        rows = "  ".join(f"{name} {value:.3f}" for name, value in result["rows"].items())
        lines.append(
            f"{arm:20} {result['cross_entropy']:.4f} gap {gap:+.4f} worst {result['worst_training_loss']:.2f}"
            f" odd {max(result['odd_text'].values()):.1f}  {rows}  {result['tokens_per_second']:,.0f} tokens/s"
        )
    return "\n".join(lines)


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
        original = {"rows": score(str(options.model), options.tokens, options.device)}
    finally:
        for process in running.values():
            process.wait()
    results = {
        arm: json.loads(file.read_text())
        if (file := options.out / f"{arm}.json").exists()
        else {"failed": "see its log"}
        for arm in options.arms
    }
    print(show(results))
    print("original", original["rows"])
    about = {"steps": options.steps, "base": BASE, "machine": machine(options.device)}
    write_result("", {**about, "original": original, "arms": results}, options.out / "removal.json")


if __name__ == "__main__":
    main()
