"""Random tiny models of every family, with the variations that a family has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, EOT, POSITIONS = 101, 100, 32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": EOT,
    "eos_token_id": EOT,
}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2_SIZES),
    "gpt2-untied": ("GPT2", {**_GPT2_SIZES, "tie_word_embeddings": False}),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "neox-half-rotary": ("GPTNeoX", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "llama": ("Llama", {}),
    "llama-grouped-tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
}
"""By a name: the beginning of the classes' names in transformers, and settings."""


def kept(model: PreTrainedModel) -> tuple[str, ...]:
    """What a removal of its norms has to keep."""
    return ("qk-norms",) if model.config.model_type == "qwen3" else ()


def small_model(variant: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode whose norms have weights and biases unlike 1 and 0."""
    family, settings = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **settings})
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, head)(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter) + (0.05 if "bias" in name else 0.0))
    return model


def small_tokens(rows: int = 3, columns: int = 20, *, seed: int = 0) -> torch.Tensor:
    """(rows, columns) random tokens, some of them the end of a text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY - 1, (rows, columns), generator=generator)
    tokens[:, 7] = EOT
    return tokens
