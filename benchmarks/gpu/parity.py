"""The same numbers on the GPU as on the CPU: logits in the middle of a removal, and the loss and weights of training steps.

    python benchmarks/gpu/parity.py --out FILE

A random GPT-2 with its norms half frozen. Float32 without TensorFloat-32 on both sides; bfloat16 is compared with float32, for scale.
The GPU's step is compiled, the CPU's is not.

Shape legend: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal.models.attention import fused_attention
from ln_removal.models.precision import autocast
from ln_removal.norms.surgery import install
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher

STEPS = 3


def build(layers: int, width: int) -> tuple[GPT2LMHeadModel, Tensor]:
    """A model whose norms are half frozen at stds of its own, and a batch (B, T + 1)."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=width,
        n_positions=128,
        vocab_size=1003,
        eos_token_id=0,
        bos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(1003, (8, 129))
    tokens[:, 40] = 0
    return model, tokens


def measure(device: str, precision: Any, layers: int, width: int) -> dict[str, Any]:
    """Logits (B, T, V) and, for each of STEPS steps of AdamW, loss and gradient norm; the weights at the end."""
    model, tokens = build(layers, width)
    teacher = as_teacher(copy.deepcopy(model), "float32").to(device)
    sites = install(model, eot_token_id=0)
    model.to(device).train()
    tokens = tokens.to(device)
    with fused_attention(model), fused_attention(teacher):
        model(tokens[:, :-1])
        sites.update_running(0.9)
        for name in sites.mixes():
            sites.set_mix(name, 0.5)
        with torch.no_grad(), autocast(torch.device(device), precision):
            logits = model(tokens[:, :-1]).logits.float().cpu()
        objective = Objective(
            model,
            eot_token_id=0,
            auxiliary=Auxiliary(0.1, "constants", "all"),
            distillation=Distillation(teacher, 0.5, 0.3),
        )
        if device == "cuda":
            objective.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        objective.train()
        losses, norms = [], []
        for _ in range(STEPS):
            with autocast(torch.device(device), precision):
                loss = objective(tokens)
            loss.total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            losses.append(float(loss.total.detach()))
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])
    return {"logits": logits, "losses": torch.tensor(losses), "gradient_norms": torch.tensor(norms), "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    reference = measure("cpu", "float32", options.layers, options.width)
    result: dict[str, Any] = {"device": options.device, "torch": torch.__version__}
    if options.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name(0)
    for precision in ("float32", "bfloat16"):
        found = measure(options.device, precision, options.layers, options.width)
        result[precision] = {
            name: {
                "largest_difference": float((value - reference[name]).abs().max()),
                "relative": float((value - reference[name]).norm() / reference[name].norm()),
            }
            for name, value in found.items()
        }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
