"""Is our norm-free GPT-2 the one of ReLU's Revival, and is our attention entropy its?

    python benchmarks/revival_parity.py --peers DIR

DIR holds a checkout of Nandan91/relu-revival-normfree. Its blocks (`revival_peer.py` says how they run) and our
RevivalGPT2LMHeadModel get the same weights, far from their initialisation, and the same tokens, in float32 on the CPU. Compared
are logits, loss, gradients, and the attention entropy and NaN counts that its Trainer reports; then what is known to differ by
definition is measured: GELU, initialisation, slopes, weight decay, and the residual stream under autocast.

Shape legend: B batch, T positions, D width, H heads, L layers, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, table, write_result
from revival_peer import (
    LOG_EVERY,
    PeerModel,
    Reports,
    find_checkout,
    peer_module,
    peer_weights,
    set_slopes,
    trainer_stand_in,
)
from torch import Tensor, nn

from ln_removal.config.recipe import ArchitectureSpec, TrainingSpec
from ln_removal.models.norm_choice import build_model, learnable_slopes
from ln_removal.training.optimizers import build_optimizers
from ln_removal.training.probe import Probe

SIZES = {"n_layer": 4, "n_head": 6, "n_embd": 96, "n_positions": 128, "vocab_size": 500}
IDS = {"bos_token_id": 499, "eos_token_id": 499}
SEQUENCES = 4
SLOPE = 0.1

ARMS = [
    # our activation, the peer's, its mode of slopes
    ("gelu", "gelu", "per_layer"),
    ("gelu", "gelu_new", "per_layer"),
    ("relu", "relu", "per_layer"),
    ("leaky_relu", "leaky_relu", "per_layer"),
    ("learnable_leaky_relu", "learnable_lrelu", "per_layer"),
    ("learnable_leaky_relu", "learnable_lrelu", "global"),
]


def main() -> None:
    """Compare, write benchmarks/results/revival_parity.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder with a checkout of the peer")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkout = find_checkout(options.peers)
    if checkout is None:
        parser.error(f"--peers {options.peers}: no folder there is a checkout of Nandan91/relu-revival-normfree")
    model_utils, train_utils = peer_module(checkout, "model_utils"), peer_module(checkout, "train_utils")
    compared = [compare(model_utils, train_utils, norm, *arm) for norm in ("layernorm", "none") for arm in ARMS]
    print(report(compared))
    result = {
        "peer": {"repository": "Nandan91/relu-revival-normfree", "commit": _commit(checkout)},
        "model": {**SIZES, "sequences": SEQUENCES, "weights": "random, see `disturb`"},
        "arms": compared,
        "nan": nan_of_one_head(model_utils, train_utils),
        "initialisation": initialisation(model_utils),
        "slopes": slope_parameters(model_utils, train_utils),
        "autocast": [autocast_error(model_utils, norm, dtype) for norm in ("layernorm", "none") for dtype in HALVES],
        "machine": machine("cpu", torch.get_num_threads()),
    }
    for name in ("nan", "initialisation", "slopes", "autocast"):
        print(f"{name}: {result[name]}", file=sys.stderr)
    write_result("revival_parity", result, options.out)


def our_model(norm: str, activation: str, *, biases: str = "paper", slopes: str = "layer", seed: int = 0) -> Any:
    """A fresh RevivalGPT2LMHeadModel of SIZES, from the seed."""
    torch.manual_seed(seed)
    spec = ArchitectureSpec(
        **SIZES,  # type: ignore[arg-type]
        block_norm=norm,  # type: ignore[arg-type]
        biases=biases,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        negative_slope=SLOPE,
        slopes=slopes,  # type: ignore[arg-type]
    )
    return build_model(spec, eot_token_id=IDS["eos_token_id"]).eval()


def their_model(model_utils: ModuleType, norm: str, activation: str, mode: str, *, seed: int = 0) -> PeerModel:
    """The peer's model of SIZES, freshly initialised by its code from the seed."""
    torch.manual_seed(seed)
    return PeerModel(
        model_utils,
        {**SIZES, **IDS},
        norm={"layernorm": "ln", "none": "free"}[norm],
        activation=activation,
        slope=SLOPE,
        mode=mode,
        output_attentions=True,
    ).eval()


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Move weights in place to where attention is uneven, norms and biases matter and slopes differ by layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                parameter.copy_(0.4 * torch.rand((), generator=generator) - 0.1)
            elif parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(20 if name.endswith(("wte.weight", "wpe.weight")) else 4 if ".c_proj." in name else 6)


def same_weights(ours: nn.Module, theirs: PeerModel) -> None:
    """Give the peer's model our weights and slopes."""
    found = theirs.host.load_state_dict(peer_weights(ours.state_dict(), SIZES["n_layer"]), strict=False)
    assert not found.unexpected_keys and all("slopes" in name for name in found.missing_keys), found
    if slopes := learnable_slopes(ours):
        set_slopes(theirs, [slope.item() for slope in slopes.values()])


