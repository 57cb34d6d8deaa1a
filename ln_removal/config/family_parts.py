"""What the models of each family of [architecture] are made of, and which of its keys each family takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

REVIVAL_CHOICES = ("block_norm", "final_norm", "biases", "activation", "negative_slope", "slopes")
"""Keys of [architecture] that change what a GPT-2 or a Pythia is made of; see models/norm_choice.py."""

LADDER_CHOICES = {"residual_gain": "none", "initialisation": "gpt2", "qk_norm": False, "attention_scale": "1/sqrt(k)"}
"""Keys of [architecture] for a GPT-2 that trains without norms, with what transformers' own has; see models/chosen_parts.py."""

SHAPE_CHOICES = ("n_kv_head", "n_inner", "head_width", "tied", "attention_bias", "mlp_bias")
"""Keys of [architecture] that not every family takes."""


@dataclass(frozen=True)
class FamilyParts:
    """What the models of one family of [architecture] are made of, where a recipe does not choose.

    Attributes:
        norm, activation: in front of attention and MLP, and inside the MLP.
        gated: whether the MLP multiplies the activation of one map with another map.
        learned_positions: whether positions have embeddings.
        tied: whether the unembedding is the embedding.
        attention_biases: which maps of attention have a bias: "all", queries, keys and values ("qkv"), or "none".
        mlp_biases: whether the maps of the MLP have one.
        choices: the optional keys of [architecture] that the family takes.
        norms_of_heads: whether queries and keys have a norm of their own, over the width of a head.
    """

    norm: Literal["layernorm", "rmsnorm"]
    activation: Literal["gelu", "silu"]
    gated: bool
    learned_positions: bool
    tied: bool
    attention_biases: Literal["all", "qkv", "none"]
    mlp_biases: bool
    choices: tuple[str, ...]
    norms_of_heads: bool = False


FAMILY_PARTS = {
    "gpt2": FamilyParts(
        "layernorm", "gelu", False, True, True, "all", True, ("n_inner", "tied", *REVIVAL_CHOICES, *LADDER_CHOICES)
    ),
    "pythia": FamilyParts(
        "layernorm", "gelu", False, False, False, "all", True, ("n_inner", "tied", "attention_bias", *REVIVAL_CHOICES)
    ),
    "llama": FamilyParts("rmsnorm", "silu", True, False, False, "none", False, SHAPE_CHOICES),
    "qwen2": FamilyParts("rmsnorm", "silu", True, False, False, "qkv", False, SHAPE_CHOICES[:4]),
    "qwen3": FamilyParts("rmsnorm", "silu", True, False, False, "none", False, SHAPE_CHOICES[:5], norms_of_heads=True),
}
"""By the family's name in [architecture]. A Mistral without its sliding window is a Llama."""


def with_family_defaults(table: Any) -> Any:
    """An [architecture] in which the norms and the activation are the family's own where it names none."""
    parts = FAMILY_PARTS.get(str(table.get("family"))) if isinstance(table, Mapping) else None
    if parts is None:
        return table
    return {"block_norm": parts.norm, "final_norm": parts.norm, "activation": parts.activation, **table}
