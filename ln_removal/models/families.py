"""The families of models that a removal knows, as data: where the norms are, who reads them, and how they fold.

Every family is a Pre-LN decoder: one norm in front of attention, one in front of the MLP, one in front of the unembedding. To
add a family: an entry in `FAMILIES`, its LN-free class beside the others (`normfree_rotary.py`) and in `registration.py`, and
its name in the parameters of tests/test_families.py, which then check it.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

NORM_FREE = "normfree_"
"""Begins the model_type of an LN-free model; the family's own follows."""

NORM_CHOICE = "revival_"
"""Begins the model_type of a model of norm_choice.py, which may have norms or none."""

_PREFIXES = (NORM_FREE, NORM_CHOICE)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers. Paths of modules in a block are relative to the block, and dotted.

    Attributes:
        title: what people call it.
        model_type: in config.json.
        model_class: transformers' class of the language model.
        body: its attribute that holds embeddings, blocks and final norm.
        embeddings: names in the body.
        blocks, final_norm: names in the body.
        attention, attention_norm, mlp_norm: names in a block.
        joint: how one linear map makes queries, keys and values: "columns" (all queries, then all keys, then all values), "heads"
            (head by head its query, key and value), or "" where each has a map of its own.
        qkv: paths of the maps behind attention_norm: the joint one, or those of queries, keys and values, in this order.
        mlp: paths of the maps behind mlp_norm.
        others: paths of all other linear maps of a block.
        activation: path of the MLP's activation, and `activation_field` its name in the configuration.
        centred: whether the norm subtracts the mean and adds a bias (LayerNorm), or does neither (RMSNorm).
        input_first: whether the maps of the blocks keep their weights input-first (transformers' Conv1D).
        epsilon: the norm's epsilon in the configuration.
        inner: the width inside of the MLP in the configuration.
        architecture: the family in a recipe's [architecture] whose models have the same parameters.
        kept: paths of norms that a removal leaves as they are, and `kept_as` what the option `keep` calls them.
    """

    title: str
    model_type: str
    model_class: str
    body: str
    embeddings: tuple[str, ...]
    blocks: str
    final_norm: str
    attention: str
    attention_norm: str
    mlp_norm: str
    joint: Literal["columns", "heads", ""]
    qkv: tuple[str, ...]
    mlp: tuple[str, ...]
    others: tuple[str, ...]
    activation: str
    activation_field: str
    centred: bool
    input_first: bool
    epsilon: str
    inner: str
    architecture: str
    kept: tuple[str, ...] = ()
    kept_as: str = ""

    @property
    def norm_free_type(self) -> str:
        """The model_type of the family's LN-free model."""
        return NORM_FREE + self.model_type

    @property
    def norm_name(self) -> str:
        """What people call the kind of norm that it has."""
        return "LayerNorm" if self.centred else "RMSNorm"

    def block(self, layer: int) -> str:
        """Path of a block in the language model."""
        return f"{self.body}.{self.blocks}.{layer}"

    @property
    def embedding(self) -> str:
        """Path of the tokens' embedding in the language model."""
        return f"{self.body}.{self.embeddings[0]}"

    def norms(self, layers: int) -> dict[str, str]:
        """Path of each norm in the language model, by its name in sites ("ln_1.0"), in the order of the residual stream."""
        found = {}
        for layer in range(layers):
            found[f"ln_1.{layer}"] = f"{self.block(layer)}.{self.attention_norm}"
            found[f"ln_2.{layer}"] = f"{self.block(layer)}.{self.mlp_norm}"
        return found | {"ln_f": f"{self.body}.{self.final_norm}"}

    def readers(self, layers: int) -> dict[str, str]:
        """Path of each linear map that reads a norm, with the name of that norm, in the order of the residual stream."""
        found: dict[str, str] = {}
        for layer in range(layers):
            found |= {f"{self.block(layer)}.{path}": f"ln_1.{layer}" for path in self.qkv}
            found |= {f"{self.block(layer)}.{path}": f"ln_2.{layer}" for path in self.mlp}
        return found | {"lm_head": "ln_f"}

    def is_input_first(self, path: str) -> bool:
        """Whether the linear map at a path in the language model keeps its weight input-first; the unembedding never does."""
        return self.input_first and path != "lm_head"

    def kept_norms(self, layers: int) -> list[str]:
        """Paths of the norms that stay."""
        return [f"{self.block(layer)}.{path}" for layer in range(layers) for path in self.kept]


def _llama_like(title: str, model_type: str, model_class: str, architecture: str, **differences: Any) -> Family:
    return Family(
        title=title,
        model_type=model_type,
        model_class=model_class,
        body="model",
        embeddings=("embed_tokens",),
        blocks="layers",
        final_norm="norm",
        attention="self_attn",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        joint="",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        mlp=("mlp.gate_proj", "mlp.up_proj"),
        others=("self_attn.o_proj", "mlp.down_proj"),
        activation="mlp.act_fn",
        activation_field="hidden_act",
        centred=False,
        input_first=False,
        epsilon="rms_norm_eps",
        inner="intermediate_size",
        architecture=architecture,
        **differences,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            title="GPT-2",
            model_type="gpt2",
            model_class="GPT2LMHeadModel",
            body="transformer",
            embeddings=("wte", "wpe"),
            blocks="h",
            final_norm="ln_f",
            attention="attn",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            joint="columns",
            qkv=("attn.c_attn",),
            mlp=("mlp.c_fc",),
            others=("attn.c_proj", "mlp.c_proj"),
            activation="mlp.act",
            activation_field="activation_function",
            centred=True,
            input_first=True,
            epsilon="layer_norm_epsilon",
            inner="n_inner",
            architecture="gpt2",
        ),
        Family(
            title="GPT-NeoX",
            model_type="gpt_neox",
            model_class="GPTNeoXForCausalLM",
            body="gpt_neox",
            embeddings=("embed_in",),
            blocks="layers",
            final_norm="final_layer_norm",
            attention="attention",
            attention_norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            joint="heads",
            qkv=("attention.query_key_value",),
            mlp=("mlp.dense_h_to_4h",),
            others=("attention.dense", "mlp.dense_4h_to_h"),
            activation="mlp.act",
            activation_field="hidden_act",
            centred=True,
            input_first=False,
            epsilon="layer_norm_eps",
            inner="intermediate_size",
            architecture="pythia",
        ),
        _llama_like("Llama", "llama", "LlamaForCausalLM", "llama"),
        _llama_like("Mistral", "mistral", "MistralForCausalLM", "llama"),
        _llama_like("Qwen2", "qwen2", "Qwen2ForCausalLM", "qwen2"),
        _llama_like(
            "Qwen3",
            "qwen3",
            "Qwen3ForCausalLM",
            "qwen3",
            kept=("self_attn.q_norm", "self_attn.k_norm"),
            kept_as="qk-norms",
        ),
    )
}
"""By model_type. Pythia is a GPT-NeoX; SmolLM2 and Llama 3 are Llamas."""


