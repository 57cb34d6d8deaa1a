"""GPT-2 without LayerNorm as a transformers model: what `fold` fills and users load.

Nothing in it looks at a token's own statistics: ln_1, ln_2 and ln_f are identities, their frozen maps sit in the
weights behind them, and the unembedding is a matrix of its own with a bias. Everything else (attention, generation,
key-value cache, saving) is transformers' GPT-2.

This file needs PyTorch and transformers and nothing else: `ln-export --with-code` puts it beside a model's weights, for
users who load the model with trust_remote_code=True.

Shapes: D model width, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

_NOT_INHERITED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "tie_word_embeddings",
    "dtype",
    "split_qkv",
)
"""Entries of a GPT-2 configuration that say which class it is for, and so are not taken over."""


class NormFreeGPT2Config(GPT2Config):
    """Configuration of `NormFreeGPT2LMHeadModel`: GPT-2's, with an unembedding of its own.

    layer_norm_epsilon is kept from the original for the record; nothing reads it. With split_qkv, queries, keys and values
    have linear maps of their own.
    """

    model_type = "normfree_gpt2"

    tie_word_embeddings: bool = False
    split_qkv: bool = False

    @classmethod
    def from_gpt2(cls, config: GPT2Config) -> NormFreeGPT2Config:
        """The configuration of the LN-free model folded from a model with configuration `config`."""
        # Filled in by saving too, but some tools ask a model that was never saved.
        return cls(**without_identity(config), architectures=["NormFreeGPT2LMHeadModel"])


class SplitQKV(nn.Module):
    """GPT-2's c_attn as three linear maps, for tools that take linear maps apart (`ln-export --split-qkv`).

    Args:
        width: D of the model.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    @property
    def weight(self) -> Tensor:
        """(D, 3 D), as c_attn has it; TransformerLens reads it."""
        return torch.cat([self.q.weight, self.k.weight, self.v.weight]).T

    @property
    def bias(self) -> Tensor:
        """(3 D,)."""
        return torch.cat([self.q.bias, self.k.bias, self.v.bias])

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to queries, keys and values side by side, (..., 3 D)."""
        return torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1)


class NormFreeGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 language model with identities for norms and an untied unembedding with bias.

    Takes the inputs and gives the outputs of GPT2LMHeadModel.
    """

    config_class = NormFreeGPT2Config
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeGPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            block.ln_1 = nn.Identity()
            block.ln_2 = nn.Identity()
            if config.split_qkv:
                block.attn.c_attn = SplitQKV(config.n_embd)
        self.transformer.ln_f = nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=True)
        self.post_init()


def from_folded(
    config: GPT2Config,
    state: Mapping[str, Tensor],
    generation_config: GenerationConfig | None = None,
    *,
    split_qkv: bool = False,
) -> NormFreeGPT2LMHeadModel:
    """Build the LN-free model from folded weights, in evaluation mode.

    Args:
        config: of the model that was folded; its sizes, dropout and token ids are taken over.
        state: what `ln_removal.norms.surgery.fold` returned, or the state of an LN-free model, split or not. The model takes
            the tensors over, without a copy, unless it has to split or join them.
        generation_config: how the model that was folded writes text; copied. None: transformers' defaults.
        split_qkv: queries, keys and values get linear maps of their own.
    """
    own = NormFreeGPT2Config.from_gpt2(config)
    own.split_qkv = split_qkv
    # On the meta device: no time and memory for random weights that are replaced at once.
    with torch.device("meta"):
        model = NormFreeGPT2LMHeadModel(own)
    fitting = _split(state) if split_qkv else _joined(state)
    model.load_state_dict({name: nn.Parameter(value) for name, value in fitting.items()}, strict=True, assign=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, left
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with c_attn as three linear maps; nn.Linear keeps its weight output-first."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        start, joint, end = name.rpartition("attn.c_attn.")
        if not joint or end not in ("weight", "bias"):
            found[name] = value
            continue
        for part, own in zip("qkv", value.detach().tensor_split(3, dim=-1), strict=True):
            found[f"{start}{joint}{part}.{end}"] = own.T.contiguous() if end == "weight" else own.clone()
    return found


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with one c_attn a layer."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        start, split, end = name.rpartition("attn.c_attn.q.")
        if split:
            parts = [state[f"{start}attn.c_attn.{part}.{end}"].detach() for part in "qkv"]
            joint = torch.cat(parts)
            found[f"{start}attn.c_attn.{end}"] = joint.T.contiguous() if end == "weight" else joint
        elif "attn.c_attn.k." not in name and "attn.c_attn.v." not in name:
            found[name] = value
    return found


def without_identity(config: GPT2Config) -> dict[str, Any]:
    """A GPT-2 configuration as a dictionary, without what ties it to one model class."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_INHERITED}
