"""What is exported of each family: saved, stock form and back, with its code, in TransformerLens and nnsight, with a card."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import done, refused
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_families import EOT, VARIANTS, VOCABULARY, kept, small_model, small_tokens
from small_model import Adapter
from test_export_with_code import run_without_us
from test_families import all_frozen, every_variant, logits
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ln_removal import UserError, from_disarmed, to_bridge, to_stock
from ln_removal.config.recipe import dump_toml, load_recipe
from ln_removal.export.convert import check_conversion, has_disarmed_norms
from ln_removal.export.hub import HubTarget
from ln_removal.export.stock import EPSILON
from ln_removal.export.verify import norm_modules
from ln_removal.models.families import FAMILIES, family_of
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import fold, install
from ln_removal.pipelines.publishing import export_files, run_files
from ln_removal.report.model_card import converted_model_card, model_card, write_model_card
from ln_removal.training.checkpoint import TrainerState, save_checkpoint

OF_FAMILY = {VARIANTS[variant][0]: variant for variant in reversed(VARIANTS)}
"""One variant of each family."""

every_family = pytest.mark.parametrize("variant", OF_FAMILY.values())
every_stock_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "qwen3"])
every_stock_family = pytest.mark.parametrize("variant", [name for name in OF_FAMILY.values() if name != "qwen3"])
"""Those that have a stock form."""

TOKENS = small_tokens(seed=2)


@cache
def _built(variant: str) -> PreTrainedModel:
    frozen, _ = all_frozen(variant)
    return from_folded(frozen.config, fold(frozen), frozen.generation_config)


def ln_free(variant: str) -> PreTrainedModel:
    return copy.deepcopy(_built(variant))


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def write_words(directory: Path) -> None:
    """A tokenizer with a word for each token of the small models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<|endoftext|>": EOT}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    write_words(directory)
    return directory


def write_run(variant: str, run: Path) -> PreTrainedModel:
    """A run that stopped before its export: its recipe, the model that it began with, a checkpoint of the frozen model returned."""
    (run / "state").mkdir(parents=True)
    original = save(small_model(variant), run.parent / "original")
    frozen, _ = all_frozen(variant)
    save_checkpoint(run / "state", TrainerState(step=3), frozen, [], keep=1)
    (run / "recipe.toml").write_text(
        dump_toml(load_recipe("gpt2", {"model": str(original), "schedule.keep": list(kept(frozen))})), encoding="utf-8"
    )
    return frozen


class TestStock:
    @every_stock_variant
    def test_it_is_the_class_of_transformers_and_comes_back(self, variant: str, tmp_path: Path) -> None:
        model = ln_free(variant)
        family, before = family_of(model.config), {name: value.clone() for name, value in model.state_dict().items()}
        stock = to_stock(model)
        assert type(stock).__name__ == family.model_class and type(stock).__module__.startswith("transformers.models.")
        assert getattr(stock.config, family.epsilon) == EPSILON
        stock.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(stock) and not report["missing_keys"] and not report["unexpected_keys"]
        assert relative_error(logits(loaded, TOKENS), logits(model, TOKENS)) < 1e-5
        assert has_disarmed_norms(loaded) and not norm_modules(model)
        back = from_disarmed(loaded)
        assert type(back) is type(model) and check_conversion(loaded, back, TOKENS) < 1e-5
        assert relative_error(logits(back, TOKENS), logits(model, TOKENS)) < 1e-5
        assert set(back.state_dict()) == set(before)
        for name, value in before.items():
            assert relative_error(back.state_dict()[name], value) < 1e-4, name
            assert torch.equal(model.state_dict()[name], value), name

    @every_stock_family
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_in_half_precision(self, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
        """No worse than the model without norms; in float16 not behind an RMSNorm, which is why that export is refused."""
        model = ln_free(variant)
        expected = logits(copy.deepcopy(model).double(), TOKENS)
        errors = []
        for form in (model, to_stock(model)):
            form.save_pretrained(tmp_path / type(form).__name__)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / type(form).__name__, dtype=dtype)
            errors.append(relative_error(logits(loaded, TOKENS), expected))
        if dtype == torch.float16 and not family_of(model.config).centred:
            assert errors[0] < 0.01 < 0.05 < errors[1]
        else:
            assert errors[1] < 3 * errors[0] < 0.2

    @every_stock_family
    def test_norms_that_are_only_half_disarmed_are_refused(self, variant: str) -> None:
        stock = to_stock(ln_free(variant))
        family = family_of(stock.config)
        with torch.no_grad():
            stock.get_submodule(family.norms(2)["ln_2.1"]).get_parameter("weight").fill_(1)
        with pytest.raises(UserError, match=f"1 of its 5 {family.norm_name}s"):
            from_disarmed(stock)
        original = small_model(variant)
        setattr(original.config, family.epsilon, EPSILON)
        with pytest.raises(UserError, match=f"if the model has its {family.norm_name}s"):
            from_disarmed(original)