def batch() -> Tensor:
    """(B, T) uniform token ids."""
    shape = (SEQUENCES, SIZES["n_positions"])
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(2))


def their_report(
    train_utils: ModuleType, model: PeerModel, tokens: Tensor, step: int = LOG_EVERY
) -> tuple[Tensor, Reports]:
    """Loss and reports of the peer's own `compute_loss`."""
    reports = Reports()
    inputs = {"input_ids": tokens, "labels": tokens}
    loss = train_utils.MyTrainer.compute_loss(trainer_stand_in(model, reports, step=step), model, inputs)
    return loss, reports


def compare(
    model_utils: ModuleType, train_utils: ModuleType, norm: str, activation: str, theirs_is: str, mode: str
) -> dict[str, Any]:
    """One arm: largest differences of logits and entropy, relative ones of gradients."""
    ours, theirs = our_model(norm, activation), their_model(model_utils, norm, theirs_is, mode)
    disturb(ours)
    same_weights(ours, theirs)
    tokens = batch()
    observation = Probe(tokens, every=1, steps=1).observe(ours)
    entropy = torch.tensor(observation["entropy"]).mean(1).tolist()
    _, reports = their_report(train_utils, theirs, tokens)
    return {
        "norm": norm,
        "activation": activation,
        "peer_activation": theirs_is,
        "peer_slopes": mode if "learnable" in theirs_is else None,
        "entropy_by_layer": entropy,
        "largest_entropy_difference": max(abs(mine - reports.entropy[layer]) for layer, mine in enumerate(entropy)),
        "nan_counts": [observation["nan_counts"], list(reports.nan_counts.values())],
        "float32": step_differences(ours, theirs, tokens),
        "float64": step_differences(ours.double(), theirs.double(), tokens),
    }


def step_differences(ours: Any, theirs: PeerModel, tokens: Tensor) -> dict[str, Any]:
    """Largest differences of logits, loss and gradients, in the precision of the models."""
    ours.zero_grad()
    theirs.zero_grad()
    logits = ours(tokens).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    outputs = theirs(tokens, labels=tokens)
    outputs["loss"].backward()
    parameter, relative = max(gradient_differences(ours, theirs).items(), key=lambda item: item[1])
    return {
        "largest_logit": logits.abs().max().item(),
        "largest_logit_difference": (logits - outputs["logits"]).abs().max().item(),
        "loss": loss.item(),
        "loss_difference": (loss - outputs["loss"]).abs().item(),
        "largest_relative_gradient_difference": relative,
        "in_parameter": parameter,
    }


def gradient_differences(ours: nn.Module, theirs: PeerModel) -> dict[str, float]:
    """|g - g'| / |g| for each of our parameters that has a gradient, by name."""
    found = {name: parameter.grad for name, parameter in theirs.host.named_parameters()}
    differences = {}
    for name, parameter in ours.named_parameters():
        mine = parameter.grad
        assert mine is not None, name
        stem = name.rpartition("c_attn")[0]
        if name.endswith("c_attn.weight"):
            other = torch.cat([found[f"{stem}qk_attn.weight"], found[f"{stem}v_attn.weight"]], dim=1)
        elif name.endswith("c_attn.bias"):
            other = found[f"{stem}qk_attn.bias"]
        elif name.endswith(".slope"):
            other = found[name + "s"].sum()  # entries that the layer does not read have a gradient of 0
        else:
            other = found[name]
        differences[name] = ((mine - other).norm() / mine.norm()).item()
    return differences


def nan_of_one_head(model_utils: ModuleType, train_utils: ModuleType) -> dict[str, Any]:
    """What both report when one head of layer 1 has NaN for its queries."""
    ours, theirs = our_model("none", "relu"), their_model(model_utils, "none", "relu", "per_layer")
    disturb(ours)
    with torch.no_grad():
        ours.transformer.h[1].attn.c_attn.bias[0] = torch.nan
    same_weights(ours, theirs)
    tokens = batch()
    observation = Probe(tokens, every=1, steps=1).observe(ours)
    _, reports = their_report(train_utils, theirs, tokens)
    return {
        "ours": {
            "nan_counts": observation["nan_counts"],
            "entropy_of_layer_1_by_head": [_or_none(value) for value in observation["entropy"][1]],
        },
        "peer": {
            "nan_counts": list(reports.nan_counts.values()),
            "entropy_by_layer": [_or_none(value) for value in reports.entropy.values()],
        },
        "peer_times_heads_is_ours": [
            count * SIZES["n_head"] == observation["nan_counts"][layer] for layer, count in reports.nan_counts.items()
        ],
    }


