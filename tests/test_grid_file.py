"""Sweep files: what they resolve to, and every fault of a file and of its arms at once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_removal.config.recipe import load_recipe
from ln_removal.config.sweep import Arm, Sweep, available_sweeps, dump_sweep, load_sweep, slug_of
from ln_removal.errors import UserError

BASE = """
model = "small"
[data]
corpus = "texts"
context = 32
[architecture]
n_layer = 1
n_head = 2
n_embd = 32
n_positions = 64
vocab_size = 512
[training]
steps = 100
tokens_per_step = 256
warmup_steps = 10
learning_rate = 1e-3
"""
GOOD = """
base = "base"
seeds = [0, 1]
baseline = "one + layer"
[[arms]]
name = "one + layer"
[[arms]]
name = "two layers"
set = { "architecture.n_layer" = 2 }
"""


def grid_file(directory: Path, text: str, base: str = BASE) -> str:
    (directory / "base.toml").write_text(base, encoding="utf-8")
    file = directory / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def faults_of(directory: Path, text: str, *, base: str = BASE, overrides: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_sweep(grid_file(directory, text, base), overrides=overrides)
    first, *faults = str(caught.value).splitlines()
    assert first.endswith("has a fault:" if len(faults) == 1 else f"has {len(faults)} faults:")
    return [fault.strip() for fault in faults]


def arm(name: str, settings: str = "") -> str:
    return f'[[arms]]\nname = "{name}"\nset = {{ {settings} }}\n'


# ----------------------------------------------------------------------------------------------------------- resolving


def test_arms_are_the_base_with_their_settings(tmp_path: Path) -> None:
    grid = load_sweep(grid_file(tmp_path, GOOD))
    base = load_recipe(str(tmp_path / "base.toml"))
    assert (grid.name, grid.seeds, grid.baseline, grid.tokens) == ("mine", (0, 1), "one + layer", 25_600)
    one, two = grid.arms
    assert (one.name, one.recipe) == ("one + layer", base)
    assert two.recipe.architecture is not None and base.architecture is not None
    assert two.recipe.architecture == base.architecture.model_copy(update={"n_layer": 2})
    assert two.recipe.training == base.training
    assert grid.recipe_of(two, 1).seed == 1
    assert grid.recipe_of(two, 1).name == grid.directory_name(two, 1) == "two-layers-seed1"


def test_runs_go_seed_by_seed(tmp_path: Path) -> None:
    grid = load_sweep(grid_file(tmp_path, GOOD))
    assert [grid.directory_name(*run) for run in grid.order()] == [
        *("one-layer-seed0", "two-layers-seed0"),
        *("one-layer-seed1", "two-layers-seed1"),
    ]


def test_a_table_of_a_section_is_as_good_as_dotted_keys(tmp_path: Path) -> None:
    nested = GOOD.replace('"architecture.n_layer" = 2', "architecture.n_layer = 2, training = { clip = 0.5 }")
    dotted = GOOD.replace('"architecture.n_layer" = 2', '"architecture.n_layer" = 2, "training.clip" = 0.5')
    assert load_sweep(grid_file(tmp_path, nested)) == load_sweep(grid_file(tmp_path, dotted))


def test_settings_and_steps_apply_to_every_arm(tmp_path: Path) -> None:
    grid = load_sweep(grid_file(tmp_path, GOOD), overrides={"training.clip": 0.5}, steps=50)
    assert [each.recipe.training.clip for each in grid.arms] == [0.5, 0.5]
    assert [each.recipe.training.warmup_steps for each in grid.arms] == [5, 5]  # scaled with the steps
    assert grid.tokens == 50 * 256


def test_base_by_path_with_or_without_suffix_or_by_built_in_name(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    grid_file(tmp_path, "")
    file = tmp_path / "below" / "grid.toml"
    for base in ("../base.toml", "../base"):
        file.write_text(GOOD.replace('"base"', f'"{base}"'), encoding="utf-8")
        assert load_sweep(str(file)).tokens == 25_600
    file.write_text(GOOD.replace('"base"', '"tiny-gpt2"'), encoding="utf-8")
    assert load_sweep(str(file)).arms[0].recipe == load_recipe("tiny-gpt2")


def test_built_in_grids_load_by_name() -> None:
    assert "normfree/table" in available_sweeps()
    for name in available_sweeps():
        grid = load_sweep(name)
        assert grid.baseline in [each.name for each in grid.arms]
    arms = {each.name: each.recipe.architecture for each in load_sweep("normfree/table").arms}
    assert list(arms) == ["LN + GELU", "LN + ReLU", "norm-free + GELU", "norm-free + ReLU"]


def test_what_is_kept_in_the_directory_tells_grids_apart(tmp_path: Path) -> None:
    grid = load_sweep(grid_file(tmp_path, GOOD))
    assert load_sweep(grid_file(tmp_path, GOOD)) == grid
    kept = tomllib.loads(dump_sweep(grid))
    assert kept["arms"]["two layers"]["architecture"]["n_layer"] == 2
    other = load_sweep(grid_file(tmp_path, GOOD), overrides={"training.clip": 0.5})
    assert dump_sweep(other) != dump_sweep(grid)


@given(st.text())
def test_slugs_are_plain_file_names(name: str) -> None:
    slug = slug_of(name)
    assert re.fullmatch(r"|[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?", slug)
    assert slug_of(slug) == slug


@given(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
def test_the_order_has_each_run_once_and_finishes_a_seed_first(arms: int, seeds: list[int]) -> None:
    recipe = load_recipe("tiny-gpt2")
    grid = Sweep("grid", "", tuple(seeds), "0", tuple(Arm(str(number), str(number), recipe) for number in range(arms)))
    order = [(each.name, seed) for each, seed in grid.order()]
    assert len(set(order)) == len(order) == arms * len(seeds)
    assert [seed for _, seed in order[::arms]] == seeds
    assert all(len({seed for _, seed in order[start : start + arms]}) == 1 for start in range(0, len(order), arms))


# -------------------------------------------------------------------------------------------------------------- faults


def test_all_faults_of_the_file_come_at_once(tmp_path: Path) -> None:
    text = """
