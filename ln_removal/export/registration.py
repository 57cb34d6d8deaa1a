"""Make transformers' Auto classes know the LN-free model, whichever of the two packages is imported first.

`ln_removal/__init__` calls `watch_imports`, which imports neither torch nor transformers: it leaves hooks that run when
the modules concerned are loaded. Two steps, because transformers loads its modules lazily and in the middle of one
another (importing GPT-2's model code loads the Auto classes before GPT-2's classes exist):

- the configuration is registered as soon as AutoConfig and GPT2Config are both there;
- the model class is registered when a configuration of ours is first built, which AutoModelForCausalLM does before it
  looks the class up, and by when all imports are over.
"""

from __future__ import annotations

import sys
from types import ModuleType

import wrapt

_AUTO = "transformers.models.auto.configuration_auto"
_NEEDED = {
    _AUTO: "AutoConfig",
    "transformers.models.gpt2.configuration_gpt2": "GPT2Config",
    "ln_removal.export.normfree_config": "NormFreeGPT2Config",
}
"""Modules that take part in registering the configuration, with the name that each one defines."""


def watch_imports() -> None:
    """Register the configuration as soon as transformers' Auto classes are imported; at once if they already are."""
    for name in _NEEDED:
        wrapt.when_imported(name)(_after_import)


def _after_import(_: ModuleType) -> None:
    """Register unless a part is still missing or half imported; its own hook then comes back here."""
    if _AUTO not in sys.modules:
        return
    for name, defined in _NEEDED.items():
        if name in sys.modules and not hasattr(sys.modules[name], defined):
            return
    register_config()


def register_config() -> None:
    """Tell AutoConfig about model_type "normfree_gpt2". Harmless when repeated."""
    # First, by itself: its hook runs at the end of this import and must not find the next module half done.
    import transformers.models.gpt2.configuration_gpt2  # noqa: F401
    from transformers.models.auto.configuration_auto import AutoConfig

    from ln_removal.export.normfree_config import NormFreeGPT2Config

    AutoConfig.register(NormFreeGPT2Config.model_type, NormFreeGPT2Config, exist_ok=True)


def register_model() -> None:
    """Tell AutoModelForCausalLM which class a NormFreeGPT2Config is for. Harmless when repeated."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from ln_removal.export.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel

    AutoModelForCausalLM.register(NormFreeGPT2Config, NormFreeGPT2LMHeadModel, exist_ok=True)