SIZES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""A model's sizes: the names in GPT-2's configuration, and those that the configurations of all families have."""


def known_families() -> str:
    """The families, for messages, behind "a"."""
    return "GPT-2, GPT-NeoX (Pythia), Llama (SmolLM2), Mistral, Qwen2 or Qwen3"


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, with its norms or without them.

    Raises:
        UserError: the model is of none.
    """
    family = known_family(config)
    if family is None:
        raise UserError(f"models of the type {config.model_type!r} are not supported; give a {known_families()}")
    return family


def known_family(config: PretrainedConfig) -> Family | None:
    """The family of a model, with its norms or without them; None for a model of no known one."""
    model_type = str(config.model_type)
    for prefix in _PREFIXES:
        model_type = model_type.removeprefix(prefix)
    return FAMILIES.get(model_type)


def is_norm_free(config: PretrainedConfig) -> bool:
    """Whether a configuration is of an LN-free model that this project has folded."""
    return str(config.model_type).startswith(NORM_FREE)


def is_norm_choice(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model that was built here to train with other norms, biases or activations."""
    return str(config.model_type).startswith(NORM_CHOICE)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a language model, first to last."""
    loaded: Any = model
    return list(getattr(loaded.base_model, family_of(loaded.config).blocks))


def attentions_of(model: nn.Module) -> list[nn.Module]:
    """The attention module of each block: its forward returns (output, probabilities or None)."""
    loaded: Any = model
    return [block.get_submodule(family_of(loaded.config).attention) for block in blocks_of(model)]


def mlp_norms_of(model: nn.Module) -> list[nn.Module]:
    """The norm, or what replaced it, in front of each MLP. In a parallel block it reads the block's input."""
    loaded: Any = model
    return [block.get_submodule(family_of(loaded.config).mlp_norm) for block in blocks_of(model)]


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm, or what replaced it, in front of the unembedding."""
    loaded: Any = model
    return cast("nn.Module", getattr(loaded.base_model, family_of(loaded.config).final_norm))