base = "base"
seeds = [0, -1, "two"]
basline = "one"
[[arms]]
name = "one"
sett = { }
[[arms]]
set = 3
"""
    assert faults_of(tmp_path, text) == [
        "seeds: should be greater than or equal to 0, found -1",
        "seeds: should be a valid integer, found 'two'",
        "baseline: missing; add it",
        "arm 'one': sett: unknown key; did you mean 'set'?",
        "arm 2: name: missing; add it",
        "arm 2: set: should be a valid dictionary, found 3",
        "basline: unknown key; did you mean 'baseline'?",
    ]


def test_faults_of_all_arms_come_at_once_with_those_of_names_and_seeds(tmp_path: Path) -> None:
    text = (
        'base = "base"\nseeds = [3, 3]\nbaseline = "LN-GELU"\n'
        + arm("LN + GELU")
        + arm("ln gelu", '"training.clip" = -1')
        + arm("++", '"architecture.n_head" = 5, "seed" = 4')
    )
    assert faults_of(tmp_path, text) == [
        "arm 'ln gelu': its directory would be that of 'LN + GELU' (ln-gelu); rename one",
        "arm '++': the name makes no directory's name; put a letter or a digit into it",
        "baseline: there is no arm 'LN-GELU'; did you mean 'LN + GELU'?",
        "seeds: 3 is there twice; leave one out",
        "arm 'ln gelu': training.clip: should be greater than 0, found -1",
        "arm '++': set: seed cannot be set here; list them under seeds, they are the same for all arms",
        "arm '++': architecture.n_embd: must be a multiple of n_head (5), found 32",
    ]


def test_a_fault_of_the_base_is_said_once(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, GOOD, base=BASE.replace("steps = 100", "steps = 0"))
    assert faults == ["base base: training.steps: should be greater than 0, found 0"]
    text = GOOD.replace('n_layer" = 2', 'n_layer" = 0')
    assert faults_of(tmp_path, text, base=BASE.replace("steps = 100", "steps = 0")) == [
        *faults,
        "arm 'two layers': architecture.n_layer: should be greater than 0, found 0",
    ]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            '"training.steps" = 50',
            "trains on 12,800 tokens, 'one + layer' trains on 25,600; arms are compared at equal",
        ),
        ('"training.tokens_per_step" = 512', "trains on 51,200 tokens"),
        ('"data.context" = 64', "data.context must be the same for all arms, found 64, 'one + layer' has 32; set it"),
        ('"data.corpus" = "other"', "data.corpus must be the same for all arms, found 'other'"),
        (
            '"architecture.vocab_size" = 600',
            "architecture.vocab_size must be the same for all arms where data.tokenizer",
        ),
        ("", "is the same recipe as 'one + layer'; set what makes it differ, or drop it"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tmp_path: Path, settings: str, fault: str) -> None:
    (found,) = faults_of(tmp_path, GOOD.replace('"architecture.n_layer" = 2', settings))
    assert found.startswith(f"arm 'two layers': {fault}")


def test_equal_tokens_in_other_steps_are_fine(tmp_path: Path) -> None:
    text = GOOD.replace('n_layer" = 2', 'n_layer" = 2, "training.steps" = 50, "training.tokens_per_step" = 512')
    assert load_sweep(grid_file(tmp_path, text)).tokens == 25_600


def test_vocabularies_may_differ_where_the_tokenizer_is_given(tmp_path: Path) -> None:
    text = GOOD.replace('n_layer" = 2', 'vocab_size" = 600')
    assert len(load_sweep(grid_file(tmp_path, text), overrides={"data.tokenizer": "tiny"}).arms) == 2


def test_an_override_that_makes_arms_equal_is_refused(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, GOOD, overrides={"architecture.n_layer": 3})
    assert fault.startswith("arm 'two layers': is the same recipe as 'one + layer'")
    assert faults_of(tmp_path, GOOD, overrides={"seed": 3})[0].startswith("--set: seed cannot be set here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "is not TOML"),
        (BASE, "is a recipe, not a grid: it has no [[arms]]; train it with --recipe"),
        (GOOD.replace('"base"', '"nowhere"'), "base nowhere: there is no recipe named 'nowhere'"),
        (GOOD.replace('"base"', '"tiny"'), "base tiny: has no [architecture]; name a pretraining recipe"),
        ('base = "base"\nseeds = []\nbaseline = "a"\narms = []\n', "seeds: List should have at least 1 item"),
        ('base = "base"\nseeds = [0]\nbaseline = "a"\narms = { a = {} }\n', "begin each arm with [[arms]]"),
    ],
)
def test_other_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_sweep(grid_file(tmp_path, text))


def test_a_grid_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match="'normfree/table'"):
        load_sweep("normfree/tabel")
    with pytest.raises(UserError, match=r"no/such\.toml"):
        load_sweep("no/such.toml")
