"""ReLU's Revival's own blocks in a GPT-2 of this transformers, its own reporting, and our weights in its layout.

The checkout's code is imported where it lies and is no part of this project. Its `convertGPT2model` was written for transformers
4.30: transformers 5 calls a block with arguments that its block does not have, and wants a tensor where it returns a tuple. So
what is around the blocks is here: Hugging Face's embeddings in front, final norm and unembedding behind, the loss in the peer's
manner (T - 1 predictions of a row of T). Its Trainer's `compute_loss` runs as it is, on a stand-in for the Trainer.

Shape legend: B batch, T positions, D width, H heads, L layers, V vocabulary.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = "relu-revival-normfree"
"""What the name of the checkout's folder contains."""

LOG_EVERY = 100
"""Steps between two of its reports, a constant in its compute_loss."""


def find_checkout(directory: Path) -> Path | None:
    """The folder in `directory` that holds the peer, or `directory` itself; None when neither does."""
    candidates = [directory, *sorted(directory.iterdir())] if directory.is_dir() else []
    return next((path.resolve() for path in candidates if FOLDER in path.name and path.is_dir()), None)


def peer_module(checkout: Path, name: str) -> ModuleType:
    """The peer's `model_utils` or `train_utils`, from the checkout."""
    if name == "train_utils" and importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = ModuleType("wandb")  # imported at its top, used only when it reports there
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module(f"normfree_transformers.{name}")
    finally:
        sys.path.remove(str(checkout))
    assert module.__file__ is not None and Path(module.__file__).is_relative_to(checkout), module.__file__
    return module


class PeerModel(nn.Module):
    """The peer's converted GPT-2, with the forward pass around its blocks.

    Args:
        model_utils: the peer's module.
        sizes: arguments of a GPT2Config.
        norm: "ln" or "free".
        activation: in the peer's words; a name from transformers' table besides "leaky_relu" and "learnable_lrelu".
        slope: negative slope of a leaky ReLU, or where a learnable one begins.
        mode: of learnable slopes, "per_layer" or "global".
        dropout: of the embeddings; the blocks have none.
        output_attentions: give the probabilities of every layer, as the peer's configuration has it.
    """

    def __init__(
        self,
        model_utils: ModuleType,
        sizes: Mapping[str, int],
        *,
        norm: str,
        activation: str,
        slope: float = 0.01,
        mode: str = "per_layer",
        dropout: float = 0.0,
        output_attentions: bool,
    ) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(**sizes, embd_pdrop=dropout, attn_implementation="eager")
        host = GPT2LMHeadModel(config)
        # Only now, as in its run_clm.py: transformers does not know all of the names.
        config.update(
            {
                "norm_type": norm,
                "activation_function": activation,
                "lrelu_neg_slope": slope,
                "learnable_lrelu_mode": mode,
            }
        )
        self.host = model_utils.convertGPT2model(host, config)
        self.output_attentions = output_attentions

    @property
    def transformer(self) -> Any:
        """Where the peer's reporting looks for the blocks: `transformer.h`."""
        return self.host.transformer

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """(B, T) to `logits` (B, T, V), `loss` with labels, and `attentions`, L of (B, H, T, T), where they are wanted."""
        body = self.transformer
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = body.drop(body.wte(input_ids) + body.wpe(positions))
        attentions = []
        for block in body.h:
            outputs = block(hidden, use_cache=False, output_attentions=self.output_attentions)
            hidden = outputs[0]
            attentions += outputs[1:]
        logits = self.host.lm_head(body.ln_f(hidden))
        found: dict[str, Any] = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if self.output_attentions:
            found["attentions"] = tuple(attentions)
        return found


def peer_weights(ours: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The state of a RevivalGPT2LMHeadModel with the biases of the paper, in the peer's layout and names.

    The peer keeps queries and keys in one map and values in another, and has a bias of zeros, which is not trained, wherever
    ours has none. Slopes are left out: `set_slopes`.

    Args:
        ours: the state dict.
        layers: L.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name.endswith(".attn.c_attn.weight"):
            width = tensor.shape[0]
            stem = name.removesuffix("c_attn.weight")
            theirs[f"{stem}qk_attn.weight"], theirs[f"{stem}v_attn.weight"] = tensor.split([2 * width, width], dim=1)
            theirs[f"{stem}v_attn.bias"] = tensor.new_zeros(width)
        elif name.endswith(".attn.c_attn.bias"):
            theirs[name.replace("c_attn", "qk_attn")] = tensor
        elif name.endswith((".c_proj.weight", ".c_fc.weight")):
            theirs[name] = tensor
            theirs[name.replace(".weight", ".bias")] = tensor.new_zeros(tensor.shape[1])
        elif not name.endswith(".slope"):
            theirs[name] = tensor
    assert sum(name.endswith("qk_attn.weight") for name in theirs) == layers, sorted(theirs)
    return theirs


def set_slopes(peer: PeerModel, slopes: list[float]) -> None:
    """Give each layer of the peer its learnable slope; entries of a layer's vector that it does not read become NaN."""
    assert len(slopes) == len(peer.transformer.h), (len(slopes), len(peer.transformer.h))
    with torch.no_grad():
        for layer, (block, slope) in enumerate(zip(peer.transformer.h, slopes, strict=True)):
            vector = block.mlp.act.slopes
            place = layer if len(vector) > 1 else 0
            vector.fill_(torch.nan)
            vector[place] = slope


class Reports:
    """What the peer's callbacks are told, in the place of the files that they append to: figures by layer, the last report."""

    def __init__(self) -> None:
        self.entropy: dict[int, float] = {}
        self.nan_counts: dict[int, float] = {}
        self.mode = "global"

    def log_entropy(self, step: int, layer: int, value: float) -> None:
        self.entropy[layer] = value

    def log_nan_count(self, step: int, layer: int, value: float) -> None:
        self.nan_counts[layer] = value

    def log_slope(self, model: nn.Module, step: int) -> None: ...


def trainer_stand_in(model: nn.Module, reports: Reports, *, step: int) -> Any:
    """What the peer's `compute_loss` reads of its Trainer, at optimizer step `step`; it reports where 100 divides that."""
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(past_index=-1, report_to=[]),
        state=SimpleNamespace(global_step=step),
        logged_steps=set(),
        entropy_logging_callback=reports,
        nan_count_logging_callback=reports,
        neg_slope_logging_callback=reports,
    )
