"""What became exact: analyses of original, control and LN-free model, side by side.

Names are loaded when they are first used, because TransformerLens and torch are slow to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "Behaviour": "ln_removal.interpret.behaviour",
    "ByModel": "ln_removal.interpret.passes",
    "Components": "ln_removal.interpret.attribution",
    "DirectEffects": "ln_removal.interpret.attribution",
    "Documents": "ln_removal.interpret.models",
    "Effects": "ln_removal.interpret.interventions",
    "HeadScores": "ln_removal.interpret.heads",
    "LayerPredictions": "ln_removal.interpret.lens",
    "Models": "ln_removal.interpret.models",
    "NeuronEffects": "ln_removal.interpret.neurons",
    "Paper": "ln_removal.interpret.paper",
    "Patching": "ln_removal.interpret.patching",
    "PatchingByModel": "ln_removal.interpret.patching",
    "Prompt": "ln_removal.interpret.tasks",
    "ResidualShape": "ln_removal.interpret.streams",
    "Task": "ln_removal.interpret.tasks",
    "activation_patching": "ln_removal.interpret.interventions",
    "answer_effects": "ln_removal.interpret.attribution",
    "behaviour_of_run": "ln_removal.interpret.behaviour",
    "calibration_error": "ln_removal.interpret.behaviour",
    "circuits_of_run": "ln_removal.interpret.circuits",
    "components": "ln_removal.interpret.attribution",
    "direct_effects": "ln_removal.interpret.attribution",
    "direct_effects_of_run": "ln_removal.interpret.attribution",
    "edge_effects": "ln_removal.interpret.patching",
    "estimated_effects": "ln_removal.interpret.patching",
    "expand": "ln_removal.interpret.paths",
    "folded_weights": "ln_removal.interpret.reading",
    "head_scores": "ln_removal.interpret.heads",
    "head_scores_of_run": "ln_removal.interpret.heads",
    "layer_predictions": "ln_removal.interpret.lens",
    "layer_predictions_of_run": "ln_removal.interpret.lens",
    "load": "ln_removal.interpret.models",
    "load_untrained": "ln_removal.interpret.models",
    "logit_differences": "ln_removal.interpret.tasks",
    "make_task": "ln_removal.interpret.tasks",
    "neuron_effects": "ln_removal.interpret.neurons",
    "neuron_effects_of_run": "ln_removal.interpret.neurons",
    "paper_of_run": "ln_removal.interpret.paper",
    "patching_of_run": "ln_removal.interpret.patching",
    "path_sums": "ln_removal.interpret.paths",
    "paths_of_run": "ln_removal.interpret.paths",
    "read_task": "ln_removal.interpret.tasks",
    "residual_shape": "ln_removal.interpret.streams",
    "residual_shape_of_run": "ln_removal.interpret.streams",
    "score_terms": "ln_removal.interpret.circuits",
    "token_table": "ln_removal.interpret.circuits",
    "weight_circuits": "ln_removal.interpret.circuits",
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
