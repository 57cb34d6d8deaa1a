"""The dry run: counts against transformers' own model, memory against autograd, and what is printed."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import run_code
from rich.console import Console

from ln_removal.config import estimate
from ln_removal.config.estimate import count_parameters, estimate_memory, flops_per_token
from ln_removal.config.recipe import ArchitectureSpec, Recipe, load_recipe
from ln_removal.config.sweep import load_sweep
from ln_removal.errors import UserError
from ln_removal.pipelines import cpu_time
from ln_removal.pipelines.context import run_context
from ln_removal.pipelines.plan import architecture_of, plan, plan_sweep

SMALL = ArchitectureSpec(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=100)


def recipe_for(model: str, overrides: dict[str, object] | None = None) -> Recipe:
    return load_recipe("gpt2-fast", {"model": model} | (overrides or {}))


def write_config(folder: Path, shape: ArchitectureSpec, **changes: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.model_dump() | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("recipe", "parameters", "tokens", "sites"),
    [
        ("distilgpt2", 81_912_576, 157_286_400, 6 * 3 + 1),
        ("gpt2", 124_439_808, 524_288_000, 12 * 3 + 1),
        ("gpt2-apollo", 124_439_808, 629_145_600, 12 * 3 + 1),
        ("gpt2-medium", 354_823_168, 262_144_000, 24 * 3 + 1),
        ("gpt2-large", 774_030_080, 314_572_800, 36 * 3 + 1),
        ("gpt2-xl", 1_557_611_200, 419_430_400, 48 * 3 + 1),
    ],
)
def test_known_sizes_need_no_files(recipe: str, parameters: int, tokens: int, sites: int, tmp_path: Path) -> None:
    drawn = plan(load_recipe(recipe))
    assert (drawn.parameters, drawn.tokens) == (parameters, tokens)
    freezes = [row for row in drawn.to_json()["schedule"] if row["action"] == "freeze"]  # type: ignore[attr-defined]
    assert len(freezes) == sites


def test_owners_of_the_published_models_are_ignored() -> None:
    assert architecture_of(recipe_for("openai-community/gpt2-large")).n_layer == 36


def test_parameters_are_those_of_the_real_model() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config.from_dict(SMALL.model_dump() | {"bos_token_id": 0, "eos_token_id": 0}))
    assert count_parameters(SMALL) == sum(parameter.numel() for parameter in model.parameters())


def test_flops_per_token_of_gpt2() -> None:
    small = estimate.KNOWN_ARCHITECTURES["gpt2"]
    assert flops_per_token(small, 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [
        {},
        {"family": "pythia"},
        {"family": "llama"},
        {"family": "llama", "n_inner": 384},
        {"family": "qwen2"},
        {"family": "qwen3"},
    ],
    ids=["gpt2", "pythia", "llama", "llama with a wide MLP", "qwen2", "qwen3"],
)
def test_activation_bytes_are_what_autograd_keeps(precision: str, family: dict[str, Any]) -> None:
    """The constant c, measured as the growth from 2 to 4 layers of the installed model, not compiled."""
    from ln_removal.models.norm_choice import build_model
    from ln_removal.norms.surgery import install

    batch, context, width = 2, 64, 64

    def shape(n_layer: int) -> ArchitectureSpec:
        sizes = SMALL.model_dump(exclude_defaults=True)
        return ArchitectureSpec(**sizes | {"n_layer": n_layer, "n_embd": width, "n_positions": context} | family)

    def kept(n_layer: int) -> int:
        model = build_model(shape(n_layer), eot_token_id=0).train()
        install(model, eot_token_id=None, keep=("qk-norms",) if family.get("family") == "qwen3" else ())
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        tokens = torch.zeros(batch, context, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            alive = model.base_model(tokens).last_hidden_state
        assert alive.requires_grad
        return sum(size for size, _ in storages.values())

    grown = kept(4) - kept(2)
    copies = 2 * estimate.block_matrices(shape(2)) * 2 if precision == "bfloat16" else 0  # autocast's weights
    found = (grown - copies) / (2 * batch * context * width)
    assert found == pytest.approx(estimate.activation_bytes(shape(2), precision, compiled=False), rel=0.1)


def test_memory_follows_the_formula_and_the_settings() -> None:
    recipe = recipe_for("gpt2", {"training.precision": "float32"})
    small = estimate.KNOWN_ARCHITECTURES["gpt2"]
    one, two = (estimate_memory(recipe, small, size) for size in (8, 16))
    count = count_parameters(small)
    assert (one.parameters, one.gradients, one.optimizer) == (4 * count, 4 * count, 8 * count)
    assert two.activations - one.activations == 8 * 1024 * (12 * 76 + 12) * 768
    assert one.total == one.parameters + one.gradients + one.optimizer + one.activations
    muon = estimate_memory(recipe_for("gpt2", {"training.optimizer": "muon"}), small, 8)
    assert one.optimizer - muon.optimizer == 4 * 12 * 12 * 768**2
    eager = estimate_memory(recipe_for("gpt2", {"training.compile": False}), small, 8)
    assert eager.activations > estimate_memory(recipe_for("gpt2"), small, 8).activations


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"family": "pythia"},
        {"family": "llama", "n_kv_head": 1, "n_inner": 48, "attention_bias": True},
        {"family": "qwen2", "n_kv_head": 1, "tied": True},
        {"family": "qwen3", "head_width": 12},
    ],
    ids=["gpt2", "pythia", "llama", "qwen2", "qwen3"],
)
def test_low_rank_changes_need_gradients_and_moments_of_what_is_trained(family: dict[str, Any]) -> None:
    from ln_removal.models.norm_choice import build_model
    from ln_removal.training.low_rank import adapt

    shape = ArchitectureSpec(**SMALL.model_dump(exclude_defaults=True) | family)
    model = build_model(shape, eot_token_id=0)
    adapt(model, 2)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    memory = estimate_memory(recipe_for("gpt2", {"training.lora_rank": 2, "data.context": 32}), shape, 4)
    assert memory.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)


def test_a_teacher_takes_memory_and_time() -> None:
    small = estimate.KNOWN_ARCHITECTURES["gpt2"]
    alone = recipe_for("gpt2")
    taught = recipe_for("gpt2", {"training.distillation": 0.5})
    wide = recipe_for("gpt2", {"training.distillation": 0.5, "training.precision": "float32"})
    one, two, three = (estimate_memory(recipe, small, 8) for recipe in (alone, taught, wide))
    count = count_parameters(small)
    assert (one.teacher, two.teacher, three.teacher) == (0, 2 * count, 4 * count)
    assert two.activations - one.activations == 10 * 8192 * 50257
    assert two.total - one.total == 2 * count + 10 * 8192 * 50257
    seconds, with_teacher = (plan(recipe, device="H100").seconds for recipe in (alone, taught))
    assert seconds is not None and with_teacher == pytest.approx(seconds * 4 / 3)
    both = plan(taught, device="H100", control=True)
    assert both.seconds == pytest.approx(seconds * 7 / 3), "the control has no teacher"
    assert any("original model" in assumption for assumption in both.assumptions)
    assert plan(taught, device="RTX 3090").micro_batch <= plan(alone, device="RTX 3090").micro_batch


def test_constants_shared_with_the_modules_that_need_torch() -> None:
    from ln_removal.training import cross_entropy, setup

    assert cross_entropy.POSITIONS_IN_A_CHUNK["cuda"] == estimate.POSITIONS_IN_A_CHUNK
    assert estimate.CPU_TOKENS_IN_A_PASS == setup.TOKENS_IN_A_CPU_PASS


def test_time_on_a_gpu_scales_with_what_it_should() -> None:
    recipe = load_recipe("gpt2-fast")
    base = plan(recipe, device="NVIDIA H100 80GB HBM3").seconds
    assert base is not None
    work = 157_286_400 * flops_per_token(estimate.KNOWN_ARCHITECTURES["gpt2"], 1024)
    assert base == pytest.approx(work / (989e12 * estimate.ASSUMED_UTILISATION))
    assert plan(recipe, device="H100", control=True).seconds == pytest.approx(2 * base)
    assert plan(recipe, device="H100", processes=8).seconds == pytest.approx(base / 8)
    assert plan(recipe, device="NVIDIA A100-SXM4-80GB").seconds == pytest.approx(base * 989 / 312)
    assert plan(recipe, device="NVIDIA L40S").seconds == pytest.approx(base * 989 / 362)


def test_time_on_a_cpu_is_not_guessed() -> None:
    recipe = load_recipe("gpt2-fast")
    guessed = plan(recipe)
    assert guessed.seconds is None
    assert guessed.seconds_elsewhere["H100"] == pytest.approx(plan(recipe, device="H100").seconds)
    assert plan(recipe, tokens_per_second=1000.0).seconds == pytest.approx(157_286.4)
    assert plan(recipe, tokens_per_second=1000.0, control=True).seconds == pytest.approx(314_572.8)
    assert plan(recipe, device="Some Future GPU").seconds is None


def test_the_plan_itself_needs_no_torch() -> None:
    code = (
        "import sys\nfrom ln_removal.config.recipe import load_recipe\nfrom ln_removal.pipelines.plan import plan\n"
        "plan(load_recipe('gpt2'))\nprint({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    assert run_code(code) == "set()"


def test_a_measured_time_stands_beside_that_of_gpus() -> None:
    taught = recipe_for("gpt2", {"training.distillation": 0.5})
    drawn = plan(taught, tokens_per_second=1000.0, note="measured on a Sunday", control=True)
    assert drawn.seconds == pytest.approx(157_286.4 * 7 / 4), "the control has no teacher"
    assert drawn.seconds_elsewhere == plan(taught, control=True).seconds_elsewhere
    assert "measured on a Sunday" in drawn.assumptions
    output = io.StringIO()
    drawn.render(Console(file=output, width=200))
    assert "about 3.2 days on cpu" in output.getvalue()


SMALL_RUN = {"data.context": 32, "training.tokens_per_step": 256, "training.steps": 300, "training.distillation": 0.5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_time_on_this_cpu_is_that_of_real_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A clock that advances by 1 ms and 1 ms for each token of a forward pass, of the model and of its teacher."""
    clock = SimpleNamespace(now=0.0)
    read: list[tuple[int, ...]] = []
    real = cpu_time._objective

    def pass_of(module: object, given: tuple[torch.Tensor, ...]) -> None:
        read.append(tuple(given[0].shape))
        clock.now += 0.001 + 0.001 * given[0][:, 1:].numel()

    def objective(*arguments: Any) -> Any:
        made = real(*arguments)
        made.register_forward_pre_hook(pass_of)
        assert made.teacher is not None and made.training
        return made

    monkeypatch.setattr(cpu_time, "_objective", objective)
    monkeypatch.setattr(cpu_time, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    recipe = recipe_for(write_config(tmp_path / "m", SMALL), {**SMALL_RUN, "training.precision": precision})
    before = torch.random.get_rng_state()
    drawn = cpu_time.plan_on_cpu(recipe)
    assert torch.equal(torch.random.get_rng_state(), before), "a run that is measured first is the same run"
    assert read == [(1, 33)] * 2 + [(2, 33), (4, 33)] + [(8, 33)] * 2
    assert drawn.seconds == pytest.approx(300 * 0.257)
    assert any("996 tokens/s" in assumption for assumption in drawn.assumptions)
    # With no time for more than two sizes, the time of a micro-batch is a line through them.
    monkeypatch.setattr(cpu_time, "SECONDS_TO_MEASURE", 0.0)
    read.clear()
    assert cpu_time.plan_on_cpu(recipe).seconds == pytest.approx(300 * 0.257)
    assert read == [(1, 33)] * 2 + [(2, 33)]


def test_what_does_not_fit_into_the_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "available_memory", lambda: 10**9)
    monkeypatch.setattr(cpu_time, "build_model", None)
    drawn = cpu_time.plan_on_cpu(load_recipe("gpt2-xl"))
    assert drawn.seconds is None and "H100" in drawn.seconds_elsewhere
    assert any("not measured" in assumption and "1.0 GB" in assumption for assumption in drawn.assumptions)


