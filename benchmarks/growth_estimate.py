"""From one measured GPU to larger models and more GPUs: how long 500M tokens take, on paper.

    python benchmarks/growth_estimate.py

Measured are the speed of GPT-2 small (results/train_throughput-*.json), plain and with the losses of the recipe gpt2, and the time
of its kernels (results/profile-gpt2-*.json). Larger sizes are estimated twice. "Equal share": they reach the same FLOP/s.
"By parts": each part of the measured time grows with its own arithmetic or bytes:

    matrix products   6 N                attention   L D T            kernels of the blocks   L D
    loss              V                  optimizer   N, once a step

A size that has been measured, too, is shown with its figure. Several GPUs are data parallel: each computes its share of the
step, then the float32 gradients (4 N bytes) are reduced in a ring, 2 (p - 1) / p of them over the slowest link, and nothing of it
overlaps with the computation. Every number that was not measured is in ASSUMED, is printed, and is in the JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import RESULTS, table, write_result
from shapes import SHAPES

from ln_removal.config.estimate import count_parameters, estimate_memory, flops_per_token
from ln_removal.config.recipe import ArchitectureSpec, load_recipe

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MICRO_BATCHES = {"gpt2": 32, "gpt2-medium": 16, "gpt2-large": 8, "gpt2-xl": 4}
TOKENS = 500e6

ASSUMED = {
    "tokens_per_step": 524_288,  # of the recipe gpt2, also for the larger sizes
    "nvlink_bytes_per_second": 0.8 * 450e9,  # one direction of NVLink 4 by its data sheet, four fifths of it
    "fast_network_bytes_per_second": 0.8 * 8 * 50e9,  # a node of eight GPUs with eight links of 400 Gbit/s
    "slow_network_bytes_per_second": 0.8 * 12.5e9,  # a node of eight GPUs with one link of 100 Gbit/s
    "gpus_in_a_node": 8,
    "bucket_bytes": 25 * 2**20,  # DistributedDataParallel's default
    "seconds_per_bucket": 1e-4,  # latency of one reduction
}


@dataclass(frozen=True)
class Measured:
    """What was measured on one GPU.

    Attributes:
        teacher: time of a step with the recipe's losses, relative to a plain one.
        parts: seconds for a token of GPT-2 small, by the group that `group_of` names; their sum is the time of a token.
        sizes: tokens/s of other sizes.
        memory: bytes at the peak of a step with the recipe's losses.
    """

    gpu: str
    tokens_per_second: float
    teacher: float
    parts: dict[str, float]
    sizes: dict[str, float]
    memory: int
    micro_batch: int


def main() -> None:
    """Print the tables and write benchmarks/results/growth_estimate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", type=Path, default=RESULTS / "train_throughput-nvidia-h200.json")
    parser.add_argument("--profile", type=Path, default=RESULTS / "profile-gpt2-nvidia-h200.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measured = read(options.throughput, options.profile)
    rows = [estimate(size, measured) for size in SIZES]
    print(report(rows, measured))
    result = {
        "measured": {
            "gpu": measured.gpu,
            "tokens_per_second": measured.tokens_per_second,
            "teacher_step_over_plain_step": measured.teacher,
            "nanoseconds_per_token": {name: seconds * 1e9 for name, seconds in measured.parts.items()},
            "other_sizes": measured.sizes,
            "peak_memory_bytes": measured.memory,
            "micro_batch": measured.micro_batch,
        },
        "assumed": ASSUMED,
        "tokens": TOKENS,
        "rows": rows,
    }
    write_result("growth_estimate", result, options.out)


def read(throughput: Path, profile: Path) -> Measured:
    """The inputs, from result files."""
    found = json.loads(throughput.read_text())
    runs = {run["shape"]: run["contestants"] for run in found["runs"] if run["precision"] == "bfloat16"}
    small = runs["gpt2"]
    speed = {name: small[name]["tokens_per_second"]["median"] for name in ("ours", "ours_teacher")}
    spent: dict[str, float] = {}
    for name, microseconds in kernels(profile).items():
        spent[group_of(name)] = spent.get(group_of(name), 0) + microseconds
    whole = sum(spent.values())
    return Measured(
        gpu=found["machine"]["gpu"],
        tokens_per_second=speed["ours"],
        teacher=speed["ours"] / speed["ours_teacher"],
        parts={group: value / whole / speed["ours"] for group, value in spent.items()},
        sizes={
            size: contestants["ours"]["tokens_per_second"]["median"]
            for size, contestants in runs.items()
            if size != "gpt2" and "tokens_per_second" in contestants.get("ours", {})
        },
        memory=small["ours_teacher"]["peak_memory_bytes"],
        micro_batch=small["ours_teacher"]["micro_batch"],
    )


def kernels(profile: Path) -> dict[str, float]:
    """Time of each kernel of a profile by profile_step.py, or of the first one, whose list also has the operators."""
    found = json.loads(profile.read_text())
    if isinstance(found, dict):
        return dict(found["operators"])
    operators = ("aten::", "Memset", "Optimizer")
    return {row["name"]: row["microseconds"] for row in found if not row["name"].startswith(operators)}


def group_of(kernel: str) -> str:
    """The part of a step to which a kernel belongs."""
    if "nvjet" in kernel or "splitKreduce" in kernel or "gemm" in kernel:
        return "matrix products"
    if "cudnn" in kernel or "flash" in kernel:
        return "attention"
    if "logsumexp" in kernel:
        return "loss"
    return "optimizer" if "multi_tensor" in kernel else "kernels of the blocks"


def architecture(size: str) -> ArchitectureSpec:
    shape = SHAPES[size]
    names = ("n_layer", "n_head", "n_embd", "vocab_size")
    return ArchitectureSpec(n_positions=shape.context, **{name: getattr(shape, name) for name in names})


def estimate(size: str, measured: Measured) -> dict[str, Any]:
    """One size: speed of one GPU, memory, and minutes for TOKENS on several."""
    small, shape = architecture("gpt2"), architecture(size)
    context = SHAPES[size].context
    flops, count = flops_per_token(shape, context), count_parameters(shape)
    equal = measured.tokens_per_second * flops_per_token(small, context) / flops
    by_parts = 1 / token_seconds(shape, measured)
    speed = measured.sizes.get(size, measured.tokens_per_second if size == "gpt2" else by_parts)
    return {
        "size": size,
        "parameters": count,
        "flops_per_token": flops,
        "tokens_per_second": {"equal share": equal, "by parts": by_parts, "measured": measured.sizes.get(size)},
        "memory": memory(size, shape),
        "runs": {
            f"{gpus} GPUs" if gpus > 1 else "1 GPU": {
                network: run_of(gpus, bandwidth, speed / measured.teacher, count)
                for network, bandwidth in networks(gpus).items()
            }
            for gpus in (1, 8, 64)
        },
    }


def token_seconds(shape: ArchitectureSpec, measured: Measured) -> float:
    """Seconds of a token of this shape when each measured part grows with its own arithmetic."""
    small = architecture("gpt2")
    parameters = count_parameters(shape) / count_parameters(small)
    blocks = shape.n_layer * shape.n_embd / (small.n_layer * small.n_embd)
    growth = {
        "matrix products": parameters,
        "attention": blocks,
        "kernels of the blocks": blocks,
        "loss": shape.vocab_size / small.vocab_size,
        "optimizer": parameters,
    }
    return sum(seconds * growth[part] for part, seconds in measured.parts.items())


def networks(gpus: int) -> dict[str, float]:
    """Bytes a second of the slowest link of the ring, by the name of the network."""
    if gpus <= ASSUMED["gpus_in_a_node"]:
        return {"NVLink" if gpus > 1 else "alone": ASSUMED["nvlink_bytes_per_second"]}
    return {
        "8 x 400 Gbit/s": ASSUMED["fast_network_bytes_per_second"],
        "100 Gbit/s": ASSUMED["slow_network_bytes_per_second"],
    }


def run_of(gpus: int, bandwidth: float, tokens_per_second: float, parameters: int) -> dict[str, float]:
    """Time of a step and of TOKENS on `gpus` GPUs, of which each alone trains `tokens_per_second`."""
    compute = ASSUMED["tokens_per_step"] / gpus / tokens_per_second
    sent = 4 * parameters
    reduction = 0.0
    if gpus > 1:
        reduction = 2 * (gpus - 1) / gpus * sent / bandwidth
        reduction += sent / ASSUMED["bucket_bytes"] * ASSUMED["seconds_per_bucket"]
    step = compute + reduction
    return {
        "compute_seconds": compute,
        "reduction_seconds": reduction,
        "minutes": TOKENS / ASSUMED["tokens_per_step"] * step / 60,
        "efficiency": compute / step,
    }


def memory(size: str, shape: ArchitectureSpec) -> dict[str, float]:
    """GiB of one GPU by `ln_removal.config.estimate`, with the recipe's teacher."""
    recipe = load_recipe("gpt2")
    found = estimate_memory(recipe, shape, MICRO_BATCHES[size])
    weights = found.parameters + found.gradients + found.optimizer + found.teacher
    return {"micro_batch": MICRO_BATCHES[size], "states_gib": weights / 2**30, "total_gib": found.total / 2**30}


def report(rows: list[dict[str, Any]], measured: Measured) -> str:
    """The estimates as text tables."""
    speeds = [
        [
            "one GPU, plain step",
            "parameters",
            "tokens/s, equal share",
            "by parts",
            "measured",
            "estimated GiB with teacher",
        ]
    ]
    for row in rows:
        speed = row["tokens_per_second"]
        known = measured.tokens_per_second if row["size"] == "gpt2" else speed["measured"]
        speeds.append(
            [
                row["size"],
                f"{row['parameters'] / 1e6:.0f}M",
                f"{speed['equal share']:,.0f}",
                f"{speed['by parts']:,.0f}",
                f"{known:,.0f}" if known else "-",
                f"{row['memory']['total_gib']:.0f} ({row['memory']['micro_batch']} sequences)",
            ]
        )
    minutes = [[f"minutes for {TOKENS / 1e6:.0f}M tokens with the recipe's losses"]]
    minutes[0] += [f"{gpus}, {network}" for gpus, found in rows[0]["runs"].items() for network in found]
    for row in rows:
        runs = [run for found in row["runs"].values() for run in found.values()]
        minutes.append([row["size"], *(f"{run['minutes']:,.1f} ({run['efficiency']:.0%})" for run in runs)])
    shares = ", ".join(f"{part} {seconds * measured.tokens_per_second:.0%}" for part, seconds in measured.parts.items())
    head = (
        f"measured on {measured.gpu}: {measured.tokens_per_second:,.0f} tokens/s, a step with teacher takes "
        f"{measured.teacher:.2f} times a plain one; {shares}"
    )
    head += f"; {measured.memory / 2**30:.1f} GiB with teacher and {measured.micro_batch} sequences"
    assumed = "\n".join(f"assumed: {name} {value:,.4g}" for name, value in ASSUMED.items())
    return f"{head}\n{assumed}\n\n{table(speeds)}\n\n{table(minutes)}"


if __name__ == "__main__":
    main()
