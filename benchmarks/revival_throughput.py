"""One optimizer step of the norm-free ReLU GPT-2: ReLU's Revival's own code under its Trainer, and ours.

    python benchmarks/revival_throughput.py --peers DIR
    python benchmarks/revival_throughput.py --peers DIR --shape gpt2 --tokens-per-step 2048      # on a CPU

DIR holds a checkout of Nandan91/relu-revival-normfree; without --peers ours runs alone. Each contestant is a process of its own:
all are warmed up first and then take turns, sample by sample, on a GPU too. A ratio is the median over the rounds of one
contestant's time to the other's in the same round, so that other work on the machine slows both; every sample is in the JSON.

Both look into the attention now and then: the peer every 100 steps at the training batch, ours at a probe batch as often as the
recipe says. `peer_reports` and `ours_observed` do so at every step, with equally many sequences; what one look takes is their
time less that of the same contestant without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import cores, device_label, machine, spread, table, write_result
from pacing import Contestant
from revival_peer import LOG_EVERY, find_checkout
from shapes import Shape, write_token_directory

HERE = Path(__file__).parent

SHAPES = {
    "small": Shape(8, 192, 6, 4096, 128, tokens_per_step=4096, peer_micro_batch=32),
    "gpt2": Shape(12, 768, 12, 50000, 128, tokens_per_step=65536, peer_micro_batch=128),
}
"""What two cores can train, and the published set-up: that of recipes/normfree/codeparrot-gpt2.toml."""

WHAT: dict[str, tuple[str, dict[str, bool]]] = {
    "peer": ("its blocks and Trainer, reports off", {"attentions": False, "reports": False}),
    "peer_attentions": (
        "the same as its configuration has it: every step gives all attention probabilities",
        {"attentions": True, "reports": False},
    ),
    "peer_reports": ("the same, entropy and NaN counts reported at every step", {"attentions": True, "reports": True}),
    "ours_eager": ("this project, not compiled", {"compile": False, "observe": False}),
    "ours": ("this project as ln-pretrain runs it: compiled", {"compile": True, "observe": False}),
    "ours_observed": ("the same, observed at every step", {"compile": True, "observe": True}),
}
LOOKS = {"peer_reports": "peer_attentions", "ours_observed": "ours"}
"""Contestants that look at every step, and what they are without."""


def main() -> None:
    """Measure every shape asked for and add it to the device's result file."""
    options = _parse()
    label = device_label(options.device)
    path = options.out or HERE / "results" / f"revival_throughput-{label}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() and not options.fresh else []
    for name in options.shape:
        run = measure(name, options)
        runs = [old for old in runs if (old["shape"], old["precision"]) != (name, run["precision"])] + [run]
        print(report(run), flush=True)
        write_result(
            f"revival_throughput-{label}", {"machine": machine(options.device, options.threads), "runs": runs}, path
        )


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All contestants on one shape."""
    shape = SHAPES[name]
    tokens_per_step = options.tokens_per_step or shape.tokens_per_step
    running: list[Contestant] = []
    chosen = [who for who in options.only or WHAT if not who.startswith("peer") or options.peers is not None]
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        write_token_directory(shape, tokens, max(2**21, 4 * tokens_per_step))
        try:
            for who in chosen:
                running.append(_start(who, shape, tokens_per_step, tokens, options))
                running[-1].wait_until_ready(options.limit)
            for _ in range(options.samples):
                for contestant in running:
                    if contestant.alive:
                        contestant.sample(options.limit)
        finally:
            for contestant in running:
                contestant.stop()
    entries: dict[str, dict[str, Any]] = {}
    for contestant in running:
        entry: dict[str, Any] = {"what": WHAT[contestant.name][0]}
        error = contestant.error or ("out of memory" if contestant.ran_out_of_memory else None)
        if error or not contestant.samples:
            print(f"{contestant.name}: {error}", file=sys.stderr)
            entries[contestant.name] = {**entry, "error": error or "no sample"}
            continue
        entries[contestant.name] = {
            **entry,
            "seconds_a_step": spread(sample["seconds"] / sample["steps"] for sample in contestant.samples),
            "peak_memory_bytes": contestant.end.get("peak_memory", 0),
            "warmup_seconds": contestant.ready.get("seconds"),
            "steps_a_sample": contestant.settings["sample_steps"],
            **contestant.end.get("details", {}),
        }
    return {
        "shape": name,
        "architecture": asdict(shape),
        "precision": options.precision,
        "tokens_per_step": tokens_per_step,
        "contestants": entries,
        **figures({who: entry["seconds_a_step"]["samples"] for who, entry in entries.items() if "error" not in entry}),
    }


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios and costs of a look, from the seconds a step of each contestant, round by round.

    Returns:
        `times_ours`: each contestant's time to that of `ours`.
        `seconds_a_look`: for each of LOOKS; `look_share_of_100_steps`: that, to the time of the 100 steps between two reports.
    """
    found: dict[str, Any] = {"times_ours": {}, "seconds_a_look": {}, "look_share_of_100_steps": {}}
    for who, samples in seconds.items():
        if "ours" in seconds:
            found["times_ours"][who] = ratio(samples, seconds["ours"])
        without = LOOKS.get(who)
        if without in seconds:
            look = statistics.median(a - b for a, b in zip(samples, seconds[without], strict=True))
            found["seconds_a_look"][who] = look
            found["look_share_of_100_steps"][who] = look / (LOG_EVERY * statistics.median(seconds[without]))
    return found


def ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of sample / other of the same round."""
    return statistics.median(a / b for a, b in zip(samples, others, strict=True))


def report(run: dict[str, Any]) -> str:
    """A run as a text table."""
    rows = [["", "ms a step", "tokens/s", "times ours", "a look, ms", "of 100 steps", "peak memory"]]
    for who, entry in run["contestants"].items():
        if "error" in entry:
            rows.append([who, "failed", *[""] * 5])
            continue
        seconds = entry["seconds_a_step"]["median"]
        look, share = run["seconds_a_look"].get(who), run["look_share_of_100_steps"].get(who)
        rows.append(
            [
                who,
                f"{1e3 * seconds:.1f}",
                f"{run['tokens_per_step'] / seconds:,.0f}",
                f"{run['times_ours'][who]:.2f}" if who in run["times_ours"] else "-",
                f"{1e3 * look:.1f}" if look is not None else "",
                f"{share:.1%}" if share is not None else "",
                f"{entry['peak_memory_bytes'] / 2**30:.2f} GiB",
            ]
        )
    return f"\n{run['shape']}, {run['precision']}, {run['tokens_per_step']:,} tokens a step\n{table(rows)}"


def _start(who: str, shape: Shape, tokens_per_step: int, tokens: Path, options: argparse.Namespace) -> Contestant:
    ours = who.startswith("ours")
    settings: dict[str, Any] = {
        "shape": asdict(shape),
        "precision": options.precision,
        "tokens_per_step": tokens_per_step,
        "micro_batch": min(shape.peer_micro_batch, tokens_per_step // shape.context),
        "tokens": str(tokens),
        "device": options.device,
        "warmup_steps": 10,
        "sample_steps": 10,
        "peer": str(options.checkout),
        **WHAT[who][1],
    }
    environment = {
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    print(f"{who}: starting", file=sys.stderr, flush=True)
    script = HERE / "contestants" / ("revival_ours.py" if ours else "revival_trainer.py")
    return Contestant(who, script, settings, environment)


def _parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small"], choices=list(SHAPES))
    parser.add_argument("--peers", type=Path, help="folder with a checkout of the peer; default: leave it out")
    parser.add_argument("--only", nargs="+", choices=list(WHAT), help="only these contestants")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16, on a GPU float16 as published",
    )
    parser.add_argument("--samples", type=int, default=7, help="rounds, of 10 steps a contestant")
    parser.add_argument("--tokens-per-step", type=int, help="default: the shape's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each contestant")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a warm-up or a sample may take")
    parser.add_argument("--fresh", action="store_true", help="drop the runs that the result file already holds")
    parser.add_argument(
        "--out", type=Path, help="result file; default benchmarks/results/revival_throughput-<device>.json"
    )
    options = parser.parse_args()
    options.precision = options.precision or ("float16" if options.device == "cuda" else "bfloat16")
    if options.precision == "float16" and options.device == "cpu":
        parser.error("--precision float16: the peer's Trainer has it on a GPU only; use bfloat16 or float32")
    options.checkout = None if options.peers is None else find_checkout(options.peers)
    if options.peers is not None and options.checkout is None:
        parser.error(f"--peers {options.peers}: no folder there is a checkout of Nandan91/relu-revival-normfree")
    return options


if __name__ == "__main__":
    main()