def test_norms_that_stay_leave_no_stock_form() -> None:
    model = ln_free("qwen3")
    with pytest.raises(UserError, match=r"no stock form.*qk-norms"):
        to_stock(model)
    kept = [name for name, module in model.named_modules() if type(module).__name__ == "Qwen3RMSNorm"]
    assert kept == family_of(model.config).kept_norms(2) and len(kept) == 4


class TestCommand:
    @every_family
    def test_a_run_that_stopped_before_its_export(self, variant: str, tmp_path: Path) -> None:
        run = tmp_path / "run"
        frozen = write_run(variant, run)
        forms = ("normfree", "stock") if variant != "qwen3" else ("normfree",)
        for form in forms:
            said = done("ln-export", run, "--format", form, "--out", tmp_path / form).stdout
            assert "largest relative difference" in said
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / form)
            assert relative_error(logits(loaded, TOKENS), logits(frozen, TOKENS)) < 1e-5
        assert not norm_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "normfree"))
        # and from there on, as from a published model
        done("ln-export", tmp_path / forms[-1], "--dtype", "bfloat16", "--out", tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert type(again).__name__.startswith("NormFree")
        assert relative_error(logits(again, TOKENS), logits(frozen, TOKENS)) < 0.2

    @every_family
    def test_what_is_refused(self, variant: str, tmp_path: Path) -> None:
        free, original = save(ln_free(variant), tmp_path / "free"), save(small_model(variant), tmp_path / "original")
        family, out = family_of(small_model(variant).config), tmp_path / "out"
        assert f"its {family.norm_name}s" in refused("ln-export", original, "--out", out)
        if family.model_type != "gpt2":
            assert f"a {family.title}" in refused("ln-export", free, "--split-qkv", "--out", out)
        if not family.centred:
            said = refused("ln-export", free, "--format", "stock", "--dtype", "float16", "--out", out)
            assert ("float16" in said and "bfloat16" in said) or (family.kept and "qk-norms" in said)
        assert not out.exists()

    def test_with_code_it_loads_in_a_process_without_us(self, tmp_path: Path) -> None:
        expected = {}
        for number, (name, variant) in enumerate(OF_FAMILY.items()):
            model = ln_free(variant)
            source = save(model, tmp_path / f"source-{number}")
            done("ln-export", source, "--with-code", "--out", tmp_path / name)
            assert [path.name for path in (tmp_path / name).glob("*.py")] == [
                "modeling_normfree_gpt2.py" if name == "GPT2" else "modeling_normfree_rotary.py"
            ]
            generated = model.generate(TOKENS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
            expected[name] = (logits(model, TOKENS), generated)
        done("ln-export", tmp_path / "Llama", "--out", tmp_path / "plain")
        assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        save_file({"ids": TOKENS}, tmp_path / "ids.safetensors")
        code = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids = load_file("ids.safetensors")["ids"]
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    print(name, type(model).__name__, type(model).__module__.split(".")[0])
    generated = model.generate(ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    save_file({"logits": model(ids).logits.detach(), "generated": generated}, name + ".safetensors")
"""
        ended = run_without_us(code, tmp_path, *OF_FAMILY)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines() == [
            f"{name} NormFree{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'} transformers_modules"
            for name in OF_FAMILY
        ]
        for name, (all_logits, generated) in expected.items():
            found = load_file(tmp_path / f"{name}.safetensors")
            assert relative_error(found["logits"], all_logits) < 1e-5, name
            assert torch.equal(found["generated"], generated), name


class TestTransformerLens:
    @every_variant
    def test_components_sum_to_the_logits(self, variant: str) -> None:
        model = ln_free(variant)
        bridge = to_bridge(model)
        with torch.no_grad():
            found, cache = bridge.run_with_cache(TOKENS)
            assert relative_error(found, logits(model, TOKENS)) < 1e-5
            total = cache.get_full_resid_decomposition(expand_neurons=False).sum(0)
            assert relative_error(total @ bridge.W_U + bridge.b_U, found) < 1e-5
        assert bridge.cfg.normalization_type is None
        assert bool(bridge.b_U.abs().max() > 0) == family_of(model.config).centred

    @every_variant
    def test_hooks_see_the_residual_stream(self, variant: str) -> None:
        """And with norms the same hooks are there, and the model's own logits."""
        model, original = ln_free(variant), small_model(variant)
        with torch.no_grad():
            hidden = model(TOKENS, output_hidden_states=True).hidden_states
            _, cache = to_bridge(model).run_with_cache(TOKENS)
            found, with_norms = to_bridge(original).run_with_cache(TOKENS)
        for layer in range(2):
            resid = cache[f"blocks.{layer}.hook_resid_pre"]
            assert relative_error(resid, hidden[layer]) < 1e-5
            assert torch.equal(cache[f"blocks.{layer}.ln1.hook_out"], resid)
            read = (
                resid
                if model.config.to_dict().get("use_parallel_residual")
                else cache[f"blocks.{layer}.hook_resid_mid"]
            )
            assert torch.equal(cache[f"blocks.{layer}.ln2.hook_out"], read)
        assert relative_error(cache["ln_final.hook_out"], hidden[2]) < 1e-5
        assert relative_error(found, logits(original, TOKENS)) < 1e-5
        assert set(with_norms.keys()) >= set(cache.keys())

    @every_stock_family
    def test_booted_from_a_directory_and_from_the_stock_form(self, variant: str, tmp_path: Path) -> None:
        model = ln_free(variant)
        bridge = TransformerBridge.boot_transformers(str(save(model, tmp_path)), device="cpu")
        assert relative_error(bridge(TOKENS), logits(model, TOKENS)) < 1e-5
        assert bridge.cfg.normalization_type is None
        assert relative_error(to_bridge(to_stock(model))(TOKENS), logits(model, TOKENS)) < 1e-5

    @every_family
    def test_other_models_are_refused(self, variant: str) -> None:
        model, original = ln_free(variant), small_model(variant)
        odd = type("Other", (type(original),), {})(original.config)
        with pytest.raises(UserError, match="Other"):
            to_bridge(odd)
        family = family_of(model.config)
        path = f"{family.block(0)}.{family.mlp[0]}"
        model.set_submodule(path, Adapter(model.get_submodule(path)))
        with pytest.raises(UserError, match="merge"):
            to_bridge(model)
        install(original, eot_token_id=EOT, keep=kept(original))
        with pytest.raises(UserError, match="freezable"):
            to_bridge(original)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("words")
    write_words(directory)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer


# 0.8 renames it to TransformersModel; users know it by the old name, which goes on working.
@pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")
@every_family
def test_nnsight_traces_and_edits_it(variant: str, words: PreTrainedTokenizerBase) -> None:
    nnsight = pytest.importorskip("nnsight")
    model = ln_free(variant)
    family = family_of(model.config)
    with torch.no_grad():
        expected = model(TOKENS, output_hidden_states=True)
    traced = nnsight.LanguageModel(model, tokenizer=words)
    body = getattr(traced, family.body)
    with torch.no_grad(), traced.trace(TOKENS):
        entering = getattr(body, family.blocks)[1].input.save()
        final = getattr(body, family.final_norm).output.save()
        found = traced.lm_head.output.save()
    torch.testing.assert_close(entering, expected.hidden_states[1])
    torch.testing.assert_close(final, expected.hidden_states[-1])
    torch.testing.assert_close(found, expected.logits)
    with torch.no_grad(), traced.trace(TOKENS):
        written = getattr(body, family.blocks)[-1].mlp.output.save()
    with torch.no_grad(), traced.trace(TOKENS):
        getattr(body, family.blocks)[-1].mlp.output[:] = 0
        without = traced.lm_head.output.save()
    # exactly what it wrote, since no norm reads it
    assert relative_error(found - without, written @ model.lm_head.weight.T) < 1e-4


@pytest.mark.parametrize(
    "command",
    "dla paths circuits patching attention residual neurons lens behaviour paper".split(),
)
def test_analyses_of_gpt2_say_so(command: str, llama_run: Path) -> None:
    assert "is a Llama" in refused("ln-analyze", command, llama_run)


def test_attention_entropy_of_any_family(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 90}" for number in range(200)), encoding="utf-8")
    places = [save(ln_free(variant), tmp_path / name) for name, variant in OF_FAMILY.items() if name != "GPT2"]
    said = done("ln-analyze", "entropy", *places, "--text", text, "--out", tmp_path / "figures", "--json").stdout
    assert len(json.loads(said)["runs"]) == len(places)


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("llama") / "run"
    write_run("llama", run)
    save(ln_free("llama"), run / "model")
    return run


class TestCard:
    @every_family
    def test_it_names_class_norm_and_family(self, variant: str, tmp_path: Path) -> None:
        model = save(ln_free(variant), tmp_path)
        family = family_of(_built(variant).config)
        write_model_card(model, load_recipe("gpt2", {"model": "owner/original"}), None)
        card = ModelCard.load(model / "README.md")
        assert card.data.model_name == f"original without {family.norm_name}"
        assert card.data.tags[:2] == [family.model_type, f"{family.norm_name.lower()}-free"]
        assert f"{family.model_class}.from_pretrained" in card.text
        assert ("GPT2" in card.text, "LayerNorm" in card.text) == (family.model_type == "gpt2", family.centred)
        assert ("Load it in float32 or bfloat16" in card.text) == (not family.centred)

    def test_what_is_published_has_one(self, llama_run: Path) -> None:
        target = HubTarget("alice/free")
        for files in (run_files(llama_run, target), export_files(llama_run / "model", "x/y", target, form="normfree")):
            card = files["README.md"]
            assert isinstance(card, bytes)
            assert b"without LayerNorm" not in card and b"GPT2LMHeadModel" not in card and b"LlamaForCausalLM" in card

    def test_other_cards(self) -> None:
        for family in FAMILIES.values():
            stock = ModelCard(model_card(load_recipe("gpt2"), None, family=family, form="stock", repo_id="alice/free"))
            assert f'{family.model_class}.from_pretrained("alice/free")' in stock.text
            converted = ModelCard(converted_model_card("alice/free", family=family)).text
            assert f"a {family.title} that needs no {family.norm_name}" in converted