def test_the_memory_of_this_machine_is_known() -> None:
    assert 10**8 < cpu_time.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("tokens_per_second", "said"),
    [(500.0, "3.6 days"), (5000.0, ""), (None, "")],
    ids=["days", "hours", "not measured"],
)
def test_only_a_run_of_days_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tokens_per_second: float | None, said: str
) -> None:
    monkeypatch.setattr(cpu_time, "measure", lambda *_: cpu_time.Speed(tokens_per_second, "a note"))
    context = run_context("nowhere", device="cpu")
    recipe = load_recipe("gpt2-fast")
    cpu_time.warn_of_days(context, recipe)
    assert (said in caplog.text and "--steps" in caplog.text) if said else not caplog.text
    caplog.clear()
    cpu_time.warn_of_days(replace(context, resume=True), recipe)
    assert not caplog.text


def test_a_small_run_is_not_measured_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_time, "measure", None)
    context = run_context("nowhere", device="cpu")
    cpu_time.warn_of_days(context, load_recipe("tiny"), control=True)
    cpu_time.warn_of_days(context, load_recipe("tiny-gpt2"))
    assert not caplog.text


def test_automatic_micro_batch() -> None:
    recipe = load_recipe("gpt2-medium")
    shape = estimate.KNOWN_ARCHITECTURES["gpt2-medium"]
    assert plan(recipe).micro_batch == 4, "4,096 tokens on a CPU"
    on_gpu = plan(recipe, device="NVIDIA GeForce RTX 4090")
    assert 512 % on_gpu.micro_batch == 0
    assert on_gpu.memory.total <= 0.9 * 24e9 < estimate_memory(recipe, shape, 2 * on_gpu.micro_batch).total
    assert plan(recipe_for("gpt2", {"training.micro_batch": 16})).micro_batch == 16
    assert plan(recipe_for("gpt2", {"training.micro_batch": 16}), processes=64).micro_batch == 8
    with pytest.raises(UserError, match="3 processes"):
        plan(recipe, processes=3)