def initialisation(model_utils: ModuleType) -> dict[str, Any]:
    """Standard deviations of fresh matrices."""
    found = {}
    models = {
        "ours, paper's biases": our_model("none", "relu"),
        "ours, all biases": our_model("none", "relu", biases="all"),
        "peer": their_model(model_utils, "none", "relu", "per_layer").host,
    }
    for who, model in models.items():
        blocks = model.transformer.h
        read = blocks[0].attn.qk_attn if who == "peer" else blocks[0].attn.c_attn
        found[who] = {
            "embeddings": model.transformer.wte.weight.std().item(),
            "queries_and_keys": read.weight[:, : 2 * SIZES["n_embd"]].std().item(),
            "attn.c_proj": torch.stack([block.attn.c_proj.weight for block in blocks]).std().item(),
            "mlp.c_fc": torch.stack([block.mlp.c_fc.weight for block in blocks]).std().item(),
            "mlp.c_proj": torch.stack([block.mlp.c_proj.weight for block in blocks]).std().item(),
        }
    expected = 0.02 / math.sqrt(2 * SIZES["n_layer"])
    return {**found, "layers": SIZES["n_layer"], "0.02 / sqrt(2 L)": expected}


def slope_parameters(model_utils: ModuleType, train_utils: ModuleType) -> dict[str, Any]:
    """How many slopes there are to learn, how many are read, and whether weight decay shrinks them."""
    from transformers import TrainingArguments

    found: dict[str, Any] = {"layers": SIZES["n_layer"]}
    for mode in ("global", "per_layer"):
        model = their_model(model_utils, "none", "learnable_lrelu", mode)
        slopes = {name: value for name, value in model.host.named_parameters() if name.endswith("slopes")}
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(output_dir=directory, weight_decay=0.1, report_to="none", use_cpu=True)
            stand_in = SimpleNamespace(model=model.host, optimizer=None, args=arguments)
            groups = train_utils.MyTrainer.create_optimizer(stand_in).param_groups
        loss, _ = their_report(train_utils, model, batch())
        loss.backward()
        moved = sum(int((value.grad != 0).sum()) for value in slopes.values())
        found[f"peer, {mode}"] = _slopes(slopes, groups) | {"with_a_gradient": moved}
    spec = TrainingSpec(steps=1, tokens_per_step=128, learning_rate=1e-3, weight_decay=0.1)
    for slopes_of in ("network", "layer"):
        mine = our_model("none", "learnable_leaky_relu", slopes=slopes_of)
        (optimizer,) = build_optimizers(mine, spec)
        found[f"ours, {slopes_of}"] = _slopes(learnable_slopes(mine), optimizer.param_groups)
    return found


def _slopes(slopes: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    return {
        "parameters": len(slopes),
        "numbers": sum(value.numel() for value in slopes.values()),
        "weight_decay": sorted({decay[id(value)] for value in slopes.values()}),
    }


HALVES = ("bfloat16", "float16")


def autocast_error(model_utils: ModuleType, norm: str, precision: str) -> dict[str, Any]:
    """The type of the residual stream under autocast, and how far the logits are from those in float32."""
    ours, theirs = our_model(norm, "relu"), their_model(model_utils, norm, "relu", "per_layer")
    disturb(ours)
    same_weights(ours, theirs)
    tokens = batch()
    types: dict[str, str] = {}
    for who, blocks in (("ours", ours.transformer.h), ("peer", theirs.transformer.h)):

        def note(module: nn.Module, args: Any, output: Any, who: str = who) -> None:
            types[who] = str((output[0] if isinstance(output, tuple) else output).dtype).removeprefix("torch.")

        blocks[-1].register_forward_hook(note)
    logits: dict[str, list[Tensor]] = {"ours": [], "peer": []}
    for half in (False, True):
        context: Any = torch.autocast("cpu", dtype=getattr(torch, precision)) if half else nullcontext()
        with torch.no_grad(), context:
            logits["ours"].append(ours(tokens).logits.float())
            logits["peer"].append(theirs(tokens)["logits"].float())
    found: dict[str, Any] = {"norm": norm, "precision": precision}
    for who, (full, half_precision) in logits.items():
        error = ((half_precision - full).norm() / full.norm()).item()
        found[who] = {"residual_stream": types[who], "relative_error_of_logits": _or_none(error)}
    return found


def report(compared: list[dict[str, Any]]) -> str:
    """The arms as a text table: largest differences, those of gradients relative to the gradient, those of entropy in nats."""
    head = [
        "arm",
        "peer's activation",
        "logits",
        "of",
        "loss",
        "gradients",
        "in float64: logits",
        "gradients",
        "entropy",
    ]
    rows = [head]
    for arm in compared:
        single, double = arm["float32"], arm["float64"]
        rows.append(
            [
                f"{arm['norm']}, {arm['activation']}",
                " ".join(filter(None, [arm["peer_activation"], arm["peer_slopes"]])),
                f"{single['largest_logit_difference']:.1e}",
                f"{single['largest_logit']:.0f}",
                f"{single['loss_difference']:.1e}",
                f"{single['largest_relative_gradient_difference']:.1e}",
                f"{double['largest_logit_difference']:.1e}",
                f"{double['largest_relative_gradient_difference']:.1e}",
                f"{arm['largest_entropy_difference']:.1e}",
            ]
        )
    return table(rows)


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
