"""Recipes: loading, overrides, faults, writing back, and fitting them to other runs and models."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ln_removal.config.presets import default_recipe, with_layers, with_steps
from ln_removal.config.recipe import (
    ArchitectureSpec,
    Recipe,
    available_recipes,
    dump_toml,
    load_recipe,
    parse_overrides,
    validate_recipe,
    with_defaults,
)
from ln_removal.config.validation import REMOVED_KEYS
from ln_removal.errors import UserError
from ln_removal.files import resources
from ln_removal.files.run_directory import differences, may_go_on_with, run_directory
from ln_removal.norms.schedule import expand

GOOD = """
model = "gpt2"
[data]
corpus = "openwebtext"
context = 128
[schedule]
ln_2_start = 5
ln_2_gap = 1
qk_gap = 1
v_gap = 2
eot_after = 2
first_after = 3
[training]
steps = 100
tokens_per_step = 4096
learning_rate = 1e-3
"""
LAYERS = {"tiny": 6, "distilgpt2": 6, "gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}
REMOVALS = [name for name in available_recipes() if load_recipe(name).schedule is not None]


def recipe_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def faults_of(tmp_path: Path, text: str, overrides: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path, text), overrides)
    first, *faults = str(caught.value).splitlines()
    assert first.endswith("has a fault:" if len(faults) == 1 else f"has {len(faults)} faults:")
    return [fault.strip() for fault in faults]


# ----------------------------------------------------------------------------------------------------- built-in recipes


def test_the_recipes_that_are_promised_exist() -> None:
    promised = {
        "tiny",
        "gpt2",
        "gpt2-apollo",
        "gpt2-fast",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "gpt2-xl-aux",
        "distilgpt2",
    }
    assert promised <= set(available_recipes())


def test_recipes_in_a_folder_have_its_name_and_grids_are_no_recipes(tmp_path: Path) -> None:
    names = available_recipes()
    assert {"normfree/small-python", "normfree/codeparrot-gpt2", "normfree/codeparrot-pythia-70m"} <= set(names)
    assert "normfree/table" not in names
    assert load_recipe("normfree/small-python").name == "normfree/small-python"
    # A file of the user wins, and nothing outside the recipes is reached by such a name.
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe("normfree/../../pyproject")
    with pytest.raises(UserError, match="no recipe file normfree/none"):
        load_recipe("normfree/none")


def test_published_settings_without_norms() -> None:
    """Jha & Reagen 2024 (arXiv 2410.09637): 2.1 billion tokens in steps of 65,536."""
    for name, context, layers in (("codeparrot-gpt2", 128, 12), ("codeparrot-pythia-70m", 256, 6)):
        recipe = load_recipe(f"normfree/{name}")
        training, shape = recipe.training, recipe.architecture
        assert shape is not None and recipe.tokens == 32_000 * 65_536
        assert (recipe.data.corpus, recipe.data.context) == ("codeparrot", context)
        assert (training.learning_rate, training.weight_decay, training.clip) == (1e-3, 0.1, 1.0)
        assert (training.decay, training.minimum_learning_rate, training.warmup_steps) == ("linear", 0.0, 1600)
        assert (training.optimizer, training.precision) == ("adamw", "float16")
        assert (shape.n_layer, shape.block_norm, shape.final_norm) == (layers, "none", "layernorm")
        assert (shape.biases, shape.activation) == ("paper", "relu")


@pytest.mark.parametrize("name", available_recipes())
def test_each_recipe_starts_with_its_command_and_survives_writing(name: str, tmp_path: Path) -> None:
    file = resources.recipes_directory() / f"{name}.toml"
    command = file.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# ln-(remove|pretrain) .*--(recipe|model) {re.escape(name)}( |$)", command), command
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(recipe_file(tmp_path, dump_toml(recipe))) == recipe


@pytest.mark.parametrize("name", REMOVALS)
def test_each_removal_fits_its_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.schedule is not None
    expand(recipe.schedule, LAYERS[recipe.model], recipe.training.steps)


def test_published_settings() -> None:
    table = {  # arXiv 2409.13710 and 2507.02559: steps, warm-up, learning rate, its minimum, auxiliary weight, momentum
        "gpt2-apollo": (1200, 100, 6e-4, 6e-5, 0.0, 0.9),
        "gpt2-fast": (300, 20, 6e-4, 3e-4, 0.0, 0.9),
        "gpt2-fast-aux": (300, 25, 6e-4, 3e-4, 0.1, 0.9),
        "gpt2-medium": (500, 10, 6e-4, 3e-4, 0.1, 0.9),
        "gpt2-large": (600, 15, 3e-4, 4e-5, 0.03, 0.9 ** (28 / 32)),
        "gpt2-xl": (800, 20, 1e-4, 2e-5, 0.0, 0.9 ** (18 / 32)),
        "gpt2-xl-aux": (800, 20, 1e-4, 2e-5, 0.01, 0.9 ** (18 / 32)),
    }
    for name, expected in table.items():
        spec = load_recipe(name).training
        found = (spec.steps, spec.warmup_steps, spec.learning_rate, spec.minimum_learning_rate, spec.auxiliary_weight)
        assert (*found, spec.std_momentum) == pytest.approx(expected, rel=1e-4), name
        assert (spec.decay, spec.weight_decay, spec.clip, spec.tokens_per_step) == ("cosine", 0.01, 1.0, 524_288), name
    assert 450e6 < load_recipe("gpt2").tokens < 550e6
    assert round(load_recipe("gpt2-fast").tokens / 1e6) == 157


# -------------------------------------------------------------------------------------------------------------- loading


def test_a_file_gets_defaults_and_its_own_name(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, GOOD))
    assert recipe.name == "mine"
    assert recipe.training.betas == (0.9, 0.95)
    assert recipe.training.micro_batch == "auto"
    assert recipe.export.formats == ["normfree", "stock"]
    assert recipe.tokens == 409_600


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    changes: dict[str, object] = {"seed": 7, "training.steps": 20, "data.weights.json": 3, "training.betas": [0.8, 0.9]}
    recipe = load_recipe(recipe_file(tmp_path, GOOD), changes)
    assert (recipe.seed, recipe.training.steps, recipe.data.weights) == (7, 20, {"json": 3})
    assert recipe.training.betas == (0.8, 0.9)


def test_overrides_from_the_command_line() -> None:
    read = parse_overrides(
        ["training.steps=20", "training.learning_rate = 1e-3", "data.corpus=openwebtext", "training.compile=false"]
    )
    assert read == {
        "training.steps": 20,
        "training.learning_rate": 1e-3,
        "data.corpus": "openwebtext",
        "training.compile": False,
    }
    for wrong in ("training.steps", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_overrides([wrong])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtp2", "did you mean 'gpt2'?"),
        ("nothing-like-it", "built in are: "),
        ("no/such.toml", "no recipe file no/such.toml"),
        ("", "built in are: "),
    ],
)
def test_unknown_recipes_are_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_recipe(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"model = ", b"\xff\xfe", b"[data\n"])
def test_files_that_are_not_toml(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.toml is not TOML"):
        load_recipe(str(file))


def test_a_directory_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(f"{tmp_path}/")


# --------------------------------------------------------------------------------------------------------------- faults


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = """
    modle = "gpt2"
    model = 3
    [data]
    corpus = "openwebtext"
    steps = 5
    context = 100
    weights = {json = "much"}
    [schedule]
    ln_2_strt = 3
    [training]
    steps = 10
    tokens_per_step = 4096
    learning_rate = 1e-4
    minimum_learning_rate = 1e-3
    warmup_steps = 20
    micro_batch = "many"
    optimizer = "sgd"
    betas = [0.9]
    compile = 3
    clip = inf
    [archtecture]
    n_layer = 2
    [export]
    formats = ["onnx"]
    """
    faults = faults_of(tmp_path, text)
    expected = [
        "modle: unknown key; did you mean 'model'?",
        "model: should be a valid string, found 3",
        "data.steps: unknown key; did you mean 'training.steps'?",
        "data.weights.json: should be a valid integer, found 'much'",
        "schedule.ln_2_strt: unknown key; did you mean 'schedule.ln_2_start'?",
        "schedule.ln_2_gap: missing",
        "training.micro_batch: should be a valid integer or should be 'auto', found 'many'",
        "training.optimizer: should be 'adamw' or 'muon', found 'sgd'",
        "training.betas: should have one more item, found [0.9]",
        "training.compile: should be a valid boolean or should be 'auto', found 3",
        "training.clip: should be a finite number, found inf",
        "archtecture: unknown key; did you mean 'architecture'?",
        "export.formats: should be 'normfree' or 'stock', found ['onnx']",
        "training.warmup_steps: must be at most training.steps (10), found 20",
        "training.minimum_learning_rate: must be at most training.learning_rate (0.0001), found 0.001",
        "training.tokens_per_step: must be a multiple of data.context (100), found 4096; try 4100",
    ]
    for start in expected:
        assert sum(fault.startswith(start) for fault in faults) == 1, (start, faults)
    assert len(faults) == len(set(faults)) == len(expected) + 5  # and the other five missing numbers of [schedule]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"training.steps": "20"}, "training.steps: should be a valid integer, found '20'"),
        ({"training.steps": True}, "training.steps: should be a valid integer, found True"),
        ({"training.steps": 0}, "training.steps: should be greater than 0, found 0"),
        ({"training.learning_rate": -1.0}, "training.learning_rate: should be greater than 0, found -1.0"),
        (
            {"training.warmup_steps": 101},
            "training.warmup_steps: must be at most training.steps (100), found 101; lower it",
        ),
        (
            {"training.warmup_steps": 50, "training.decay_steps": 40},
            "training.warmup_steps: must be at most training.decay_steps (40), found 50; lower it",
        ),
        (
            {"training.minimum_learning_rate": 0.1},
            "training.minimum_learning_rate: must be at most training.learning_rate (0.001), found 0.1; lower it",
        ),
        (
            {"training.tokens_per_step": 100},
            "training.tokens_per_step: must be a multiple of data.context (128), found 100; try 128",
        ),
        (
            {"training.micro_batch": 24},
            (
                "training.micro_batch: must divide the 32 sequences of a step "
                "(4096 tokens / context 128), found 24; try 16"
            ),
        ),
        (
            {"training.decay": "trapezoid", "training.decay_fraction": 0.5, "training.warmup_steps": 60},
            (
                "training.decay_fraction: the decay (50 steps) and the warm-up (60) "
                "overlap within 100 steps; lower one of them"
            ),
        ),
        ({"schedule.taper": -1}, "schedule.taper: should be greater than or equal to 0, found -1"),
        ({"data.corpus": ""}, "data.corpus: String should have at least 1 character, found ''"),
        ({"training": 3}, "training: should be a table; write [training], found 3"),
        (
            {"training.auxiliary_target": "constants"},
            (
                "training.auxiliary_target: has no effect without training.auxiliary_weight, found 'constants'; "
                "give that, or leave this out"
            ),
        ),
        (
            {"training.auxiliary_sites": "all"},
            (
                "training.auxiliary_sites: has no effect without training.auxiliary_weight, found 'all'; "
                "give that, or leave this out"
            ),
        ),
        (
            {"training.distillation_end": 0.5},
            (
                "training.distillation_end: has no effect while training.distillation is 0, found 0.5; "
                "set that above 0, or leave this out"
            ),
        ),
        ({"schedule": None}, "schedule: missing; add [schedule] for a removal or [architecture] for pretraining"),
    ],
)
def test_single_faults(changes: dict[str, object], fault: str, tmp_path: Path) -> None:
    assert faults_of(tmp_path, GOOD, changes) == [fault]


def test_a_recipe_either_removes_or_pretrains(tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 32, "n_positions": 64, "vocab_size": 100}
    faults = faults_of(tmp_path, GOOD, {"architecture": shape})
    assert faults == [
        "schedule: a pretraining recipe, one with [architecture], has none; drop one of the two tables",
        "data.context: must be at most architecture.n_positions (64), found 128; lower it",
        "architecture.n_embd: must be a multiple of n_head (3), found 32",
    ]
    pretraining = GOOD.replace(GOOD[GOOD.index("[schedule]") : GOOD.index("[training]")], "")
    shape |= {"n_head": 4, "n_positions": 128}
    recipe = load_recipe(recipe_file(tmp_path, pretraining), {"architecture": shape})
    assert recipe.schedule is None
    assert recipe.architecture == ArchitectureSpec(**shape)
    unused = {
        "data.odd_text": 0.1,
        "training.auxiliary_weight": 0.1,
        "training.distillation": 0.5,
    }
    faults = faults_of(tmp_path, pretraining, {"architecture": shape} | unused)
    assert faults == [f"{key}: a pretraining recipe, one with [architecture], has none; leave it out" for key in unused]


def test_a_term_can_be_switched_off(tmp_path: Path) -> None:
    details = {
        "training.auxiliary_weight": 0.0,
        "training.auxiliary_target": "constants",
        "training.distillation": 0.0,
        "training.distillation_end": 0.0,
    }
    training = load_recipe(recipe_file(tmp_path, GOOD), details).training
    assert (training.auxiliary_weight, training.distillation) == (0.0, 0.0)


def test_overriding_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model is a value, not a table"):
        load_recipe(recipe_file(tmp_path, GOOD), {"model.name": "x"})


def test_python_code_gets_the_same_checks() -> None:
    document = tomllib.loads(GOOD) | {"name": "mine"}
    document["training"] |= {"warmup_steps": 200}
    with pytest.raises(ValidationError, match=r"must be at most training\.steps"):
        Recipe.model_validate(document)


def test_recipes_cannot_be_changed_by_accident(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, GOOD))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.steps = 3


# -------------------------------------------------------------------------------------------------------------- writing


def test_what_is_unset_is_not_written(tmp_path: Path) -> None:
    text = dump_toml(load_recipe(recipe_file(tmp_path, GOOD)))
    assert "decay_steps" not in text
    assert "[architecture]" not in text
    assert "clip = 1.0" in text


# -------------------------------------------------------------------------------------------------------------- scaling


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


def test_too_few_steps() -> None:
    with pytest.raises(UserError, match="give at least 2"):
        with_steps(load_recipe("gpt2"), 1)


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


# ------------------------------------------------------------------------------------------------------------ resources


def test_packaged_copies_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, checkout = tmp_path / "ln_removal", tmp_path
    monkeypatch.setattr(resources, "_PACKAGE", wheel)
    monkeypatch.setattr(resources, "_CHECKOUT", checkout)
    for find, message in (
        (resources.recipes_directory, "installation lacks the built-in recipes"),
        (resources.embedded_model_directory, "installation lacks the embedded model tiny-gpt2"),
    ):
        with pytest.raises(UserError, match=message):
            find()
    for folder in (checkout / "recipes", checkout / "checkpoints/tiny-gpt2"):
        folder.mkdir(parents=True)
    (checkout / "recipes/tiny.toml").touch()
    (checkout / "checkpoints/tiny-gpt2/config.json").touch()
    assert resources.recipes_directory() == checkout / "recipes"
    assert resources.embedded_model_directory() == checkout / "checkpoints/tiny-gpt2"
    for folder in (wheel / "_recipes", wheel / "_checkpoints/tiny-gpt2"):
        folder.mkdir(parents=True)
    (wheel / "_recipes/tiny.toml").touch()
    (wheel / "_checkpoints/tiny-gpt2/config.json").touch()
    assert resources.recipes_directory() == wheel / "_recipes"
    assert resources.embedded_model_directory() == wheel / "_checkpoints/tiny-gpt2"


PRETRAINING = """
model = "x"
[data]
corpus = "python-source"
context = 8
[architecture]
n_layer = 1
n_head = 3
n_embd = 24
n_positions = 8
vocab_size = 10
[training]
steps = 4
tokens_per_step = 8
learning_rate = 1e-3
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"architecture.slopes": "network"},
            "architecture.slopes: has no effect unless activation is 'learnable_leaky_relu'",
        ),
        ({"architecture.negative_slope": 0.2}, "architecture.negative_slope: has no effect unless activation is"),
        (
            {"architecture.family": "pythia", "architecture.n_embd": 36},
            "architecture.n_embd: must be a multiple of 8 n_head (24)",
        ),
        ({"architecture.activation": "swish"}, "architecture.activation: should be 'gelu', 'relu', 'leaky_relu'"),
        ({"architecture.block_norm": "rmsnorm"}, "architecture.block_norm: should be 'layernorm' or 'none'"),
        ({"observation.every": 0}, "observation.every: should be greater than 0"),
        ({"observation.sequences": 4}, "observation.every: missing"),
        ({"training.entropy_tolerance": 1.0}, "training.entropy_tolerance: should be less than 1"),
    ],
)
def test_faults_of_an_architecture(tmp_path: Path, overrides: dict[str, object], expected: str) -> None:
    load_recipe(recipe_file(tmp_path, PRETRAINING))
    (fault,) = faults_of(tmp_path, PRETRAINING, overrides)
    assert fault.startswith(expected)