def test_a_model_that_does_not_fit_is_said_so() -> None:
    drawn = plan(load_recipe("gpt2-xl"), device="RTX 3090")
    assert any("does not fit into the 24.0 GB of RTX 3090" in assumption for assumption in drawn.assumptions)


def test_other_models_are_read_from_their_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_config(tmp_path / "mine", SMALL)
    recipe = recipe_for(folder, {"data.context": 32})
    assert architecture_of(recipe) == SMALL
    # A directory of a published model's name is what loading would take, so planning takes it too.
    write_config(tmp_path / "gpt2", SMALL)
    monkeypatch.chdir(tmp_path)
    assert architecture_of(recipe_for("gpt2")) == SMALL


def test_models_that_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        plan(recipe_for(str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"opt; this kind of model can only be scored: .* GPT-2, GPT-NeoX"):
        plan(recipe_for(write_config(tmp_path / "other", SMALL, model_type="opt", architectures=["OPTForCausalLM"])))
    with pytest.raises(UserError, match="32"):
        plan(recipe_for(write_config(tmp_path / "short", SMALL)))


def test_an_impossible_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="last step"):
        plan(load_recipe("gpt2-apollo", {"training.steps": 500}))


def test_json_is_plain_and_complete() -> None:
    drawn = plan(load_recipe("gpt2-fast")).to_json()
    assert json.loads(json.dumps(drawn)) == drawn
    assert {"recipe", "schedule", "tokens", "steps", "parameters", "memory_bytes", "seconds", "assumptions"} <= set(
        drawn
    )
    schedule = drawn["schedule"]
    assert isinstance(schedule, list)
    assert {"site": "ln_1_v.7", "step": 89, "action": "freeze", "taper": 0, "tokens": 89 * 524_288} in schedule
    assert (drawn["steps"], drawn["seconds"]) == (300, None)
    assert drawn["memory_bytes"] == sum(drawn["memory"].values())  # type: ignore[attr-defined]


