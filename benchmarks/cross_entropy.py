"""Four ways to the cross-entropy of the unembedding, forward and backward: time and memory.

    python benchmarks/cross_entropy.py --shape tiny             # 4,096 positions
    python benchmarks/cross_entropy.py --shape gpt2 --positions 2048

`materialised` holds all logits and is compiled; `recomputed` checkpoints chunks; `ours` is linear_cross_entropy, compiled;
`liger` is LigerFusedLinearCrossEntropyLoss (CUDA, when liger-kernel is installed). bfloat16 autocast, random data, in turns,
medians. Memory on CUDA is the allocator's peak; on a CPU it is what autograd keeps for the backward pass.

Shape legend: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import cores, device_label, machine, spread, table, write_result
from shapes import SHAPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ln_removal.training.cross_entropy import Head, linear_cross_entropy

CHUNK_BYTES = 1 << 26
"""Of `recomputed`: float32 logits of one chunk."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _part(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    rows = max(1, CHUNK_BYTES // 4 // weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        total = total + checkpoint(_part, hidden[part], weight, targets[part], use_reentrant=False)
    return total / len(hidden)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, Head(weight), targets).total


def ways(device: str) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "materialised": torch.compile(materialised, dynamic=False),
        "recomputed": torch.compile(recomputed, dynamic=False),
        "ours": torch.compile(ours, dynamic=False),
        "ours, eager": ours,
    }
    if device == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return found
        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return found


def measure(loss: Loss, leaves: tuple[Tensor, Tensor], targets: Tensor) -> dict[str, float]:
    """Seconds of one forward and backward pass, its loss, and bytes of memory."""
    hidden, weight = leaves
    device = hidden.device.type
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with (
        torch.autocast(device, dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        value = loss(hidden, weight, targets)
    value.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    hidden.grad = weight.grad = None
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else kept[0]
    return {"seconds": seconds, "loss": float(value.detach()), "memory_bytes": memory}


def main() -> None:
    """Measure every way, write benchmarks/results/cross_entropy-<shape>-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    hidden = torch.randn(options.positions, shape.n_embd, device=options.device, requires_grad=True)
    weight = (0.02 * torch.randn(shape.vocab_size, shape.n_embd, device=options.device)).requires_grad_()
    targets = torch.randint(0, shape.vocab_size, (options.positions,), device=options.device)
    samples: dict[str, list[dict[str, float]]] = {}
    contestants = ways(options.device)
    for loss in contestants.values():
        for _ in range(2):
            measure(loss, (hidden, weight), targets)
    for _ in range(options.samples):
        for way, loss in contestants.items():
            samples.setdefault(way, []).append(measure(loss, (hidden, weight), targets))
    rows, found = [["", "ms", "ours is", "memory", "loss"]], {}
    mine = spread(sample["seconds"] for sample in samples["ours"])["median"]
    for way, all_of_it in samples.items():
        seconds = spread(sample["seconds"] for sample in all_of_it)
        memory = max(sample["memory_bytes"] for sample in all_of_it)
        found[way] = {"seconds": seconds, "memory_bytes": memory, "loss": all_of_it[0]["loss"]}
        median = seconds["median"]
        rows.append(
            [
                way,
                f"{1e3 * median:.1f}",
                f"{median / mine:.2f} x",
                f"{memory / 2**20:,.0f} MiB",
                f"{all_of_it[0]['loss']:.4f}",
            ]
        )
    print(table(rows))
    result: dict[str, Any] = {
        "shape": options.shape,
        "positions": options.positions,
        "ways": found,
        "machine": machine(options.device, torch.get_num_threads()),
    }
    write_result(
        f"cross_entropy-{options.shape}-{options.positions}-{device_label(options.device)}", result, options.out
    )


if __name__ == "__main__":
    main()
