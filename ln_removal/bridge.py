"""LN-free models in TransformerLens 4: an adapter for `TransformerBridge`, and the bridge around a model in memory.

    bridge = ln_removal.to_bridge(model, tokenizer)
    bridge = TransformerBridge.boot_transformers("path/to/an/ln-free/model")      # after `import ln_removal`

Nothing normalises, so the residual stream's components add up to the logits: with `logits, cache =
bridge.run_with_cache(tokens)`,

    cache.get_full_resid_decomposition(expand_neurons=False) @ bridge.W_U, summed, + bridge.b_U  ==  logits

TransformerLens is imported with this module, not with the package.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPT2ArchitectureAdapter

from ln_removal.errors import UserError
from ln_removal.export.registration import ARCHITECTURE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

    from ln_removal.export.normfree_gpt2 import NormFreeGPT2LMHeadModel


class NormFreeGPT2Adapter(GPT2ArchitectureAdapter):
    """TransformerLens' GPT-2 with identities where it expects norms.

    The slots ln1, ln2 and ln_final keep their hooks, which see the residual stream itself.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = None
        assert self.component_mapping is not None
        blocks = self.component_mapping["blocks"].submodules
        blocks["ln1"] = GeneralizedComponent(name="ln_1", config=self.cfg)
        blocks["ln2"] = GeneralizedComponent(name="ln_2", config=self.cfg)
        self.component_mapping["ln_final"] = GeneralizedComponent(name="transformer.ln_f", config=self.cfg)


def to_bridge(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """Put a TransformerBridge around an LN-free model.

    Args:
        model: an LN-free model of this project; or a published one, or our stock form, with disarmed LayerNorms, which is
            converted first. It is left as it is: the bridge gets modules of its own that share the LN-free model's
            weights (a conversion makes new ones).
        tokenizer: for `to_tokens`, `generate` from text and the like; none is looked for if it is left out.

    Returns:
        The bridge, in evaluation mode, on the model's device and in its dtype. Its logits are the model's, attention is
        computed by transformers' eager code.

    Raises:
        UserError: the model is not LN-free.
    """
    # boot_transformers would look for a tokenizer on the Hub when it is given none.
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from ln_removal.export.normfree_gpt2 import from_folded

    source = _ln_free(model)
    own = from_folded(source.config, source.state_dict())
    own.set_attn_implementation("eager")
    own.generation_config = copy.deepcopy(source.generation_config)
    bridge = build_bridge_from_module(
        own,
        ARCHITECTURE,
        hf_config=own.config,
        tokenizer=None if tokenizer is None else _prepared(tokenizer),
        model_name=source.config.name_or_path or ARCHITECTURE,
    )
    return bridge.eval()


def _ln_free(model: GPT2LMHeadModel) -> NormFreeGPT2LMHeadModel:
    from transformers import GPT2LMHeadModel

    from ln_removal.export.normfree_gpt2 import NormFreeGPT2LMHeadModel
    from ln_removal.export.published import from_disarmed, has_disarmed_norms

    if isinstance(model, NormFreeGPT2LMHeadModel):
        if not isinstance(model.lm_head, nn.Linear):
            raise UserError("the model is in a bridge already, which has changed its modules; load it afresh")
        return model
    if isinstance(model, GPT2LMHeadModel) and has_disarmed_norms(model):
        return from_disarmed(model)
    raise UserError(
        f"{type(model).__name__} is not LN-free; pass what ln_removal.fold and from_folded made, a model loaded from an "
        "export, or a published one with disarmed LayerNorms"
    )


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that TransformerLens can load anew: it does so by the name in `init_kwargs`, with a beginning-of-text token."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", "")
    own.init_kwargs["add_bos_token"] = True
    return own
