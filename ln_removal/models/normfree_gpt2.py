"""GPT-2 without LayerNorm as a transformers model: what `fold` fills and users load.

Nothing in it looks at a token's own statistics: ln_1, ln_2 and ln_f are identities, their frozen maps sit in the
weights behind them, and the unembedding is a matrix of its own with a bias. Everything else (attention, generation,
key-value cache, saving) is transformers' GPT-2.

This file needs PyTorch and transformers and nothing else: `ln-export --with-code` puts it beside a model's weights, for
users who load the model with trust_remote_code=True.

Shapes: D model width, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel


class NormFreeGPT2Config(GPT2Config):
    """Configuration of `NormFreeGPT2LMHeadModel`: GPT-2's, with an unembedding of its own.

    layer_norm_epsilon is kept from the original for the record; nothing reads it. With split_qkv, queries, keys and values
    have linear maps of their own.
    """

    model_type = "normfree_gpt2"

    tie_word_embeddings: bool = False
    split_qkv: bool = False


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
