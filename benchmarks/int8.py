"""How much worse does a model predict in int8, and how large are the outliers in front of its linear maps?

    python benchmarks/int8.py --run checkpoints/demo
    python benchmarks/int8.py --tokens checkpoints/ladder/tokens --model LN=checkpoints/ladder/ln-gelu-seed0/model \\
        --model norm-free=checkpoints/ladder/best-seed0/model --out int8-ladder.json

It needs torchao, which is not a dependency of ln-removal: python -m pip install torchao. RUN is a finished run of ln-remove, whose
original, control and LN-free model are measured. Each model is measured in float32 and with weights and activations in int8, both
symmetric, the activations with scales that are computed on the way (torchao's Int8DynamicActivationInt8WeightConfig):

    row        a scale for each token, and one for each output of a map
    mixed      one scale for all activations of a forward pass, and one for each output of a map
    tensor     one scale for all activations, and one for each map

Every linear map of the blocks and the unembedding is in int8; embeddings, norms, softmax and sums stay in float32. With --by-kind
each kind of map is also quantised alone, with "tensor". In front of each map the activations of one batch are described by

    kurtosis   E[(x - mean)^4] / var^2 over all entries; 3 for a normal distribution
    neurons    mean(s^4) / mean(s^2)^2 with s the root mean square of each input over tokens, as in He et al. 2024 (arXiv 2405.19279);
               1 where all inputs are equally large, and their number where one has everything
    ratio      largest |x| over the median of |x|
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import machine, table, write_result
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ln_removal.data.tokens import TokenDataset
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.evaluation.scoring import models_of_run
from ln_removal.models.loading import load_model, positions_of

KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
"""Kinds of linear map of a GPT-2. Queries, keys and values are one map."""

SEQUENCES = 16
"""Windows whose activations are described, and windows of one forward pass."""


def main() -> None:
    """Measure, print the tables, write benchmarks/results/int8.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of ln-remove")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY", help="repeatable")
    parser.add_argument("--tokens", type=Path, help="prepared tokens; default: those of the run")
    parser.add_argument("--context", type=int, help="tokens in a window; default: the smallest context of the models")
    parser.add_argument("--max-tokens", type=int, default=65_536, help="validation tokens to score")
    parser.add_argument("--by-kind", action="store_true", help="also quantise each kind of map alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        import torchao
    except ImportError:
        sys.exit("int8.py needs torchao: python -m pip install torchao")
    names = models_of_run(options.run) if options.run is not None else {}
    names |= dict(one.partition("=")[::2] for one in options.model)
    tokens = options.tokens or (None if options.run is None else options.run / "tokens")
    if not names or tokens is None:
        parser.error("give --run, or --model and --tokens")
    data = TokenDataset.open(tokens)
    loaded = {name: as_linear(load_model(place).model) for name, place in names.items()}
    context = options.context or min(positions_of(model.config) for model in loaded.values())
    rows = []
    for name, model in loaded.items():
        rows.append({"model": name} | measure(model, data, context, options))
        print(line(rows[-1]), flush=True)
    print(report(rows))
    settings = {
        "context": context,
        "max_tokens": options.max_tokens,
        "torchao": torchao.__version__,
    }
    write_result("int8", {"machine": machine("cpu"), "settings": settings, "models": rows}, options.out)


def as_linear(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every Conv1D as an nn.Linear with the same weights, in place: quantisers know no other.

    A projection with a gain gets the gain in its weights.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        gain = torch.as_tensor(getattr(module, "gain", 1.0)).expand(module.nf)
        linear = nn.Linear(module.nx, module.nf, bias=module.bias is not None)
        with torch.no_grad():
            linear.weight.copy_((module.weight * gain).T)
            if module.bias is not None:
                # A bias of queries and keys alone is the shorter one.
                linear.bias.zero_()
                linear.bias[: len(module.bias)] = module.bias * gain[: len(module.bias)]
        model.set_submodule(name, linear)
    return model.eval()


def measure(model: PreTrainedModel, data: TokenDataset, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Losses in float32 and int8, and what is in front of the maps."""

    def loss(quantised: PreTrainedModel) -> float:
        split = data.split("validation")
        found = cross_entropy(quantised, split, context=context, batch_size=SEQUENCES, max_tokens=options.max_tokens)
        return found.cross_entropy

    losses = {"float32": loss(model)}
    losses |= {name: loss(quantised(model, name)) for name in ("row", "mixed", "tensor")}
    found: dict[str, Any] = {"cross_entropy": losses, "activations": activations(model, data, context)}
    if options.by_kind:
        found["by_kind"] = {kind: loss(quantised(model, "tensor", kind)) for kind in KINDS}
    return found


def quantised(model: PreTrainedModel, granularity: str, kind: str = "") -> PreTrainedModel:
    """A copy in int8: all linear maps, or those of one kind."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    chosen = {"row": PerRow(), "mixed": [PerTensor(), PerRow()], "tensor": PerTensor()}[granularity]
    own = copy.deepcopy(model)
    # A tied unembedding becomes a matrix of its own, so that the embedding stays as it is.
    own.lm_head.weight = nn.Parameter(own.lm_head.weight.detach().clone())

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and kind_of(name) != "" and kind in ("", kind_of(name))

    quantize_(
        own, Int8DynamicActivationInt8WeightConfig(granularity=chosen, set_inductor_config=False), filter_fn=wanted
    )
    return own


def kind_of(name: str) -> str:
    """Which of KINDS a module's name is of; "" for none. A c_attn inside a sequence counts too."""
    return next((kind for kind in KINDS if name.endswith(kind) or f"{kind}." in name), "")


@torch.no_grad()
def activations(model: PreTrainedModel, data: TokenDataset, context: int) -> dict[str, dict[str, float]]:
    """For each kind of map the median over layers, and the largest, of the figures of the module's text."""
    seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (kind := kind_of(name)):

            def keep(module: nn.Module, args: tuple[Tensor, ...], kind: str = kind) -> None:
                seen[kind].append(described(args[0]))

            handles.append(module.register_forward_pre_hook(keep))
    try:
        model(torch.from_numpy(next(data.split("validation").windows(context, batch=SEQUENCES))).long())
    finally:
        for handle in handles:
            handle.remove()
    return {kind: dict(_summary(rows)) for kind, rows in seen.items() if rows}


def described(x: Tensor) -> dict[str, float]:
    """Kurtosis, kurtosis of the neurons, and ratio of largest to median, of activations (..., inputs)."""
    rows = x.double().flatten(0, -2)
    centred = rows - rows.mean()
    size = rows.square().mean(dim=0)
    absolute = rows.abs().flatten()
    median = float(absolute.kthvalue(len(absolute) // 2 + 1).values)
    return {
        "kurtosis": float(centred.pow(4).mean() / centred.square().mean().square()),
        "neurons": float(size.square().mean() / size.mean().square()),
        # Behind a ReLU most entries are 0.
        "ratio": float(absolute.max()) / median if median > 0 else math.inf,
    }


def _summary(rows: list[dict[str, float]]) -> Iterator[tuple[str, float | None]]:
    for figure in rows[0]:
        values = sorted(row[figure] for row in rows)
        for word, value in (("median", values[len(values) // 2]), ("largest", values[-1])):
            yield f"{figure}_{word}", value if math.isfinite(value) else None


def line(row: dict[str, Any]) -> str:
    """The perplexities of a model, and how much larger they are in int8."""
    losses = dict(row["cross_entropy"])
    reference = losses.pop("float32")
    parts = [f"{name} {math.exp(loss):.3f} ({change(loss, reference)})" for name, loss in losses.items()]
    return f"{row['model']}: perplexity {math.exp(reference):.3f}, in int8: {', '.join(parts)}"


def change(loss: float, reference: float) -> str:
    """The change of the perplexity in per cent."""
    return f"{100 * math.expm1(loss - reference):+.2f} %"


def report(rows: list[dict[str, Any]]) -> str:
    """Two tables: perplexities, and activations."""
    scores = [["", "float32", *(f"int8, {name}" for name in ("row", "mixed", "tensor"))]]
    outliers = [["in front of", *(f"{row['model']}: kurtosis, neurons, ratio" for row in rows)]]
    for row in rows:
        losses = dict(row["cross_entropy"])
        reference = losses.pop("float32")
        cells = [f"{math.exp(loss):.3f} ({change(loss, reference)})" for loss in losses.values()]
        scores.append([row["model"], f"{math.exp(reference):.3f}", *cells])
    for kind in KINDS:
        outliers.append([kind, *(_outliers(row["activations"].get(kind)) for row in rows)])
    parts = [table(scores), table(outliers)]
    if all("by_kind" in row for row in rows):
        alone = [["quantised alone", *(row["model"] for row in rows)]]
        for kind in KINDS:
            alone.append([kind, *(change(row["by_kind"][kind], row["cross_entropy"]["float32"]) for row in rows)])
        parts.append(table(alone))
    return "\n\n".join(parts)


def _outliers(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    shown = (figures[f"{name}_largest"] for name in ("kurtosis", "neurons", "ratio"))
    return ", ".join("-" if one is None else f"{one:.3g}" for one in shown)


if __name__ == "__main__":
    main()