def test_a_removal_has_no_entropy_penalty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.entropy_weight: a removal, a recipe with \[schedule\], has none"):
        load_recipe("tiny", {"training.entropy_weight": 1e-5})


def changed(name: str, overrides: dict[str, object]) -> dict[str, object]:
    """A built-in recipe with overrides, as recipe.toml would hold it."""
    return tomllib.loads(dump_toml(load_recipe(name, overrides)))


def test_a_key_that_an_older_version_did_not_write_counts_as_its_default() -> None:
    now = dump_toml(load_recipe("tiny"))
    older = "\n".join(line for line in now.splitlines() if not line.startswith(("on_spike", "entropy_", "odd_text")))
    before = tomllib.loads(older)
    assert before != tomllib.loads(now) and differences(before, tomllib.loads(now), with_defaults) == ""
    other = changed("tiny", {"schedule.on_spike": "ignore"})
    assert differences(before, other, with_defaults) == "schedule.on_spike was wait, now ignore"
    assert "seed was 0, now 1" in differences(before, changed("tiny", {"seed": 1}), with_defaults)


def test_another_name_or_description_is_no_difference() -> None:
    before = changed("tiny", {})
    now = changed("tiny", {"name": "demo", "description": "In other words."})
    assert before != now and differences(before, now, with_defaults) == ""
    now["seed"] = 1
    assert differences(before, now, with_defaults) == "seed was 0, now 1"
    del before["name"], now["name"]  # as the arms of a sweep are kept
    del before["data"]["odd_text"], now["seed"]  # type: ignore[attr-defined]
    assert differences(before, now, with_defaults) == ""


