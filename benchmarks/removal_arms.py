"""The arms of removal_quality.py: what each changes in the one recipe that all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ln_removal.config.presets import with_layers, with_steps
from ln_removal.config.recipe import ScheduleSpec, load_recipe


@dataclass(frozen=True)
class Arm:
    """A schedule for (layers, steps), changes to [training] and [data] of the shared recipe, and what it is."""

    about: str
    schedule: Callable[[int, int], ScheduleSpec]
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def published(recipe: str) -> Callable[[int, int], ScheduleSpec]:
    """A paper's schedule for GPT-2 small, fitted to another depth and compressed into another number of steps."""

    def schedule(n_layer: int, steps: int) -> ScheduleSpec:
        fitted = with_steps(with_layers(load_recipe(recipe), written_for=12, n_layer=n_layer), steps).schedule
        assert fitted is not None
        return fitted.model_copy(update={"on_spike": "ignore"})  # theirs do not wait

    return schedule


def together(*, start: float = 0.0, taper: float = 0.0, special: float | None = None, lag: float = 0.0) -> Any:
    """Every site from the same step on; lengths are shares of the run.

    Args:
        start: where it begins, at the earliest in step 1.
        taper: how long the mixes rise.
        special: how long the special constants take to become the ordinary one; None: as `taper`.
        lag: of the special constants behind the sites.
    """

    def schedule(n_layer: int, steps: int) -> ScheduleSpec:
        first = max(1, round(start * steps))
        return ScheduleSpec(
            ln_2_start=first,
            ln_2_gap=0,
            qk_gap=0,
            v_gap=0,
            qk_start=first,
            v_start=first,
            ln_f_at=first,
            eot_after=round(lag * steps),
            first_after=0,
            taper=max(0, round(taper * steps) - 1),
            special_taper=max(0, round((taper if special is None else special) * steps) - 1),
        )

    return schedule


def staged(*, until: float, taper: float, special: float, start: float = 0.0) -> Any:
    """Site after site as in the papers, all begun `until` of the run after `start`; tapers are shares of the run."""

    def schedule(n_layer: int, steps: int) -> ScheduleSpec:
        gap = max(1, round(until * steps / (3 * n_layer + 1)))
        return ScheduleSpec(
            ln_2_start=max(1, round(start * steps)),
            ln_2_gap=gap,
            qk_gap=gap,
            v_gap=gap,
            eot_after=0,
            first_after=0,
            taper=max(0, round(taper * steps) - 1),
            special_taper=max(0, round(special * steps) - 1),
        )

    return schedule


PROMPTS = {"bos_rows": 0.2, "copies": 0.075}
"""Rows that begin with the end-of-text token, and rows that repeat themselves, as in the recipes."""

CONTROL = "control"
CONTROLS = {CONTROL: {}, "control-prompts": PROMPTS}
"""The controls, each with its changes to [data]. An arm is compared with the one that trained on the same tokens."""

TEACHER = {"distillation": 1.0, "distillation_lag": 0.05}
LAGGING = {**TEACHER, "distillation_lag": 0.3}
"""For models that fine-tuning improves, as the recipes gpt2 and distilgpt2."""
FADING = {**TEACHER, "distillation_end": 0.0}
STD = {"auxiliary_weight": 0.1, "auxiliary_target": "constants", "auxiliary_sites": "all"}
SHRINK = {"outlier_weight": 0.3, "std_statistic": "median"}
PAPER_STD = {"auxiliary_weight": 0.1}

LAYER_BY_LAYER = staged(until=0.1, taper=0.05, special=0.1)

ARMS: dict[str, Arm] = {
    "paper-1": Arm("Heimersheim 2024, compressed", published("gpt2-apollo")),
    "paper-2": Arm("Baroni et al. 2025, compressed", published("gpt2-fast")),
    "paper-2-aux": Arm("the same with its auxiliary loss", published("gpt2-fast-aux"), PAPER_STD),
    "at-once": Arm("every site and both special constants in step 1", together()),
    "staged-teacher": Arm(
        "the method of recipe tiny: layer by layer, std loss, a teacher until the model catches up",
        LAYER_BY_LAYER,
        {**STD, **TEACHER},
        PROMPTS,
    ),
    "together-teacher": Arm(
        "the same, all sites tapered together", together(taper=0.1, special=0.25), {**STD, **TEACHER}, PROMPTS
    ),
    "staged-fading": Arm(
        "the same with a teacher that also fades linearly to nothing", LAYER_BY_LAYER, {**STD, **FADING}, PROMPTS
    ),
    "shrink-teacher": Arm(
        "the same after a tenth of the run in which outlying positions shrink",
        staged(until=0.1, taper=0.05, special=0.1, start=0.1),
        {**STD, **TEACHER, **SHRINK},
        PROMPTS,
    ),
    "paper-2-prompts": Arm("paper-2 with the rows of our recipes", published("gpt2-fast"), {}, PROMPTS),
    "gpt2": Arm("the method of recipe gpt2: layer by layer, lag 0.3", LAYER_BY_LAYER, {**STD, **LAGGING}, PROMPTS),
    "gpt2-together": Arm(
        "the same, all sites tapered together", together(taper=0.1, special=0.25), {**STD, **LAGGING}, PROMPTS
    ),
    "gpt2-no-teacher": Arm("the method of recipe gpt2 without a teacher", LAYER_BY_LAYER, STD, PROMPTS),
    "staged-plain": Arm("the same without rows that look like prompts", LAYER_BY_LAYER, {**STD, **TEACHER}),
}


def control_of(arm: str) -> str:
    """The control that trained on the same tokens as an arm."""
    return next(name for name, data in CONTROLS.items() if data == ARMS[arm].data)
