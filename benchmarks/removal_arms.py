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


def staged(*, until: float, taper: float, special: float) -> Any:
    """Site after site as in the papers, all begun by `until` of the run; tapers are shares of the run."""

    def schedule(n_layer: int, steps: int) -> ScheduleSpec:
        gap = max(1, round(until * steps / (3 * n_layer + 1)))
        return ScheduleSpec(
            ln_2_start=1,
            ln_2_gap=gap,
            qk_gap=gap,
            v_gap=gap,
            eot_after=0,
            first_after=0,
            taper=max(0, round(taper * steps) - 1),
            special_taper=max(0, round(special * steps) - 1),
        )

    return schedule


def v_apart(*, until: float, taper: float, special: float) -> Any:
    """ln_2, q and k all at once, the values' sites one after the other: what the second paper leaves for the future."""

    def schedule(n_layer: int, steps: int) -> ScheduleSpec:
        gap = max(1, round(until * steps / n_layer))
        return ScheduleSpec(
            ln_2_start=1,
            ln_2_gap=0,
            qk_gap=0,
            v_gap=gap,
            qk_start=1,
            v_start=1,
            eot_after=0,
            first_after=0,
            taper=max(0, round(taper * steps) - 1),
            special_taper=max(0, round(special * steps) - 1),
        )

    return schedule


PROMPTS = {"bos_rows": 0.1, "copies": 0.05}
"""Training rows that begin with the end-of-text token, and rows that repeat themselves, as in recipe tiny."""

CONTROL = "control"
CONTROLS = {CONTROL: {}, "control-prompts": PROMPTS}
"""The controls, each with its changes to [data]. An arm is compared with the one that trained on the same tokens."""

KL = {"distillation": 0.5}
KL_ONLY = {"distillation": 1.0}
FADING = {"distillation": 1.0, "distillation_end": 0.0}
STD = {"auxiliary_weight": 0.1, "auxiliary_target": "constants", "auxiliary_sites": "all"}
PAPER_STD = {"auxiliary_weight": 0.1}

ARMS: dict[str, Arm] = {
    "paper-1": Arm("Heimersheim 2024, compressed", published("gpt2-apollo")),
    "paper-2": Arm("Baroni et al. 2025, compressed", published("gpt2-fast")),
    "paper-2-aux": Arm("the same with its auxiliary loss", published("gpt2-fast-aux"), PAPER_STD),
    "at-once": Arm("every site and both special constants in step 1", together()),
    "staged-taper": Arm("staged over a quarter, everything tapered", staged(until=0.25, taper=0.1, special=0.1)),
    "taper": Arm("all sites together, tapered over a quarter", together(taper=0.25)),
    "taper-half": Arm("all sites together, tapered over a half", together(taper=0.5)),
    "v-apart": Arm("ln_2, q, k at once; v over a quarter, tapered", v_apart(until=0.25, taper=0.05, special=0.1)),
    "taper-kl": Arm("taper and distillation", together(taper=0.25), KL),
    "taper-std": Arm("taper and the std loss towards the constants, all norms", together(taper=0.25), STD),
    "taper-std-kl": Arm("both", together(taper=0.25), {**STD, **KL}),
    "at-once-std-kl": Arm("both, everything in step 1", together(), {**STD, **KL}),
    "paper-2-kl": Arm("Baroni et al. 2025 with distillation", published("gpt2-fast"), KL),
    "taper-std-teacher": Arm(
        "std loss, and the teacher in place of the text", together(taper=0.25), {**STD, **KL_ONLY}
    ),
    "short-std-teacher": Arm(
        "the same, sites tapered over a tenth", together(taper=0.1, special=0.25), {**STD, **KL_ONLY}
    ),
    "short-std": Arm("std loss, sites tapered over a tenth", together(taper=0.1, special=0.25), STD),
    "short-std-kl": Arm("the same with distillation", together(taper=0.1, special=0.25), {**STD, **KL}),
    "short-std-fading": Arm(
        "the same, from the teacher alone to the text alone", together(taper=0.1, special=0.25), {**STD, **FADING}
    ),
    "staged-std-fading": Arm(
        "the same losses, layer by layer over a fifth", staged(until=0.2, taper=0.05, special=0.25), {**STD, **FADING}
    ),
    "quick-std-fading": Arm("the same, tapered twice as fast", together(taper=0.05, special=0.12), {**STD, **FADING}),
    "short-teacher": Arm("without the std loss", together(taper=0.1, special=0.25), KL_ONLY),
    "at-once-std-teacher": Arm("the same, everything in step 1", together(), {**STD, **KL_ONLY}),
    "std-then-taper": Arm("the std loss alone for a fifth, then taper", together(start=0.2, taper=0.2), {**STD, **KL}),
}


def control_of(arm: str) -> str:
    """The control that trained on the same tokens as an arm."""
    return next(name for name, data in CONTROLS.items() if data == ARMS[arm].data)
