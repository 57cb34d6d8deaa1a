"""Fitting recipes to other numbers of steps and to models of other depths."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe import GOOD, LAYERS, REMOVALS

from ln_removal.config.presets import default_recipe, with_layers, with_steps
from ln_removal.config.recipe import ArchitectureSpec, available_recipes, dump_toml, load_recipe, validate_recipe
from ln_removal.norms.schedule import expand


@given(st.sampled_from(REMOVALS), st.integers(2, 3000))
@settings(max_examples=150, deadline=None)
def test_any_recipe_fits_any_number_of_steps(name: str, steps: int) -> None:
    recipe = load_recipe(name)
    scaled = with_steps(recipe, steps)
    assert scaled.training.steps == steps
    assert scaled.schedule is not None
    expand(scaled.schedule, LAYERS[recipe.model], steps)
    assert validate_recipe(tomllib.loads(dump_toml(scaled)), source="scaled") == scaled


@given(gaps=st.lists(st.integers(0, 6), min_size=7, max_size=7), start=st.integers(1, 30), steps=st.integers(2, 200))
@settings(max_examples=150, deadline=None)
def test_a_schedule_that_fills_its_run_still_fits_when_scaled(gaps: list[int], start: int, steps: int) -> None:
    document = tomllib.loads(GOOD) | {"name": "full"}
    keys = ("ln_2_gap", "qk_gap", "v_gap", "eot_after", "first_after", "taper", "special_taper")
    document["schedule"] = {"ln_2_start": start, **dict(zip(keys, gaps, strict=True))}
    recipe = validate_recipe(document, source="full")
    assert recipe.schedule is not None
    length = expand(recipe.schedule, 3, 10_000).complete_at + 1
    document["training"]["steps"] = length
    scaled = with_steps(validate_recipe(document, source="full"), steps).schedule
    assert scaled is not None
    assert expand(scaled, 3, steps).recovery_steps >= 1


@pytest.mark.parametrize("name", available_recipes())
def test_the_same_number_of_steps_changes_nothing(name: str) -> None:
    recipe = load_recipe(name)
    assert with_steps(recipe, recipe.training.steps) == recipe


def test_half_the_steps_freeze_at_half_the_time() -> None:
    recipe = load_recipe("gpt2-apollo")
    half = with_steps(recipe, 600)
    assert half.schedule is not None
    assert (half.training.warmup_steps, half.training.decay_steps) == (50, 1000)
    complete = expand(half.schedule, 12, 600).complete_at
    assert 0.44 * 1160 <= complete <= 0.5 * 1160


@given(st.sampled_from(REMOVALS), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_any_recipe_fits_any_depth(name: str, n_layer: int) -> None:
    recipe = load_recipe(name)
    fitted = with_layers(recipe, written_for=LAYERS[recipe.model], n_layer=n_layer)
    assert fitted.schedule is not None
    expand(fitted.schedule, n_layer, fitted.training.steps)


@pytest.mark.parametrize(
    ("model", "n_layer", "n_positions", "base", "context"),
    [
        ("gpt2", 12, 1024, "gpt2", 1024),
        ("openai-community/gpt2-xl", 48, 1024, "gpt2-xl", 1024),
        ("distilbert/distilgpt2", 6, 1024, "distilgpt2", 1024),
        ("someone/else", 10, 1024, "gpt2", 1024),
        ("./local", 30, 1000, "gpt2-medium", 512),
        ("./deep", 100, 2048, "gpt2-xl", 1024),
        ("./gpt2", 3, 64, "distilgpt2", 64),
    ],
)
def test_default_recipe(model: str, n_layer: int, n_positions: int, base: str, context: int) -> None:
    shape = ArchitectureSpec(n_layer=n_layer, n_head=2, n_embd=16, n_positions=n_positions, vocab_size=100)
    recipe = default_recipe(model, shape)
    assert (recipe.model, recipe.name, recipe.data.context) == (model, base, context)
    assert recipe.schedule is not None
    expand(recipe.schedule, n_layer, recipe.training.steps)
    if LAYERS[base] == n_layer:
        assert recipe.schedule == load_recipe(base).schedule
