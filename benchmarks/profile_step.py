"""Where the time of a training step goes: the operators of some steps, by their own time.

    python benchmarks/profile_step.py --shape tiny

Ours as in train_throughput.py (freezable norms, compiled, bfloat16 autocast, fused AdamW), random weights and tokens.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from measuring import cores, device_label, machine, table, write_result
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal.models.attention import fused_attention
from ln_removal.norms.surgery import install
from ln_removal.training.loss import Objective

GROUPS = {
    "attention": ("flash_attention", "scaled_dot_product"),
    "matrix products": ("addmm", "::mm", "bmm", "linear", "gemm", "mkldnn"),
    "generated kernels (norms, GELU, residuals, softmax of the loss)": (
        "CompiledFxGraph",
        "graph_",
        "cpp_fused",
        "triton",
    ),
    "optimizer and clipping": ("adamw", "foreach", "linalg_vector_norm", "Optimizer"),
}


def group_of(name: str) -> str:
    lowered = name.lower()
    return next((group for group, keys in GROUPS.items() if any(key.lower() in lowered for key in keys)), "other")


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
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape.sizes)).to(options.device)
    sites = install(model, eot_token_id=shape.eot_token_id)
    objective = Objective(model, eot_token_id=shape.eot_token_id)
    objective.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, shape.vocab_size - 1, (options.sequences, shape.context + 1), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, dtype=torch.bfloat16):
            loss = objective(tokens).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sites.update_running(0.9)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    with ExitStack() as stack:
        stack.enter_context(fused_attention(model))
        for _ in range(3):
            step()
        with profile(activities=activities) as recorded:
            for _ in range(options.steps):
                step()
    own = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, own) for event in recorded.key_averages() if getattr(event, own) > 0}
    total = sum(times.values())
    groups: dict[str, float] = {}
    for name, spent in times.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + spent / total
    rows = [
        ["", "share"],
        *([name, f"{share:.1%}"] for name, share in sorted(groups.items(), key=lambda item: -item[1])),
    ]
    print(table(rows))
    largest = sorted(times.items(), key=lambda item: -item[1])[:25]
    print(table([["operator", "share"], *([name[:90], f"{spent / total:.1%}"] for name, spent in largest)]))
    result = {
        "shape": options.shape,
        "tokens": options.sequences * shape.context,
        "groups": groups,
        "operators": {name: spent / total for name, spent in largest},
        "machine": machine(options.device, torch.get_num_threads()),
    }
    write_result(f"profile-{options.shape}-{device_label(options.device)}", result, options.out)


if __name__ == "__main__":
    main()
