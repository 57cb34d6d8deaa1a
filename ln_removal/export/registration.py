"""Make transformers' Auto classes know the LN-free model, whichever of the two packages is imported first.

`ln_removal/__init__` calls `watch_imports`, which loads neither torch nor transformers: it leaves a hook that runs when
AutoConfig is imported. That can happen in the middle of transformers' own imports (importing GPT-2's model code loads
the Auto classes before GPT-2's classes exist), when a subclass of GPT-2 cannot be defined yet. So the hook registers a
stand-in, and the classes themselves take its place when they are first needed.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PretrainedConfig

MODEL_TYPE = "normfree_gpt2"
"""model_type in the config.json of an LN-free model."""


def watch_imports() -> None:
    """Register the stand-in when transformers' AutoConfig is imported; at once if it already is."""
    wrapt.when_imported("transformers.models.auto.configuration_auto")(_register_stand_in)


def register_classes(config: type[PretrainedConfig], model: type[GPT2LMHeadModel]) -> None:
    """Make AutoConfig give `config` for its model_type, and AutoModelForCausalLM `model` for such a configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    assert config.model_type == MODEL_TYPE, config.model_type
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


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
