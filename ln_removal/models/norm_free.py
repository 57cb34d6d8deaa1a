"""Build the LN-free model of any family from its weights: what `fold` returns, or a model that has no norms to begin with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from ln_removal.config.family_parts import LADDER_CHOICES, REVIVAL_CHOICES
from ln_removal.errors import UserError
from ln_removal.models.families import Family, family_of
from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config
from ln_removal.models.registration import MODEL_CLASSES

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_NOT_INHERITED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "tie_word_embeddings",
    "dtype",
    "split_qkv",
)
"""Entries of a configuration that say which class it is for, and so are not taken over."""


def model_class(model_type: str) -> Any:
    """The class of a model of this project, by the model_type of its configuration."""
    module, _, name = MODEL_CLASSES[model_type]
    return getattr(import_module(module), name)


def norm_free_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the LN-free model folded from a model with configuration `config`, or of another copy of one."""
    module, config_class, name = MODEL_CLASSES[family_of(config).norm_free_type]
    # Filled in by saving too, but some tools ask a model that was never saved.
    found: PretrainedConfig = getattr(import_module(module), config_class)(
        **without_identity(config), architectures=[name]
    )
    return found


def from_folded(
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    generation_config: GenerationConfig | None = None,
    *,
    split_qkv: bool = False,
) -> PreTrainedModel:
    """Build the LN-free model from folded weights, in evaluation mode.

    Args:
        config: of the model that was folded; its sizes, dropout and token ids are taken over.
        state: what `ln_removal.norms.surgery.fold` returned, or the state of an LN-free model, split or not. The model takes
            the tensors over, without a copy, unless it has to split or join them.
        generation_config: how the model that was folded writes text; copied. None: transformers' defaults.
        split_qkv: queries, keys and values get linear maps of their own.
    """
    own = norm_free_config(config)
    if own.model_type == NormFreeGPT2Config.model_type:
        own.split_qkv = split_qkv
        state = _split(state) if split_qkv else _joined(state)
    else:
        assert not split_qkv, "only a GPT-2 has one map to split"
    model = built(model_class(own.model_type), own, state)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model


@torch.no_grad()
def from_norm_choice(model: PreTrainedModel) -> PreTrainedModel:
    """The LN-free model that computes what a model of norm_choice.py without any norm computes, in evaluation mode.

    The gain of a branch is multiplied into its projection, and the scale of the embeddings into both of them, so that a tied
    unembedding becomes a matrix of its own. Missing biases become zeros. Arithmetic is in float64.

    Args:
        model: without any norm. Not changed.

    Raises:
        UserError: the model still has a norm or something in a norm's place, or an activation that transformers has no name for.
    """
    config: Any = model.config
    family = family_of(config)
    if left := _what_is_left(config):
        raise UserError(f"the model still has {' and '.join(left)}, so it is not an LN-free model; load it as it is")
    activation = _activation_name(config, family)
    scale = getattr(model.base_model.get_submodule("drop"), "factor", 1.0) if family.model_type == "gpt2" else 1.0
    state = {
        f"{family.body}.{name}.weight": model.base_model.get_submodule(name).weight.double() * scale
        for name in family.embeddings
    }
    for layer in range(config.num_hidden_layers):
        for path in (*family.qkv, *family.mlp, *family.others):
            name = f"{family.block(layer)}.{path}"
            module: Any = model.get_submodule(name)
            gain = torch.as_tensor(getattr(module, "gain", 1.0), dtype=torch.float64)
            state[f"{name}.weight"] = module.weight.double() * gain
            state[f"{name}.bias"] = _whole_bias(module, family) * gain
    state["lm_head.weight"] = model.lm_head.weight.double()
    state["lm_head.bias"] = torch.zeros_like(state["lm_head.weight"][:, 0])
    chosen = {*REVIVAL_CHOICES, *LADDER_CHOICES}
    entries = {key: value for key, value in without_identity(config).items() if key not in chosen}
    plain = CONFIG_MAPPING[family.model_type](**entries | {family.activation_field: activation})
    own = {name: value.to(model.dtype, copy=True).contiguous() for name, value in state.items()}
    return from_folded(plain, own, model.generation_config)


def _what_is_left(config: Any) -> list[str]:
    """The norms of a model of norm_choice.py and what is in their places, in words."""
    titles = {"layernorm": "LayerNorm", "dyt": "DyT", "derf": "Derf"}
    places = {"block_norm": "in its blocks", "final_norm": "in front of the unembedding"}
    left = [f"{titles[kind]} {where}" for key, where in places.items() if (kind := getattr(config, key)) != "none"]
    return left + (["an RMSNorm of queries and keys"] if getattr(config, "qk_norm", False) else [])


def _activation_name(config: Any, family: Family) -> str:
    """What transformers calls the activation."""
    own = "gelu_new" if family.model_type == "gpt2" else "gelu"
    names = {"gelu": own, "relu": "relu", "leaky_relu": "leaky_relu" if config.negative_slope == 0.01 else ""}
    if not names.get(config.activation):
        kind = "learned slopes" if "learnable" in config.activation else f"a slope of {config.negative_slope:g}"
        raise UserError(
            f"the model has leaky ReLUs with {kind}, which the LN-free form cannot have (its activations are GELU, ReLU, or leaky "
            "ReLU with a slope of 0.01); load it as it is"
        )
    return names[config.activation]


def _whole_bias(module: Any, family: Family) -> Tensor:
    """The bias of a linear map in float64, with zeros for what it lacks."""
    weight, bias = module.weight, module.bias
    outputs = weight.shape[1] if family.input_first else weight.shape[0]
    if bias is None:
        return weight.new_zeros(outputs).double()
    missing = outputs - len(bias)  # of the values
    heads = module.heads if missing and family.joint == "heads" else 1
    return F.pad(bias.double().view(heads, -1), (0, missing // heads)).flatten()


def built(model_class: Any, config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of a class of transformers or of ours around the tensors of `state`, without a copy, in evaluation mode."""
    # On the meta device: no time and memory for random weights that are replaced at once.
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    model.load_state_dict({name: nn.Parameter(value) for name, value in state.items()}, strict=True, assign=True)
    model.tie_weights()  # where the configuration says so
    body = model.base_model
    if hasattr(body, "rotary_emb"):  # its frequencies are computed, not loaded
        with torch.device(model.device):
            body.rotary_emb = type(body.rotary_emb)(config)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, left
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


def without_identity(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as a dictionary, without what ties it to one model class."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_INHERITED}
