"""The commands with models of each family: plans, pretraining, removals from recipe to report, scores of any causal model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import Commands
from safetensors.torch import load_file
from small_families import VARIANTS, kept, small_model
from small_model import write_corpus, write_tokenizer

from ln_removal.config.estimate import KNOWN_ARCHITECTURES, count_parameters
from ln_removal.config.presets import default_recipe, is_borrowed
from ln_removal.config.recipe import ArchitectureSpec, load_recipe
from ln_removal.errors import UserError
from ln_removal.models.checks import begins_texts, first_token
from ln_removal.models.families import family_of
from ln_removal.models.loading import load_model, load_tokenizer, trainable_positions
from ln_removal.models.norm_choice import build_model
from ln_removal.norms.freezable import FIRST, PositionClasses
from ln_removal.norms.schedule import expand
from ln_removal.norms.surgery import install
from ln_removal.pipelines import cpu_time
from ln_removal.pipelines.context import run_context
from ln_removal.pipelines.plan import architecture_of_model, plan, resolve_recipe
from ln_removal.pipelines.removal import prepare, removal_session
from ln_removal.training.loss import Objective
from ln_removal.training.session import sampler_of
from ln_removal.training.setup import checkpoint_activations, training_attention

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 320}

RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("GPTNeoX", {}),
    "llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 24}),
}
"""By a name: the beginning of the classes' names in transformers, and settings."""

SETTINGS = {
    "data.corpus": "texts",
    "data.context": 32,
    "data.validation_tokens": 2048,
    "training.tokens_per_step": 256,
    "training.precision": "float32",
    "training.compile": "false",
    "training.evaluation_tokens": 1024,
    "training.checkpoint_every": 2,
}

REMOVE = ("--recipe", "tiny", "--steps", "6", "--set", "data.weights={}", "--questions", "none", "--device", "cpu")


