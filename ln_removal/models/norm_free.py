"""Build the LN-free model of any family from its weights: what `fold` returns, or the state of such a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ln_removal.models.families import family_of
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
