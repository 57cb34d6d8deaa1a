"""The benchmark of removals: arms that share nothing but what they name, and tokens that count only without LayerNorms."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from removal_arms import ARMS, CONTROL
from removal_quality import recipe_of, show, stays_below, table, without_infinity

from ln_removal.config.recipe import TrainingSpec

TERMS = (
    "auxiliary_weight",
    "auxiliary_target",
    "auxiliary_sites",
    "distillation",
    "distillation_end",
)


@pytest.mark.parametrize("arm", [CONTROL, *ARMS])
def test_an_arm_has_the_terms_that_it_names_and_no_others(arm: str) -> None:
    recipe = recipe_of(arm, "tiny", 0, 200, 6)
    changed = {} if arm == CONTROL else ARMS[arm].training
    for name in TERMS:
        expected = changed.get(name, TrainingSpec.model_fields[name].get_default())
        assert getattr(recipe.training, name) == expected, name
    assert recipe.data.odd_text == (0 if arm == CONTROL else ARMS[arm].data.get("odd_text", 0))


def test_tokens_count_only_when_everything_is_constant() -> None:
    run = {"evaluations": [(20, 2.7), (40, 2.7), (60, 3.1), (80, 2.74), (100, 2.73)]}
    assert stays_below(run, 2.75, 0) == 80, "above once more at 60"
    gentle = {"evaluations": [(20, 2.7), (40, 2.7), (60, 2.7), (80, 2.74)]}
    assert stays_below(gentle, 2.75, 50) == 60, "at 20 and 40 LayerNorms were still there"
    assert stays_below(gentle, 2.75, 60) == 80, "the evaluation at 60 saw the mixes of step 59"
    assert stays_below(gentle, 2.6, 0) == math.inf
    assert stays_below(gentle, math.nan, 0) == math.inf, "no published schedule was trained with this seed"


def test_the_table_says_what_diverged() -> None:
    def run(loss: float) -> dict[str, object]:
        return {
            "cross_entropy": loss,
            "evaluations": [(20, loss)],
            "odd_text": {"tabs": 1.0},
            "worst_training_loss": math.inf,
            "tokens_per_second": 1.0,
        }

    rows = table({CONTROL: {0: run(2.0)}, "taper": {0: run(2.5)}}, 10, {"taper": 5}, {"taper": 2})
    assert [row["diverged"] for row in rows] == [0, 2]
    assert "| taper | 1 + 2 diverged |" in show(rows)
    assert json.loads(json.dumps(without_infinity(rows), allow_nan=False))[1]["tokens_to_close"] is None
