"""Where the time of a training step goes: the operators of some steps, by their own time.

    python benchmarks/profile_step.py --shape tiny

Ours as in train_throughput.py (freezable norms, compiled, bfloat16 autocast, fused AdamW), random weights and tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import cores, device_label, machine, table, write_result
from shapes import SHAPES, Shape
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal.models.attention import fused_attention
from ln_removal.norms.surgery import install
from ln_removal.training.loss import Objective

GROUPS = {
    "attention": ("flash_attention", "scaled_dot_product", "cudnn", "fmha", "flex_attention"),
    "matrix products": ("addmm", "::mm", "bmm", "linear", "gemm", "mkldnn", "nvjet", "cutlass", "splitKreduce"),
    "generated kernels (norms, GELU, residuals, softmax of the loss)": (
        "CompiledFxGraph",
        "graph_",
        "cpp_fused",
        "triton",
    ),
    "optimizer and clipping": ("adamw", "foreach", "linalg_vector_norm", "Optimizer", "multi_tensor"),
}


def group_of(name: str) -> str:
    lowered = name.lower()
    return next((group for group, keys in GROUPS.items() if any(key.lower() in lowered for key in keys)), "other")


def training_step(
    shape: Shape, device: str, sequences: int, *, compiled: bool = True, autocast: bool = True
) -> Callable[[], None]:
    """One step of ours on random weights and tokens (freezable norms, clipping, fused AdamW), to be called again and again."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape.sizes)).to(device)
    sites = install(model, eot_token_id=shape.eot_token_id)
    objective = Objective(model, eot_token_id=shape.eot_token_id)
    if compiled:
        objective.compile(dynamic=False)
    objective.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, shape.vocab_size - 1, (sequences, shape.context + 1), device=device)

    def step() -> None:
        with fused_attention(model):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                loss = objective(tokens).total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sites.update_running(0.9)

    return step


def main() -> None:
    """Profile, write benchmarks/results/profile-<shape>-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    shape = SHAPES[options.shape]
    step = training_step(shape, options.device, options.sequences)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    for _ in range(3):
        step()
    with profile(activities=activities) as recorded:
        for _ in range(options.steps):
            step()
    cuda = options.device == "cuda"
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    # On a GPU the kernels are counted, and not also the operators that started them.
    averages = [row for row in recorded.key_averages() if not cuda or row.device_type == DeviceType.CUDA]
    times = {event.key: getattr(event, own) for event in averages if getattr(event, own) > 0}
    total = sum(times.values())
    groups: dict[str, float] = {}
    for name, spent in times.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + spent / total
    rows = [
        ["", "share"],
        *([name, f"{share:.1%}"] for name, share in sorted(groups.items(), key=lambda item: -item[1])),
    ]
    print(table(rows))
    largest = sorted(times.items(), key=lambda item: -item[1])[:60]
    print(table([["operator", "share"], *([name[:90], f"{spent / total:.1%}"] for name, spent in largest)]))
    result = {
        "shape": options.shape,
        "tokens": options.sequences * shape.context,
        "groups": groups,
        "operators": {name: spent / total for name, spent in largest},
        "microseconds_per_step": total / options.steps,
        "machine": machine(options.device, torch.get_num_threads()),
    }
    write_result(f"profile-{options.shape}-{device_label(options.device)}", result, options.out)


if __name__ == "__main__":
    main()