def test_a_trained_run_goes_on_under_another_description(tmp_path: Path) -> None:
    def claim(resume: bool, **overrides: object) -> None:
        recipe = dump_toml(load_recipe("tiny", overrides))
        with run_directory(tmp_path / "run", recipe, with_defaults=with_defaults, resume=resume):
            (tmp_path / "run" / "state" / "step-000001").mkdir(parents=True, exist_ok=True)

    claim(False)
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    claim(True, description="In other words.", name="demo")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before
    with pytest.raises(UserError, match=r"begun with another recipe: seed was 0, now 1; resume it with"):
        claim(True, description="In other words.", seed=1)


def as_version_0_1_wrote_it(recipe: Recipe) -> dict[str, Any]:
    """The recipe with the removed keys at their defaults."""
    document = recipe.model_dump(exclude_none=True)
    for key, off in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        if section in document and off is not None:
            document[section][name] = off
    return document


@pytest.mark.parametrize("name", ["tiny", "gpt2-fast", "normfree/small-python"])
def test_a_recipe_of_version_0_1_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    older, now = as_version_0_1_wrote_it(recipe), tomllib.loads(dump_toml(recipe))
    assert older["training"]["rewarm_steps"] == 0 and older["training"]["residual_matching"] == 0.0
    assert load_recipe(recipe_file(tmp_path, tomli_w.dumps(older))) == recipe
    assert differences(older, now, with_defaults) == ""
    assert differences(older, changed(name, {"seed": 1}), with_defaults) == "seed was 0, now 1"
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "rollback", "step": 5}\n', encoding="utf-8")
    lower = {"training.learning_rate": 1e-5, "training.minimum_learning_rate": 0.0}
    assert may_go_on_with(metrics, older, changed(name, lower), with_defaults)
    assert not may_go_on_with(metrics, older, changed(name, {**lower, "seed": 1}), with_defaults)
    assert not may_go_on_with(metrics, older, changed(name, {"training.clip": 2.0}), with_defaults)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule.layers", "last to first"),
        ("schedule.constant", "rms"),
        ("schedule.adaptive", {"largest_gap": 9, "recovery": 3}),
        ("training.rewarm_steps", 3),
        ("training.distillation_until", 0.5),
        ("training.residual_matching", 0.1),
    ],
)
def test_a_removed_option_that_was_in_use_is_a_fault(key: str, value: object, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, GOOD, {key: value})
    found = "" if isinstance(value, dict) else f", found {value!r}"
    assert fault == f"{key}: this option was removed in version 0.2.0; leave it out, or use version 0.1{found}"


def test_a_removed_option_may_be_anything_where_its_section_is_no_table(tmp_path: Path) -> None:
    assert faults_of(tmp_path, GOOD, {"training": 3}) == ["training: should be a table; write [training], found 3"]


def test_a_grid_is_not_a_recipe() -> None:
    with pytest.raises(
        UserError, match=r"table.toml is a grid, not a recipe; train it with ln-pretrain --grid normfree/table"
    ):
        load_recipe("normfree/table")


def test_an_unknown_key_with_dots_of_its_own(tmp_path: Path) -> None:
    assert faults_of(tmp_path, PRETRAINING.replace("n_layer = 1", 'n_layer = 1\n"." = 1'))[0].startswith(
        "architecture..: unknown key"
    )
