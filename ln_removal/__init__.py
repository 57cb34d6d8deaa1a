"""Remove the LayerNorms of a GPT-2 and keep the model: residual streams that add up, exact logit attribution.

Importing the package is light: torch and transformers are loaded when a name below is first used. It also makes
transformers know the LN-free model class, so that after `import ln_removal`,

    AutoModelForCausalLM.from_pretrained("path/to/an/ln-free/model")

works, whichever package was imported first, and so does TransformerLens' TransformerBridge.boot_transformers.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ln_removal.export.registration import watch_imports

if TYPE_CHECKING:
    from ln_removal.architectures import Site
    from ln_removal.bridge import to_bridge
    from ln_removal.errors import UserError
    from ln_removal.export.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel
    from ln_removal.export.published import from_disarmed
    from ln_removal.export.stock import to_stock
    from ln_removal.export.verify import verify_export
    from ln_removal.recipe import Recipe, load_recipe
    from ln_removal.removal import remove
    from ln_removal.schedule import RemovalSchedule
    from ln_removal.surgery import NormSites, fold, install

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
    "NormFreeGPT2Config": "ln_removal.export.normfree_gpt2",
    "NormFreeGPT2LMHeadModel": "ln_removal.export.normfree_gpt2",
    "NormSites": "ln_removal.surgery",
    "Recipe": "ln_removal.recipe",
    "RemovalSchedule": "ln_removal.schedule",
    "Site": "ln_removal.architectures",
    "UserError": "ln_removal.errors",
    "fold": "ln_removal.surgery",
    "from_disarmed": "ln_removal.export.published",
    "install": "ln_removal.surgery",
    "load_recipe": "ln_removal.recipe",
    "remove": "ln_removal.removal",
    "to_bridge": "ln_removal.bridge",
    "to_stock": "ln_removal.export.stock",
    "verify_export": "ln_removal.export.verify",
}

try:
    __version__ = metadata.version("ln-removal")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access is direct
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch_imports()
