"""Make transformers' Auto classes and TransformerLens know the LN-free model, whichever package is imported first.

`ln_removal/__init__` calls `watch_imports`, which loads neither torch nor transformers: it leaves hooks that run when
a module is imported.

- AutoConfig: that can happen in the middle of transformers' own imports (importing GPT-2's model code loads the Auto
  classes before GPT-2's classes exist), when a subclass of GPT-2 cannot be defined yet. So the hook registers a
  stand-in.
- The model's own module: its classes take the stand-in's place.
- TransformerLens' table of architectures: a function that builds the adapter is entered.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

MODEL_TYPE = "normfree_gpt2"
"""model_type in the config.json of an LN-free model."""

ARCHITECTURE = "NormFreeGPT2LMHeadModel"
"""Its entry in the list of architectures."""


def watch_imports() -> None:
    """Leave the hooks; where a module is imported already, its hook runs at once."""
    wrapt.when_imported("transformers.models.auto.configuration_auto")(_register_stand_in)
    wrapt.when_imported("ln_removal.export.normfree_gpt2")(_register_classes)
    wrapt.when_imported("transformer_lens.factories.architecture_adapter_factory")(_register_adapter)


def _register_stand_in(configuration_auto: ModuleType) -> None:
    # Loaded already: configuration_auto has imported it.
    from transformers.configuration_utils import PreTrainedConfig

    if MODEL_TYPE in configuration_auto.CONFIG_MAPPING:
        return

    class StandIn(PreTrainedConfig):
        """Builds a NormFreeGPT2Config whenever AutoConfig builds one of these."""

        model_type = MODEL_TYPE

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # Importing the module registers its classes, so AutoModelForCausalLM finds them next.
            from ln_removal.export.normfree_gpt2 import NormFreeGPT2Config

            return NormFreeGPT2Config(*args, **kwargs)

    configuration_auto.AutoConfig.register(MODEL_TYPE, StandIn)


def _register_classes(normfree_gpt2: ModuleType) -> None:
    """Make AutoConfig give our configuration for its model_type, and AutoModelForCausalLM our model for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = normfree_gpt2.NormFreeGPT2Config
    assert config.model_type == MODEL_TYPE, config.model_type
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    AutoModelForCausalLM.register(config, normfree_gpt2.NormFreeGPT2LMHeadModel, exist_ok=True)


def _register_adapter(architecture_adapter_factory: ModuleType) -> None:
    """Make TransformerBridge.boot_transformers take directories of LN-free models."""

    def adapter(cfg: Any) -> Any:
        """Builds a NormFreeGPT2Adapter; its class cannot be defined while TransformerLens is still being imported."""
        from ln_removal.bridge import NormFreeGPT2Adapter

        return NormFreeGPT2Adapter(cfg)

    architecture_adapter_factory.ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, adapter)
    # boot_transformers reads this table, which register_adapter leaves as it is.
    architecture_adapter_factory.SUPPORTED_ARCHITECTURES[ARCHITECTURE] = adapter
