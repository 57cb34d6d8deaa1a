"""Recipes: loading, overrides, faults, writing back, and fitting them to other runs and models."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ln_removal.config.recipe import (
    ArchitectureSpec,
    Recipe,
    available_recipes,
    dump_toml,
    load_recipe,
    parse_overrides,
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
LAYERS["HuggingFaceTB/SmolLM2-135M"] = 30
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


def test_recipes_in_a_folder_have_its_name_and_grids_are_no_recipes(tmp_path: Path) -> None:
    names = available_recipes()
    assert {"normfree/small-python", "normfree/codeparrot-gpt2", "normfree/codeparrot-pythia-70m"} <= set(names)
    assert "normfree/table" not in names
    assert load_recipe("normfree/small-python").name == "normfree/small-python"
    # A file of the user wins, and nothing outside the recipes is reached by such a name.
    with pytest.raises(UserError, match="recipe"):
        load_recipe("normfree/../../pyproject")
    with pytest.raises(UserError, match="normfree/none"):
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
        ("gtp2", "'gpt2'"),
        ("nothing-like-it", "gpt2-fast"),
        ("no/such.toml", "no/such.toml"),
        ("", "gpt2-fast"),
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
    with pytest.raises(UserError, match=r"broken\.toml"):
        load_recipe(str(file))


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
    expected = {
        *("modle", "model", "data.steps", "data.weights.json", "schedule.ln_2_strt", "training.micro_batch"),
        *("training.optimizer", "training.betas", "training.compile", "training.clip", "archtecture", "export.formats"),
        *("training.warmup_steps", "training.minimum_learning_rate", "training.tokens_per_step"),
        *(f"schedule.{key}" for key in ("ln_2_start", "ln_2_gap", "qk_gap", "v_gap", "eot_after", "first_after")),
    }
    assert sorted(fault.partition(":")[0] for fault in faults) == sorted(expected)
    for suggestion in ("'model'", "'training.steps'", "'schedule.ln_2_start'", "'architecture'", "4100"):
        assert any(suggestion in fault for fault in faults), suggestion


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training.steps": "20"}, "training.steps"),
        ({"training.steps": True}, "training.steps"),
        ({"training.steps": 0}, "training.steps"),
        ({"training.learning_rate": -1.0}, "training.learning_rate"),
        ({"training.warmup_steps": 101}, "training.warmup_steps"),
        ({"training.warmup_steps": 50, "training.decay_steps": 40}, "training.warmup_steps"),
        ({"training.minimum_learning_rate": 0.1}, "training.minimum_learning_rate"),
        ({"training.tokens_per_step": 100}, "training.tokens_per_step"),
        ({"training.micro_batch": 24}, "training.micro_batch"),
        (
            {"training.decay": "trapezoid", "training.decay_fraction": 0.5, "training.warmup_steps": 60},
            "training.decay_fraction",
        ),
        ({"schedule.taper": -1}, "schedule.taper"),
        ({"data.corpus": ""}, "data.corpus"),
        ({"training": 3}, "training"),
        ({"training.auxiliary_target": "constants"}, "training.auxiliary_target"),
        ({"training.auxiliary_sites": "all"}, "training.auxiliary_sites"),
        ({"training.outlier_weight": 0.5}, "training.outlier_weight"),
        ({"training.outlier_ratio": 1.2}, "training.outlier_ratio"),
        ({"training.auxiliary_weight": 0.5, "training.auxiliary_early": 2.0}, "training.auxiliary_early"),
        ({"training.distillation_end": 0.5}, "training.distillation_end"),
        ({"schedule": None}, "schedule"),
    ],
)
def test_single_faults(changes: dict[str, object], key: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, GOOD, changes)
    assert fault.partition(":")[0] == key


def test_a_recipe_either_removes_or_pretrains(tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 32, "n_positions": 64, "vocab_size": 100}
    faults = faults_of(tmp_path, GOOD, {"architecture": shape})
    assert [fault.partition(":")[0] for fault in faults] == ["schedule", "data.context", "architecture.n_embd"]
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
    assert [fault.partition(":")[0] for fault in faults] == list(unused)


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
    with pytest.raises(UserError, match="model"):
        load_recipe(recipe_file(tmp_path, GOOD), {"model.name": "x"})


# -------------------------------------------------------------------------------------------------------------- writing


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
    ("overrides", "key"),
    [
        ({"architecture.slopes": "network"}, "architecture.slopes"),
        ({"architecture.negative_slope": 0.2}, "architecture.negative_slope"),
        ({"architecture.family": "pythia", "architecture.n_embd": 36}, "architecture.n_embd"),
        ({"architecture.activation": "swish"}, "architecture.activation"),
        ({"architecture.block_norm": "rmsnorm"}, "architecture.block_norm"),
        ({"observation.every": 0}, "observation.every"),
        ({"observation.sequences": 4}, "observation.every"),
        ({"training.entropy_tolerance": 1.0}, "training.entropy_tolerance"),
        ({"training.spectral_cap": 0.0}, "training.spectral_cap"),
        ({"architecture.residual_gain": 0.3}, "architecture.residual_gain"),
        (
            {"architecture.family": "pythia", "architecture.n_embd": 48, "architecture.qk_norm": True},
            "architecture.qk_norm",
        ),
    ],
)
def test_faults_of_an_architecture(tmp_path: Path, overrides: dict[str, object], key: str) -> None:
    load_recipe(recipe_file(tmp_path, PRETRAINING))
    (fault,) = faults_of(tmp_path, PRETRAINING, overrides)
    assert fault.partition(":")[0] == key


@pytest.mark.parametrize("key", ["training.entropy_weight", "training.spectral_cap"])
def test_a_removal_has_no_entropy_penalty_and_no_cap_of_matrices(key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_recipe("tiny", {key: 1e-5})


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
    with pytest.raises(UserError, match="ln-pretrain --grid normfree/table"):
        load_recipe("normfree/table")


def test_an_unknown_key_with_dots_of_its_own(tmp_path: Path) -> None:
    assert faults_of(tmp_path, PRETRAINING.replace("n_layer = 1", 'n_layer = 1\n"." = 1'))[0].startswith(
        "architecture..: unknown key"
    )