def test_pretraining_plans_have_no_schedule() -> None:
    recipe = load_recipe("gpt2-fast")
    pretraining = Recipe.model_validate(
        dict(recipe) | {"schedule": None, "architecture": estimate.KNOWN_ARCHITECTURES["gpt2"]}
    )
    drawn = plan(pretraining)
    assert drawn.schedule is None
    assert drawn.to_json()["schedule"] == []
    drawn.render(Console(file=io.StringIO()))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_render_shows_recipe_schedule_timeline_and_estimates(width: int) -> None:
    output = io.StringIO()
    plan(load_recipe("gpt2-fast"), device="H100", control=True).render(Console(file=output, width=width))
    text = output.getvalue()
    for part in ("ln_2_gap = 2", "steps = 300", "timeline", "157,286,400", "124,439,808", "about 15 min", "30% of"):
        assert part in " ".join(text.split()), part
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["7"])
    assert row == ["7", "34", "58", "89"]


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    name = "my [v2] [red]table[/][:key:]"
    directory = write_config(tmp_path / "models [v2] :key:", SMALL)
    recipe = recipe_for(directory, {"name": name, "data.context": 32})
    base = "\n".join(f"{key} = {value}" for key, value in SMALL.model_dump().items() if type(value) is int)
    (tmp_path / "base.toml").write_text(
        f'model = "m"\n[data]\ncorpus = "c"\ncontext = 32\n[architecture]\n{base}\n[training]\nsteps = 9\n'
        "tokens_per_step = 64\nwarmup_steps = 1\nlearning_rate = 1e-3\n"
    )
    grid = f'name = "{name}"\nbase = "base"\nseeds = [0]\nbaseline = "{name}"\n[[arms]]\nname = "{name}"\n'
    (tmp_path / "grid.toml").write_text(f'description = "{name}"\n{grid}')
    for drawn, shown in (
        (plan(recipe), [f"recipe {name}", f"{directory}: 3 layers"]),
        (plan_sweep(load_sweep(str(tmp_path / "grid.toml"))), [f"grid {name}: 1 arms", f"{name}\n", f"{name} (base"]),
    ):
        output = io.StringIO()
        drawn.render(Console(file=output, width=400))
        assert [part for part in shown if part not in output.getvalue()] == []
