"""Make transformers' Auto classes and TransformerLens know our model classes, whichever package is imported first.

`ln_removal/__init__` calls `watch_imports`, which loads neither torch nor transformers nor TransformerLens: it leaves hooks
that run when a module is imported.

- AutoConfig can be imported in the middle of transformers' own imports (GPT-2's model code loads the Auto classes before
  GPT-2's classes exist). A subclass of GPT-2 cannot be defined then, so the hook registers a stand-in.
- When the module of our own class is imported, its classes take the stand-in's place.
- When TransformerLens' table of architectures is imported, a function that builds our adapter is entered in it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

from ln_removal.errors import UserError
from ln_removal.models.families import FAMILIES, Family

_NORMFREE = "ln_removal.models.normfree_gpt2"

_ROTARY = "ln_removal.models.normfree_rotary"

_NORM_CHOICE = "ln_removal.models.norm_choice"

MODEL_CLASSES = {
    "normfree_gpt2": (_NORMFREE, "NormFreeGPT2Config", "NormFreeGPT2LMHeadModel"),
    "normfree_gpt_neox": (_ROTARY, "NormFreeGPTNeoXConfig", "NormFreeGPTNeoXForCausalLM"),
    "normfree_llama": (_ROTARY, "NormFreeLlamaConfig", "NormFreeLlamaForCausalLM"),
    "normfree_mistral": (_ROTARY, "NormFreeMistralConfig", "NormFreeMistralForCausalLM"),
    "normfree_qwen2": (_ROTARY, "NormFreeQwen2Config", "NormFreeQwen2ForCausalLM"),
    "normfree_qwen3": (_ROTARY, "NormFreeQwen3Config", "NormFreeQwen3ForCausalLM"),
    "revival_gpt2": (_NORM_CHOICE, "RevivalGPT2Config", "RevivalGPT2LMHeadModel"),
    "revival_gpt_neox": (_NORM_CHOICE, "RevivalGPTNeoXConfig", "RevivalGPTNeoXForCausalLM"),
}
"""For each model_type in a config.json: the module of its classes, and the names of the configuration and the model.

Saved models have these names in their files, so they stay.
"""


def watch_imports() -> None:
    """Leave the hooks; where a module is imported already, its hook runs at once."""
    wrapt.when_imported("transformers.models.auto.configuration_auto")(_register_stand_ins)
    for module in (_NORMFREE, _ROTARY, _NORM_CHOICE):
        wrapt.when_imported(module)(_register_classes)
    wrapt.when_imported("transformer_lens.factories.architecture_adapter_factory")(_register_adapter)


def _register_stand_ins(configuration_auto: ModuleType) -> None:
    # Loaded already: configuration_auto has imported it.
    from transformers.configuration_utils import PreTrainedConfig

    for name in MODEL_CLASSES:
        if name in configuration_auto.CONFIG_MAPPING:
            continue

        class StandIn(PreTrainedConfig):
            """Builds our configuration whenever AutoConfig builds one of these."""

            model_type = name

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                # Importing the module registers its classes, so AutoModelForCausalLM finds them next.
                module, config, _ = MODEL_CLASSES[cls.model_type]
                return getattr(import_module(module), config)(*args, **kwargs)

        configuration_auto.AutoConfig.register(name, StandIn)


def _register_classes(module: ModuleType) -> None:
    """Make AutoConfig give our configurations for their model types, and AutoModelForCausalLM our models for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, (where, config_name, model_name) in MODEL_CLASSES.items():
        if where == module.__name__:
            config = getattr(module, config_name)
            assert config.model_type == name, config.model_type
            AutoConfig.register(name, config, exist_ok=True)
            AutoModelForCausalLM.register(config, getattr(module, model_name), exist_ok=True)


def _register_adapter(architecture_adapter_factory: ModuleType) -> None:
    """Make TransformerBridge.boot_transformers take directories of LN-free models."""

    def adapter_of(family: Family) -> Any:
        return lambda cfg: _adapter_class(family)(cfg)  # a class, when it is needed

    for family in FAMILIES.values():
        architecture, adapter = MODEL_CLASSES[family.norm_free_type][2], adapter_of(family)
        architecture_adapter_factory.ArchitectureAdapterFactory.register_adapter(architecture, adapter)
        # boot_transformers reads this table, which register_adapter leaves as it is.
        architecture_adapter_factory.SUPPORTED_ARCHITECTURES[architecture] = adapter


@cache
def _adapter_class(family: Family) -> Any:
    """The adapter's class of a family; it cannot be defined while TransformerLens is still being imported."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    theirs: Any = SUPPORTED_ARCHITECTURES[family.model_class]

    class NormFreeAdapter(theirs):
        """TransformerLens' adapter of the family with identities where it expects norms.

        The slots ln1, ln2 and ln_final keep their hooks, which see the residual stream itself.
        """

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.cfg.normalization_type = None
            self.cfg.uses_rms_norm = self.cfg.final_rms = False
            for parts, slot in (
                (self.components["blocks"].submodules, "ln1"),
                (self.components["blocks"].submodules, "ln2"),
                (self.components, "ln_final"),
            ):
                parts[slot] = GeneralizedComponent(name=parts[slot].name, config=self.cfg)

        def prepare_model(self, hf_model: Any) -> None:
            """Refuse a model whose attention scores TransformerLens would scale although the model does not."""
            if not getattr(hf_model.config, "scale_attn_weights", True):
                raise UserError(
                    "the model has scale_attn_weights false, and TransformerLens always divides attention scores by the root of the "
                    "heads' width; multiply the weights and biases of the queries in every c_attn by that root and set "
                    "scale_attn_weights to true: the model then computes the same"
                )
            super().prepare_model(hf_model)

    return NormFreeAdapter