def removal_of(model: str, out: str, *more: str) -> list[str]:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return ["--model", model, "--out", out, *REMOVE, *sets, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a random model of each family with a tokenizer."""
    directory = tmp_path_factory.mktemp("families")
    write_corpus(directory / "texts", documents=8)
    for name, (family, settings) in RANDOM.items():
        eot = write_tokenizer(directory / name)
        sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": eot, "eos_token_id": eot}
        config = getattr(transformers, f"{family}Config")(**sizes, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module")
def families(place: Path, forked: Commands) -> Commands:
    return forked.at(place)


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_as_transformers_has_them(variant: str, tmp_path: Path) -> None:
    model = small_model(variant)
    model.config.save_pretrained(tmp_path)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(architecture_of_model(tmp_path)) == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("EleutherAI/pythia-70m", 70_426_624),
        ("EleutherAI/pythia-160m", 162_322_944),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ],
)
def test_published_sizes_are_planned_without_a_hub(name: str, parameters: int) -> None:
    drawn = plan(resolve_recipe(model=name))
    assert drawn.parameters == parameters
    with torch.device("meta"):
        model = build_model(KNOWN_ARCHITECTURES[name], eot_token_id=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert drawn.schedule is not None and drawn.schedule.n_layer == model.config.num_hidden_layers


def test_what_is_built_for_a_measurement_has_the_size_of_the_model(place: Path) -> None:
    for name in RANDOM:
        shape = architecture_of_model(place / name)
        expected = sum(tensor.numel() for tensor in load_file(place / name / "model.safetensors").values())
        assert count_parameters(shape) == expected, name
        built = build_model(shape, eot_token_id=0)
        assert sum(parameter.numel() for parameter in built.parameters()) == expected, name


def test_a_plan_measures_the_family_that_it_is_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "SECONDS_TO_MEASURE", 0.0)
    changes = {"data.context": 32, "data.corpus": "texts", "training.tokens_per_step": 256, "data.weights": {}}
    recipe = load_recipe("tiny", {"model": str(place / "llama"), **changes})
    drawn = cpu_time.plan_on_cpu(recipe, control=True)
    assert drawn.seconds is not None and drawn.seconds > 0
    assert (drawn.architecture.family, drawn.architecture.n_kv_head) == ("llama", 1)


@pytest.mark.parametrize(
    ("family", "n_layer", "base"), [("pythia", 12, "gpt2"), ("llama", 30, "gated"), ("qwen2", 24, "gated")]
)
def test_a_model_of_another_family_gets_a_recipe_that_says_where_it_is_from(
    family: str, n_layer: int, base: str
) -> None:
    shape = ArchitectureSpec.model_validate({**SHAPE, "family": family, "n_layer": n_layer, "n_positions": 2048})
    recipe = default_recipe("owner/gpt2", shape)
    assert recipe.name == base and recipe.schedule is not None
    assert f"{n_layer} layers of owner/gpt2" in recipe.description and "written for" in recipe.description
    assert is_borrowed(default_recipe("owner/mine", shape)) and not is_borrowed(load_recipe(base))
    expand(recipe.schedule, n_layer, recipe.training.steps)


def test_a_model_with_gated_mlps_has_its_massive_activations_shrunk_before_anything_freezes() -> None:
    shape = ArchitectureSpec.model_validate({**SHAPE, "family": "llama", "n_layer": 30, "n_positions": 2048})
    recipe = default_recipe("HuggingFaceTB/SmolLM2-135M", shape)
    assert recipe.description == load_recipe("gated").description
    schedule = expand(recipe.schedule, 30, recipe.training.steps)  # type: ignore[arg-type]
    assert schedule.stage(99) == "real" and set(schedule.freeze_values(100).values()) == {1 / 250}
    assert schedule.special_values(100) == {"eot": 1.0, "first": 1.0}, "one constant for all positions"
    assert schedule.cap == 1.4 and schedule.complete_at == 100 + 249 + 250 + 149 < recipe.training.steps


def test_a_context_beyond_the_sliding_window_is_refused(place: Path, tmp_path: Path) -> None:
    """The attention of a training has no window, so up to its length the model's own must have none either."""
    settings = json.loads((place / "mistral" / "config.json").read_text())
    assert trainable_positions(transformers.MistralConfig(**settings)) == 64
    narrow = transformers.MistralConfig(**{**settings, "sliding_window": 16})
    narrow.save_pretrained(tmp_path)
    assert trainable_positions(narrow) == architecture_of_model(tmp_path).n_positions == 16
    with pytest.raises(UserError, match="16"):
        plan(load_recipe("tiny", {"model": str(tmp_path), "data.context": 32}))
    for active, expected in ((False, 64), (True, 16)):
        config = transformers.Qwen2Config(
            max_position_embeddings=64, use_sliding_window=active, sliding_window=16, max_window_layers=0
        )
        assert trainable_positions(config) == expected


# --------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_choices_of_norms_and_activations_are_for_gpt2_and_pythia(family: str) -> None:
    own = load_recipe("tiny-gpt2", {"architecture.family": family}).architecture
    assert own is not None and own.is_plain
    assert (own.block_norm, own.final_norm, own.activation, own.width_of_mlp) == ("rmsnorm", "rmsnorm", "silu", 512)
    for key, value in (("block_norm", "none"), ("biases", "paper"), ("activation", "relu"), ("slopes", "network")):
        with pytest.raises(UserError, match=f"architecture.{key}: .*'gpt2' and 'pythia'"):
            load_recipe("tiny-gpt2", {"architecture.family": family, f"architecture.{key}": value})
    for key, value in (
        ("residual_gain", "fixed"),
        ("initialisation", "unit"),
        ("qk_norm", True),
        ("attention_scale", "1/k"),
    ):
        with pytest.raises(UserError, match=f"architecture.{key}: .*'gpt2' only"):
            load_recipe("tiny-gpt2", {"architecture.family": family, f"architecture.{key}": value})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"n_kv_head": 1}, "n_kv_head: 'gpt2'"),
        ({"block_norm": "rmsnorm"}, "block_norm: 'gpt2' has no 'rmsnorm'"),
        ({"family": "llama", "n_kv_head": 2}, "n_kv_head: must divide n_head"),
        ({"family": "llama", "n_head": 64}, "must be even"),
        ({"family": "qwen2", "mlp_bias": True}, "mlp_bias: 'qwen2'"),
    ],
)
def test_sizes_that_no_model_can_have(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load_recipe("tiny-gpt2", {f"architecture.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "qwen2", "qwen3"])
def test_what_is_built_has_the_counted_parameters_and_reads(family: str) -> None:
    shape = ArchitectureSpec(**SHAPE, family=family)  # type: ignore[arg-type]
    model = build_model(shape, eot_token_id=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(shape)
    assert model(torch.zeros(1, 5, dtype=torch.int64)).logits.shape == (1, 5, 320)


def test_a_llama_is_built_as_transformers_has_it() -> None:
    model = build_model(ArchitectureSpec(**SHAPE, family="llama", n_kv_head=1, tied=True), eot_token_id=3)
    assert type(model) is transformers.LlamaForCausalLM
    assert (model.config.intermediate_size, model.config.num_key_value_heads, model.config.hidden_act) == (
        96,
        1,
        "silu",
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.eos_token_id == 3


@pytest.mark.slow
def test_pretrained_then_removed(place: Path, families: Commands) -> None:
    sets = [f"architecture.{key}={value}" for key, value in {**SHAPE, "family": "llama", "n_kv_head": 1}.items()]
    sets += [f"{key}={value}" for key, value in SETTINGS.items() if "export" not in key]
    sets += ["data.tokenizer=llama", "data.weights={}", "training.micro_batch=auto", "export.dtype=float32"]
    options = [part for each in sets for part in ("--set", each)]
    families.run("ln-pretrain", "--recipe", "tiny-gpt2", "--steps", "4", "--out", "pretrained", *options)
    card = (place / "pretrained" / "model" / "README.md").read_text()
    assert "RMSNorm" in card and "Llama" in card
    families.run("ln-remove", *removal_of("pretrained/model", "from-scratch"))
    assert load_model(place / "from-scratch" / "model").model.config.model_type == "normfree_llama"


# ------------------------------------------------------------------------------------------------------------- removals


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_a_removal_from_recipe_to_report(name: str, place: Path, families: Commands) -> None:
    windows = "document" if name == "qwen2" else "stream"
    more = ["--keep", "qk-norms", "--set", 'export.formats=["normfree"]'] if name == "qwen3" else []
    families.run("ln-remove", *removal_of(name, f"{name}-run", "--control", "--set", f"data.windows={windows}", *more))
    run = place / f"{name}-run"
    found = json.loads((run / "results.json").read_text())
    assert set(found["cross_entropy"]) == {"original", "control", "ln_free"}
    assert abs(found["gap"]) < 1
    assert (run / "report.html").is_file() and (run / "model" / "README.md").is_file()
    model = load_model(run / "model").model
    assert type(model).__name__.startswith("NormFree")
    norms = [path for path, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    assert all(path.endswith(("q_norm", "k_norm")) for path in norms) and bool(norms) == (name == "qwen3")
    assert set(found["residual_std"]) == {"original", "control", "ln_free"}
    families.run("ln-evaluate", f"{name}-run", "--device", "cpu", "--out", "again.json")
    again = json.loads((place / "again.json").read_text())["cross_entropy"]
    assert again == pytest.approx(found["cross_entropy"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_removal_of_a_llama_ends_where_it_would_have(place: Path, families: Commands) -> None:
    families.run("ln-remove", *removal_of("llama", "whole"))
    started = families.start("ln-remove", *removal_of("llama", "killed"))
    started.wait_until(lambda: (place / "killed" / "state" / "step-000004").exists()).send(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    families.run("ln-remove", "--resume", *removal_of("llama", "killed"))
    one, other = (load_file(place / run / "model" / "model.safetensors") for run in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RANDOM)
def test_a_step_depends_on_weights_and_batch_alone(name: str, place: Path) -> None:
    """Without dropout, of which the attention of these families makes its own, and the same with activations recomputed."""
    settings = json.loads((place / name / "config.json").read_text())
    config = transformers.AutoConfig.for_model(**{**settings, "attention_dropout": 0.5, "hidden_dropout": 0.5})
    tokens = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([[0] * 20 + [20] * 13, [0] * 33])

    def gradients(*, recomputed: bool) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config)
        install(model, eot_token_id=0, keep=kept(model))
        objective = Objective(model, eot_token_id=0).train()
        with training_attention(model, context=32):
            if recomputed:
                checkpoint_activations(model)
            objective(tokens, starts).total.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    once, again, recomputed = (gradients(recomputed=how) for how in (False, False, True))
    assert len(once) == len(recomputed) > 0
    torch.testing.assert_close(again, once, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, once)


def test_what_is_ln_free_already_is_said_so(place: Path, tmp_path: Path) -> None:
    from ln_removal.models.norm_free import norm_free_config

    config = norm_free_config(transformers.LlamaConfig.from_pretrained(place / "llama"))
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(place / "llama").save_pretrained(tmp_path)
    recipe = load_recipe("tiny", {"model": str(tmp_path), "data.context": 32})
    with pytest.raises(UserError, match="LN-free already"):
        prepare(run_context(tmp_path / "run", device="cpu", progress=False), recipe)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def adds_bos(directory: Path, *, sentencepiece: bool) -> Path:
    """A tokenizer that puts a token of its own in front of every text: that of Llama 3 (byte-level), or of Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet: list[str] = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f"def function_{n}(value):\n    return value * {n}\n" for n in range(40)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    saved.save_pretrained(directory)
    if sentencepiece:  # transformers would build a tokenizer of this class anew, with parts of its own
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["Llama 3", "Llama 2"])
def test_a_token_in_front_of_texts_gets_into_no_corpus_and_shares_the_class_of_position_0(
    sentencepiece: bool, place: Path, tmp_path: Path, families: Commands
) -> None:
    from ln_removal.data.tokens import TokenDataset

    tokenizer = load_tokenizer(adds_bos(tmp_path / "model", sentencepiece=sentencepiece))
    assert tokenizer("def f")["input_ids"][0] == 1 == begins_texts(tokenizer)
    said = families.run(
        "ln-prepare", "texts", "--tokenizer", str(tmp_path / "model"), "--out", str(tmp_path / "tokens")
    )
    assert "puts <s> in front" in said
    data = TokenDataset.open(tmp_path / "tokens")
    documents = sorted((place / "texts").iterdir())
    expected = [tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in documents]
    for split in (data.split("train"), data.split("validation")):
        for shard in split.maps:
            tokens = shard.tolist()
            assert 1 not in tokens and tokens[-1] == 2
            assert sum(text in [*_pieces(tokens)] for text in expected) == tokens.count(2)
    # Where a recipe asks for rows that begin as prompts do, it is what they begin with.
    changes = {"data.context": 32, "data.weights": {}, "data.bos_rows": 1.0, "training.tokens_per_step": 256}
    for windows in ("stream", "document"):
        recipe = load_recipe("tiny", {**changes, "data.windows": windows})
        assert (sampler_of(recipe, data, tokenizer).sequences(0, 0, 8)[:, 0] == 1).all()
    config = transformers.LlamaConfig(bos_token_id=1, eos_token_id=2)
    assert first_token(tokenizer, config) == 1
    plain = load_tokenizer(place / "llama")
    assert begins_texts(plain) is None
    # A default of the class that is an ordinary token here, and a special token that config.json names.
    assert first_token(plain, transformers.LlamaConfig(bos_token_id=7)) is None


def _pieces(tokens: list[int]) -> list[list[int]]:
    """The documents of a shard, without the token 2 behind each."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == 2:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


@pytest.mark.slow
def test_a_removal_of_a_model_with_a_token_in_front_knows_it(place: Path, tmp_path: Path) -> None:
    model = adds_bos(tmp_path / "model", sentencepiece=True)
    settings = json.loads((place / "llama" / "config.json").read_text())
    config = transformers.LlamaConfig(**{**settings, "bos_token_id": 1, "eos_token_id": 2})
    with torch.random.fork_rng(devices=[]):
        transformers.LlamaForCausalLM(config).save_pretrained(model)
    changes = {
        "data.corpus": str(place / "texts"),
        "data.context": 32,
        "data.weights": {},
        "training.distillation": 0.0,
    }
    recipe = load_recipe("tiny", {"model": str(model), **changes})
    context = run_context(tmp_path / "run", device="cpu", progress=False)
    with context.claim(recipe):
        inputs = prepare(context, recipe)
        with removal_session(context, recipe, inputs):
            found = [module for module in inputs.model.modules() if isinstance(module, PositionClasses)]
            classes = {id(each): each for each in found}
    assert len(classes) == 1
    (only,) = classes.values()
    only.fill(torch.tensor([[5, 1, 2, 5]]))
    assert only.current.tolist()[0][:2] == [FIRST, FIRST]


def test_the_family_of_every_random_model_is_known(place: Path) -> None:
    for name in RANDOM:
        config = transformers.AutoConfig.from_pretrained(place / name)
        assert family_of(config).model_type == config.model_type
