"""GPT-NeoX, Llama, Mistral, Qwen2 and Qwen3 without norms as transformers models: what `fold` fills and users load.

As `normfree_gpt2`: norms are identities, their frozen maps sit in the weights behind them, and the unembedding is a matrix of its
own. Behind LayerNorms (GPT-NeoX) it has a bias; a frozen RMSNorm adds none. Qwen3 keeps its norms of queries and keys. Everything
else is transformers' own model.

This file needs PyTorch and transformers and nothing else: `ln-export --with-code` puts it beside a model's weights, for
users who load the model with trust_remote_code=True.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM


class NormFreeGPTNeoXConfig(GPTNeoXConfig):
    """Configuration of `NormFreeGPTNeoXForCausalLM`: GPT-NeoX's, with an unembedding of its own. Nothing reads layer_norm_eps."""

    model_type = "normfree_gpt_neox"

    tie_word_embeddings: bool = False


class NormFreeLlamaConfig(LlamaConfig):
    """Configuration of `NormFreeLlamaForCausalLM`: Llama's, with an unembedding of its own. Nothing reads rms_norm_eps."""

    model_type = "normfree_llama"

    tie_word_embeddings: bool = False


class NormFreeMistralConfig(MistralConfig):
    """Configuration of `NormFreeMistralForCausalLM`: Mistral's, with an unembedding of its own. Nothing reads rms_norm_eps."""

    model_type = "normfree_mistral"

    tie_word_embeddings: bool = False


class NormFreeQwen2Config(Qwen2Config):
    """Configuration of `NormFreeQwen2ForCausalLM`: Qwen2's, with an unembedding of its own. Nothing reads rms_norm_eps."""

    model_type = "normfree_qwen2"

    tie_word_embeddings: bool = False


class NormFreeQwen3Config(Qwen3Config):
    """Configuration of `NormFreeQwen3ForCausalLM`: Qwen3's, with an unembedding of its own. The norms that stay read rms_norm_eps."""

    model_type = "normfree_qwen3"

    tie_word_embeddings: bool = False


def _take_norms_away(model: Any, final_norm: str, *, bias: bool) -> None:
    """Identities for norms, and an unembedding of its own."""
    for layer in model.base_model.layers:
        layer.input_layernorm = nn.Identity()
        layer.post_attention_layernorm = nn.Identity()
    setattr(model.base_model, final_norm, nn.Identity())
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=bias)
    model.post_init()


class NormFreeGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    """GPT-NeoX language model with identities for norms and an untied unembedding with bias."""

    config_class = NormFreeGPTNeoXConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeGPTNeoXConfig) -> None:
        super().__init__(config)
        _take_norms_away(self, "final_layer_norm", bias=True)


class NormFreeLlamaForCausalLM(LlamaForCausalLM):
    """Llama language model with identities for norms and an untied unembedding."""

    config_class = NormFreeLlamaConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeLlamaConfig) -> None:
        super().__init__(config)
        _take_norms_away(self, "norm", bias=False)


class NormFreeMistralForCausalLM(MistralForCausalLM):
    """Mistral language model with identities for norms and an untied unembedding."""

    config_class = NormFreeMistralConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeMistralConfig) -> None:
        super().__init__(config)
        _take_norms_away(self, "norm", bias=False)


class NormFreeQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 language model with identities for norms and an untied unembedding."""

    config_class = NormFreeQwen2Config
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeQwen2Config) -> None:
        super().__init__(config)
        _take_norms_away(self, "norm", bias=False)


class NormFreeQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 language model with identities for norms, except those of queries and keys, and an untied unembedding."""

    config_class = NormFreeQwen3Config
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: NormFreeQwen3Config) -> None:
        super().__init__(config)
        _take_norms_away(self, "norm", bias=False)
