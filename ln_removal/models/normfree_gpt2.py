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

_NOT_INHERITED = ("model_type", "architectures", "auto_map", "transformers_version", "tie_word_embeddings", "dtype")
"""Entries of a GPT-2 configuration that say which class it is for, and so are not taken over."""


class NormFreeGPT2Config(GPT2Config):
    """Configuration of `NormFreeGPT2LMHeadModel`: GPT-2's, with an unembedding of its own.

    layer_norm_epsilon is kept from the original for the record; nothing reads it.
    """

    model_type = "normfree_gpt2"

    tie_word_embeddings: bool = False

    @classmethod
    def from_gpt2(cls, config: GPT2Config) -> NormFreeGPT2Config:
        """The configuration of the LN-free model folded from a model with configuration `config`."""
        # Filled in by saving too, but some tools ask a model that was never saved.
        return cls(**without_identity(config), architectures=["NormFreeGPT2LMHeadModel"])


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
        self.transformer.ln_f = nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=True)
        self.post_init()


def from_folded(
    config: GPT2Config, state: Mapping[str, Tensor], generation_config: GenerationConfig | None = None
) -> NormFreeGPT2LMHeadModel:
    """Build the LN-free model from folded weights, in evaluation mode.

    Args:
        config: of the model that was folded; its sizes, dropout and token ids are taken over.
        state: what `ln_removal.norms.surgery.fold` returned. The model takes the tensors over, without a copy.
        generation_config: how the model that was folded writes text; copied. None: transformers' defaults.
    """
    # On the meta device: no time and memory for random weights that are replaced at once.
    with torch.device("meta"):
        model = NormFreeGPT2LMHeadModel(NormFreeGPT2Config.from_gpt2(config))
    model.load_state_dict({name: nn.Parameter(value) for name, value in state.items()}, strict=True, assign=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, left
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def without_identity(config: GPT2Config) -> dict[str, Any]:
    """A GPT-2 configuration as a dictionary, without what ties it to one model class."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_INHERITED}
