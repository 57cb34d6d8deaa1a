"""A model of a known family, with its norms or without them, in TransformerLens 4: a TransformerBridge around it in memory.

The original, the control and the LN-free model get the same hooks, so one analysis runs on all three. No weight is processed:
TransformerLens' own defaults fold and centre weights, which moves logits.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ln_removal.errors import UserError
from ln_removal.models.families import is_norm_choice, is_norm_free
from ln_removal.models.layout import check_plain, check_supported, is_disarmed
from ln_removal.models.norm_free import built, from_folded, from_norm_choice

TOKENS = 16
"""Positions of the sequence on which a bridge is compared with its model."""

EXACT = 1e-3
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest accepted difference of their logits, relative to the largest logit: EXACT in float32 and float64. A bridge adds up in
another order, so a narrow type rounds otherwise. What exceeds it is compared once more in float64."""

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


def as_bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """Put a TransformerBridge around a model with all its norms, or around one without any norm.

    Args:
        model: of a known family (`models.families`), a class of transformers, an LN-free model of this project, or one that was
            trained without any norm. It is left as it is: the bridge gets modules of its own that share the model's weights
            (new ones for a model that was trained without norms).
        tokenizer: for `to_tokens`, `generate` from text and the like; none is looked for if it is left out.

    Returns:
        The bridge, in evaluation mode, on the model's device and in its dtype. Its logits are the model's. Attention is
        computed by TransformerLens from queries, keys and values, in the model's dtype, or in float32 if that is wider. Outside of
        GPT-2 it computes a part in float32 whatever the dtype, so float64 agrees to about 1e-6 there.

    Raises:
        UserError: the model is of no known family, has freezable or disarmed norms, holds an adapter, or is in a bridge already; or
            TransformerLens would not compute what it computes.
    """
    bridge = _bridge_of(model, tokenizer)
    error = _error(bridge, model)
    if not error <= TOLERANCE.get(model.dtype, EXACT) and model.dtype != torch.float64:
        wide = copy.deepcopy(model).double()  # where rounding cannot be what shows
        error = _error(_bridge_of(wide, None), wide)
    if not error <= TOLERANCE.get(model.dtype, EXACT):  # a NaN is not
        raise UserError(
            f"the bridge of TransformerLens gives other logits than the model, by {error:.1%} of the largest: it does not know a "
            "setting of the model's configuration; use the model with transformers or nnsight instead"
        )
    return bridge


def is_bridged(model: PreTrainedModel) -> bool:
    """Whether TransformerLens has put its own modules into a model already."""
    head = getattr(model, "lm_head", None)
    return isinstance(model, PreTrainedModel) and type(head).__module__.startswith("transformer_lens.")


def _bridge_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> TransformerBridge:
    # boot_transformers would look for a tokenizer on the Hub when it is given none.
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    own = _own_modules(model)
    own.set_attn_implementation("eager")
    own.generation_config = copy.deepcopy(model.generation_config)
    architecture = type(own).__name__
    bridge = build_bridge_from_module(
        own,
        architecture,
        hf_config=own.config,
        tokenizer=None if tokenizer is None else _prepared(tokenizer),
        model_name=model.config.name_or_path or architecture,
    )
    if own.dtype == torch.float64:
        for block in bridge.blocks:  # GPT-2's option upcasts half precision to float32; it must not round float64 to it
            block.attn._reorder_and_upcast_attn = False
    return bridge.eval()


@torch.no_grad()
def _error(bridge: TransformerBridge, model: PreTrainedModel) -> float:
    """The largest difference of their logits relative to the largest: a bridge computes attention by itself."""
    tokens = torch.arange(min(TOKENS, model.config.max_position_embeddings), device=model.device)[None]
    tokens = tokens % model.config.vocab_size
    was_training = model.training
    expected, found = model.eval()(tokens, use_cache=False).logits.double(), bridge(tokens).double()
    model.train(was_training)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / largest if largest > 0 else difference


def _own_modules(model: PreTrainedModel) -> Any:
    """New modules with the weights of `model`, because a bridge changes the modules that it is given."""
    if is_bridged(model):
        raise UserError("the model is in a bridge already, which has changed its modules; load it afresh")
    if isinstance(model, PreTrainedModel) and is_norm_free(model.config):
        check_plain(model, norms=())
        return from_folded(model.config, model.state_dict())
    if isinstance(model, PreTrainedModel) and is_norm_choice(model.config):
        return from_norm_choice(model)
    family = check_supported(model)
    if type(model).__name__ != family.model_class:
        raise UserError(
            f"TransformerLens does not know {type(model).__name__}; pass a {family.model_class} or an LN-free model of ln-removal"
        )
    if is_disarmed(model.config):
        raise UserError(
            "the model's norms are disarmed by their epsilon; convert it first, with ln_removal.from_disarmed(model)"
        )
    return built(type(model), model.config, model.state_dict())


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that TransformerLens can load anew: it does so by the name in `init_kwargs`, with a beginning-of-text token."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", "")
    own.init_kwargs["add_bos_token"] = True
    return own
