"""What changes from step to step besides the norms: the learning rate, the teacher's share.

Pure Python: a run that resumes asks for any step and gets the same number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ln_removal.recipe import TrainingSpec


def learning_rate_at(step: int, spec: TrainingSpec) -> float:
    """The learning rate of an optimizer step, counted from 0.

    Warm-up of w steps: peak * (step + 1) / w, so that step 0 already learns and step w - 1 has the peak. Then, with
    s the start of the decay, e its end (`decay_steps`, or the length of the run) and p = (step - s) / (e - s):

        cosine, linear   s = w        minimum + (peak - minimum) * (1 + cos(pi p)) / 2,  or  * (1 - p)
        trapezoid        s = e - round(decay_fraction * e)    the peak before s, then linear

    From e on it is the minimum. Cosine: Loshchilov & Hutter 2017 (arXiv 1608.03983), one period; trapezoid: Hägele et
    al. 2024 (arXiv 2405.18392).

    Args:
        step: from 0; beyond the run's end the minimum goes on.
        spec: the recipe's [training].

    Returns:
        The rate, in the unit of `spec.learning_rate`: in [minimum, peak] after the warm-up, in (0, peak] during it.
    """
    assert step >= 0, f"steps count from 0, got {step}"
    peak, minimum = spec.learning_rate, spec.minimum_learning_rate
    if step < spec.warmup_steps:
        return peak * (step + 1) / spec.warmup_steps
    end = spec.steps if spec.decay_steps is None else spec.decay_steps
    start = end - round(spec.decay_fraction * end) if spec.decay == "trapezoid" else spec.warmup_steps
    if step >= end:
        return minimum
    if step <= start:
        return peak
    progress = (step - start) / (end - start)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if spec.decay == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining


def distillation_at(step: int, spec: TrainingSpec) -> float:
    """The share of the loss that comes from the teacher: linear from `distillation` to `distillation_end` in the last step.

    Early on the teacher says what freezing has destroyed; later the text can teach what the teacher never knew.
    """
    end = spec.distillation if spec.distillation_end is None else spec.distillation_end
    progress = min(1.0, step / max(1, spec.steps - 1))
    return spec.distillation + (end - spec.distillation) * progress
