"""Remove the LayerNorms of a GPT-2 and keep the model: residual streams that add up, exact logit attribution.

Importing the package is light: torch and transformers are loaded when a name below is first used. It also makes
transformers know the LN-free model class, so that after `import ln_removal`,

    AutoModelForCausalLM.from_pretrained("path/to/an/ln-free/model")

works, whichever package was imported first, and so does TransformerLens' TransformerBridge.boot_transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ln_removal.files.resources import package_version
from ln_removal.models.registration import watch_imports

if TYPE_CHECKING:
    from ln_removal.config.recipe import Recipe, load_recipe
    from ln_removal.errors import UserError
    from ln_removal.export.convert import from_disarmed, to_bridge
    from ln_removal.export.stock import to_stock
    from ln_removal.export.verify import verify_export
    from ln_removal.models.layout import Site
    from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel
    from ln_removal.norms.schedule import RemovalSchedule
    from ln_removal.norms.surgery import NormSites, fold, install
    from ln_removal.pipelines.removal import remove

__all__ = [
    "NormFreeGPT2Config",
    "NormFreeGPT2LMHeadModel",
    "NormSites",
    "Recipe",
    "RemovalSchedule",
    "Site",
    "UserError",
    "fold",
    "from_disarmed",
    "install",
    "load_recipe",
    "remove",
    "to_bridge",
    "to_stock",
    "verify_export",
]

_MODULES = {
    "NormFreeGPT2Config": "ln_removal.models.normfree_gpt2",
    "NormFreeGPT2LMHeadModel": "ln_removal.models.normfree_gpt2",
    "NormSites": "ln_removal.norms.surgery",
    "Recipe": "ln_removal.config.recipe",
    "RemovalSchedule": "ln_removal.norms.schedule",
    "Site": "ln_removal.models.layout",
    "UserError": "ln_removal.errors",
    "fold": "ln_removal.norms.surgery",
    "from_disarmed": "ln_removal.export.convert",
    "install": "ln_removal.norms.surgery",
    "load_recipe": "ln_removal.config.recipe",
    "remove": "ln_removal.pipelines.removal",
    "to_bridge": "ln_removal.export.convert",
    "to_stock": "ln_removal.export.stock",
    "verify_export": "ln_removal.export.verify",
}

__version__ = package_version()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access is direct
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch_imports()
