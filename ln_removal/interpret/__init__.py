"""What became exact: analyses of original, control and LN-free model, side by side.

Names are loaded when they are first used, because TransformerLens and torch are slow to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "Components": "ln_removal.interpret.attribution",
    "DirectEffects": "ln_removal.interpret.attribution",
    "Documents": "ln_removal.interpret.models",
    "Effects": "ln_removal.interpret.interventions",
    "Models": "ln_removal.interpret.models",
    "Patching": "ln_removal.interpret.patching",
    "PatchingByModel": "ln_removal.interpret.patching",
    "Prompt": "ln_removal.interpret.tasks",
    "Task": "ln_removal.interpret.tasks",
    "activation_patching": "ln_removal.interpret.interventions",
    "components": "ln_removal.interpret.attribution",
    "direct_effects": "ln_removal.interpret.attribution",
    "direct_effects_of_run": "ln_removal.interpret.attribution",
    "expand": "ln_removal.interpret.paths",
    "folded_weights": "ln_removal.interpret.circuits",
    "load": "ln_removal.interpret.models",
    "path_sums": "ln_removal.interpret.paths",
    "paths_of_run": "ln_removal.interpret.paths",
    "circuits_of_run": "ln_removal.interpret.circuits",
    "score_terms": "ln_removal.interpret.circuits",
    "token_table": "ln_removal.interpret.circuits",
    "weight_circuits": "ln_removal.interpret.circuits",
    "edge_effects": "ln_removal.interpret.gradients",
    "estimated_effects": "ln_removal.interpret.patching",
    "logit_differences": "ln_removal.interpret.tasks",
    "make_task": "ln_removal.interpret.tasks",
    "patching_of_run": "ln_removal.interpret.patching",
    "read_task": "ln_removal.interpret.tasks",
}
"""The public names, and the module of each."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access is direct
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
