"""Does the time of a training step grow as its arithmetic does? Ours at several depths and widths, on one thread of a CPU.

    python benchmarks/growth.py

All models take turns, one step each, in several rounds; the figures are medians of processor time, so other work on the machine hardly
counts. A token costs 6 N + 12 L D T floating point operations (`ln_removal.config.estimate.flops_per_token`). The step is that
of training: freezable norms, bfloat16 autocast, clipping, fused AdamW. It is not compiled unless --compile asks for it, because
compiling 32 layers takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine, spread, table, write_result
from profile_step import training_step
from shapes import Shape

from ln_removal.config.estimate import count_parameters, flops_per_token
from ln_removal.config.recipe import ArchitectureSpec


def main() -> None:
    """Measure and write benchmarks/results/growth-cpu-1-thread.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512], help="multiples of 64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {(n_layer, width): build(n_layer, width, options) for width in options.widths for n_layer in options.layers}
    seconds = in_turns(steps, options.rounds)
    tokens = options.sequences * options.context
    rows = [figures(*size, seconds[size], tokens, options) for size in steps]
    add_relative(rows)
    print(report(rows))
    result = {
        "context": options.context,
        "vocabulary": options.vocabulary,
        "tokens_per_step": tokens,
        "precision": options.precision,
        "compiled": options.compile,
        "clock": "processor time of the process",
        "rows": rows,
        "machine": machine("cpu", 1),
    }
    write_result(f"growth-cpu-1-thread{'-compiled' if options.compile else ''}", result, options.out)


def build(n_layer: int, width: int, options: argparse.Namespace) -> Callable[[], None]:
    """A training step of a model of this size, with random weights and tokens."""
    shape = Shape(n_layer, width, width // 64, options.vocabulary, options.context, 0, 0)
    return training_step(
        shape, "cpu", options.sequences, compiled=options.compile, autocast=options.precision == "bfloat16"
    )


def in_turns(steps: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of processor time of each step in each round, after one step that is not counted."""
    seconds: dict[Any, list[float]] = {size: [] for size in steps}
    for number in range(rounds + 1):
        for size, step in steps.items():
            before = time.process_time()
            step()
            if number:
                seconds[size].append(time.process_time() - before)
    return seconds


def figures(n_layer: int, width: int, seconds: list[float], tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size: time and arithmetic of a token."""
    shape = ArchitectureSpec(
        n_layer=n_layer,
        n_head=width // 64,
        n_embd=width,
        n_positions=options.context,
        vocab_size=options.vocabulary,
    )
    flops = flops_per_token(shape, options.context)
    return {
        "n_layer": n_layer,
        "n_embd": width,
        "parameters": count_parameters(shape),
        "flops_per_token": flops,
        "seconds": spread(seconds),
        "microseconds_per_token": statistics.median(seconds) / tokens * 1e6,
        "gigaflops": flops * tokens / statistics.median(seconds) / 1e9,
    }


def add_relative(rows: list[dict[str, Any]]) -> None:
    """Time and arithmetic of a token as multiples of those of the first size of the same width."""
    for row in rows:
        first = next(other for other in rows if other["n_embd"] == row["n_embd"])
        row["time_ratio"] = row["microseconds_per_token"] / first["microseconds_per_token"]
        row["flops_ratio"] = row["flops_per_token"] / first["flops_per_token"]


def report(rows: list[dict[str, Any]]) -> str:
    """The sizes as a text table."""
    head = ["L x D", "MFLOP a token", "microseconds a token", "GFLOP/s", "time / arithmetic, against the smallest L"]
    cells = [
        [
            f"{row['n_layer']} x {row['n_embd']}",
            f"{row['flops_per_token'] / 1e6:.1f}",
            f"{row['microseconds_per_token']:.0f}",
            f"{row['gigaflops']:.0f}",
            f"{row['time_ratio']:.2f} / {row['flops_ratio']:.2f} = {row['time_ratio'] / row['flops_ratio']:.2f}",
        ]
        for row in rows
    ]
    return table([head, *cells])


if __name__ == "__main__":
    main()
