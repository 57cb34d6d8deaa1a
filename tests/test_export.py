"""The exported forms: saved, loaded again by transformers, generating, and refused when something is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from command_line import done, refused
from safetensors.torch import load_file
from small_model import write_tokenizer
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

import ln_removal
from ln_removal import NormFreeGPT2Config, NormFreeGPT2LMHeadModel, UserError, from_disarmed
from ln_removal.export.stock import EPSILON, to_stock
from ln_removal.export.verify import TOLERANCE, ExportError, logits_error, norm_modules, verify_export
from ln_removal.export.write import check_savable, save_model
from ln_removal.models.loading import load_tokenizer
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import NormSites, fold, install

EOT = 100
Pair = tuple[GPT2LMHeadModel, NormFreeGPT2LMHeadModel]


def freeze_and_fold(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> Pair:
    """A frozen model and its folded form, float32."""
    sites = install(tiny_gpt2, eot_token_id=EOT)
    tiny_gpt2.train()
    with torch.no_grad():
        tiny_gpt2(token_ids, use_cache=False)
    sites.update_running(0.9)
    tiny_gpt2.eval()
    for site in sites.sites:
        sites.set_mix(site, 1)
    sites.set_special("eot", 1)
    sites.set_special("first", 1)
    return tiny_gpt2, from_folded(tiny_gpt2.config, fold(tiny_gpt2))


@pytest.fixture
def pair(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> Pair:
    return freeze_and_fold(tiny_gpt2, token_ids)


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


class TestNormFree:
    def test_reload_through_the_auto_classes(self, pair: Pair, token_ids: Tensor, tmp_path: Path) -> None:
        frozen, folded = pair
        folded.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "normfree_gpt2"
        names = set(load_file(tmp_path / "model.safetensors"))
        assert "lm_head.weight" in names and "lm_head.bias" in names and not [n for n in names if "ln_" in n]
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is NormFreeGPT2Config and config.tie_word_embeddings is False
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is NormFreeGPT2LMHeadModel
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert torch.equal(logits(loaded, token_ids), logits(folded, token_ids))
        assert relative_error(logits(loaded, token_ids), logits(frozen, token_ids)) < 1e-4
        assert norm_modules(loaded) == []

    def test_settings_of_the_original_are_taken_over(self, pair: Pair) -> None:
        frozen, folded = pair
        for name in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "eos_token_id", "resid_pdrop"):
            assert getattr(folded.config, name) == getattr(frozen.config, name), name
        assert not folded.training and not any(p.is_meta for p in folded.parameters())

    def test_settings_for_generation_are_taken_over(self, pair: Pair) -> None:
        frozen, _ = pair
        frozen.generation_config.update(do_sample=True, temperature=0.7)
        folded = from_folded(frozen.config, fold(frozen), frozen.generation_config)
        for model in (folded, to_stock(folded), from_disarmed(to_stock(folded))):
            assert model.generation_config.to_dict() == frozen.generation_config.to_dict()
        folded.generation_config.temperature = 0.8
        assert frozen.generation_config.temperature == 0.7

    def test_it_trains_and_keeps_its_unembedding_apart(self, pair: Pair, token_ids: Tensor) -> None:
        _, folded = pair
        folded.tie_weights()
        assert folded.lm_head.weight is not folded.transformer.wte.weight
        folded(token_ids, labels=token_ids).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in folded.parameters())

    def test_a_state_with_something_missing_is_refused(self, pair: Pair) -> None:
        frozen, _ = pair
        state = fold(frozen)
        del state["lm_head.bias"]
        with pytest.raises(RuntimeError, match=r"lm_head\.bias"):
            from_folded(frozen.config, state)


class TestSplit:
    """Queries, keys and values as linear maps of their own."""

    def test_the_command(self, pair: Pair, token_ids: Tensor, tmp_path: Path) -> None:
        _, folded = pair
        vocabulary = from_folded(folded.config, _with_vocabulary(folded, 320))
        vocabulary.save_pretrained(tmp_path / "model")
        write_tokenizer(tmp_path / "model", entries=320)
        said = done("ln-export", tmp_path / "model", "--split-qkv", "--out", tmp_path / "split").stdout
        assert "largest relative difference" in said
        split = AutoModelForCausalLM.from_pretrained(tmp_path / "split").eval()
        assert all(
            type(getattr(block.attn.c_attn, part)) is nn.Linear for block in split.transformer.h for part in "qkv"
        )
        assert relative_error(logits(split, token_ids), logits(vocabulary, token_ids)) < 1e-6
        names = set(load_file(tmp_path / "split" / "model.safetensors"))
        assert "transformer.h.0.attn.c_attn.k.weight" in names and "transformer.h.0.attn.c_attn.weight" not in names
        bridge = TransformerBridge.boot_transformers(str(tmp_path / "split"), device="cpu")
        assert relative_error(bridge(token_ids).detach(), logits(vocabulary, token_ids)) < 1e-5
        # and back, to the same weights
        done("ln-export", tmp_path / "split", "--out", tmp_path / "joined")
        joined, before = (load_file(tmp_path / name / "model.safetensors") for name in ("joined", "model"))
        assert set(joined) == set(before) and all(torch.equal(joined[name], before[name]) for name in before)
        assert "--split-qkv" in refused(
            "ln-export", tmp_path / "model", "--split-qkv", "--format", "stock", "--out", tmp_path / "no"
        )

    def test_it_goes_where_the_other_goes(self, pair: Pair, token_ids: Tensor) -> None:
        """TransformerLens, generation, training, the stock form."""
        _, folded = pair
        split = from_folded(folded.config, folded.state_dict(), split_qkv=True)
        expected = logits(folded, token_ids)
        assert relative_error(ln_removal.to_bridge(split)(token_ids).detach(), expected) < 1e-5
        assert relative_error(logits(to_stock(split), token_ids), expected) < 1e-4
        prompt = token_ids[:1, :5]
        settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(split.generate(prompt, **settings), folded.generate(prompt, **settings))
        split(token_ids, labels=token_ids).loss.backward()
        assert split.transformer.h[1].attn.c_attn.k.weight.grad.abs().max() > 0
        assert norm_modules(split) == []


def _with_vocabulary(model: NormFreeGPT2LMHeadModel, entries: int) -> dict[str, Tensor]:
    """Its state with zeros for further tokens."""
    model.config.vocab_size = entries
    grown = {}
    for name, value in model.state_dict().items():
        missing = entries - len(value) if name.endswith("wte.weight") or name.startswith("lm_head") else 0
        grown[name] = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return grown


class TestStock:
    def test_loads_in_plain_transformers(self, pair: Pair, token_ids: Tensor, tmp_path: Path) -> None:
        frozen, folded = pair
        to_stock(folded).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
        assert config["layer_norm_epsilon"] == EPSILON and config["tie_word_embeddings"] is False
        assert config["n_ctx"] == config["n_positions"]  # HookedTransformer reads it
        loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is GPT2LMHeadModel
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert relative_error(logits(loaded, token_ids), logits(frozen, token_ids)) < 1e-5
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel

    @pytest.mark.parametrize("size", [0.0, 0.1, 100.0])
    def test_logit_bias_of_any_size(self, pair: Pair, token_ids: Tensor, size: float) -> None:
        _, folded = pair
        with torch.no_grad():
            folded.lm_head.bias.copy_(size * torch.randn(101, generator=torch.Generator().manual_seed(0)))
        expected = logits(folded, token_ids)
        assert relative_error(logits(to_stock(folded), token_ids), expected) < 1e-5
        half = logits(to_stock(folded).half(), token_ids)
        assert relative_error(half, expected) < 0.01

    def test_a_model_trained_without_norms_has_no_stock_form(self) -> None:
        config = NormFreeGPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, bos_token_id=1, eos_token_id=1)
        with pytest.raises(UserError, match="--format normfree"):
            to_stock(NormFreeGPT2LMHeadModel(config))

    def test_a_model_trained_after_its_fold_is_not_said_to_have_been_trained_without_norms(self, pair: Pair) -> None:
        """As by a LoRA adapter of rank 1 that was merged."""
        folded = copy.deepcopy(pair[1])
        weight = folded.transformer.h[0].mlp.c_fc.weight
        with torch.no_grad():
            weight += 0.2 * torch.ones(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
        with pytest.raises(UserError, match=r"trained further after its norms were folded.*LoRA.*--format normfree"):
            to_stock(folded)

    def test_a_folded_model_rounded_to_bfloat16_has_one(self, pair: Pair, token_ids: Tensor) -> None:
        _, folded = pair
        rounded = copy.deepcopy(folded).to(torch.bfloat16).float()
        assert relative_error(logits(to_stock(rounded), token_ids), logits(rounded, token_ids)) < 1e-3

    def test_the_folded_model_is_left_alone(self, pair: Pair) -> None:
        _, folded = pair
        before = copy.deepcopy(folded.state_dict())
        stock = to_stock(folded)
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.zero_()
        for name, value in folded.state_dict().items():
            assert torch.equal(value, before[name]), name


class TestVerify:
    def test_a_good_export(self, pair: Pair, token_ids: Tensor) -> None:
        frozen, folded = pair
        report = verify_export(frozen, folded, token_ids)
        assert 0 <= report.max_relative_error < 1e-5 and report.no_norm_modules and report.affine_error < 1e-5
        assert logits_error(frozen, to_stock(folded), token_ids) < 1e-5

    def test_modes_and_precision_are_put_back(self, pair: Pair, token_ids: Tensor) -> None:
        frozen, folded = pair
        frozen.train()
        torch.set_float32_matmul_precision("high")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                # Autocast of the caller must not reach the comparison.
                assert verify_export(frozen, folded, token_ids).max_relative_error < 1e-5
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert frozen.training and not folded.training
        assert not [m for m in folded.modules() if m._forward_pre_hooks]

    def test_a_norm_left(self, pair: Pair, token_ids: Tensor) -> None:
        frozen, folded = pair
        folded.transformer.h[1].ln_2 = nn.LayerNorm(32)
        with pytest.raises(ExportError, match=r"transformer\.h\.1\.ln_2"):
            verify_export(frozen, folded, token_ids)
        with pytest.raises(UserError, match="norm"):
            verify_export(frozen, frozen, token_ids)  # freezable norms count, frozen or not

    def test_a_site_that_is_not_frozen(self, pair: Pair, token_ids: Tensor) -> None:
        frozen, folded = pair
        NormSites.of(frozen).set_mix("ln_2.2", 0)
        with pytest.raises(ExportError, match="logits differ"):
            verify_export(frozen, folded, token_ids)

    @pytest.mark.parametrize(
        "name", ["transformer.h.0.attn.c_attn.bias", "transformer.h.2.mlp.c_fc.weight", "lm_head.bias"]
    )
    def test_a_wrong_fold(self, pair: Pair, token_ids: Tensor, name: str) -> None:
        frozen, folded = pair
        with torch.no_grad():
            folded.get_parameter(name).mul_(1.01)
        with pytest.raises(ExportError, match="logits differ"):
            verify_export(frozen, folded, token_ids)

    def test_logits_that_are_not_numbers(self, pair: Pair, token_ids: Tensor) -> None:
        frozen, folded = pair
        with torch.no_grad():
            folded.lm_head.bias[3] = float("nan")
        with pytest.raises(ExportError, match="nan relative"):
            verify_export(frozen, folded, token_ids)

    @pytest.mark.parametrize("place", ["transformer.h.1.ln_1", "transformer.h.2.ln_2", "transformer.ln_f"])
    def test_a_norm_in_disguise(self, pair: Pair, token_ids: Tensor, place: str) -> None:
        """Whatever it is called, and even if the frozen model has it too so that logits agree."""

        class Rescale(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x / (1 + 1e-3 * x.square().mean(-1, keepdim=True))

        _, folded = pair
        parent, _, slot = place.rpartition(".")
        setattr(folded.get_submodule(parent), slot, Rescale())
        twin = copy.deepcopy(folded)
        with pytest.raises(ExportError, match="affine") as caught:
            verify_export(twin, folded, token_ids)
        reader = {"ln_1": "h.1.attn.c_attn", "ln_2": "h.2.mlp.c_fc", "ln_f": "lm_head"}[slot]
        assert reader in str(caught.value)

    def test_one_short_text_is_enough(self, pair: Pair) -> None:
        frozen, folded = pair
        assert verify_export(frozen, folded, torch.tensor([[1, 2, EOT]])).affine_error < 1e-5


def test_the_tokenizer_has_a_name_that_transformers_4_knows(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "given")
    tokenizer = load_tokenizer(str(tmp_path / "given"))
    save_model(tiny_gpt2, tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again, text = load_tokenizer(str(tmp_path / "saved")), "def function_1(value):\n    return 1\n"
    assert type(again) is type(tokenizer) and again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id and again.bos_token_id == tokenizer.bos_token_id


def test_what_cannot_be_saved_is_named_before_a_training(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    check_savable(tiny_gpt2, tokenizer, ["normfree", "stock"])
    tiny_gpt2.generation_config.temperature = 0.5  # without sampling
    with pytest.raises(UserError, match=r"generation_config\.json.*temperature"):
        check_savable(tiny_gpt2, tokenizer)
    tiny_gpt2.generation_config.do_sample = True
    tiny_gpt2.config._output_attentions = True  # as a file may say it; the setter asks the implementation of attention
    with pytest.raises(UserError, match=r"config\.json.*output_attentions"):
        check_savable(tiny_gpt2, tokenizer, ["normfree"])
    tiny_gpt2.config._output_attentions = False
    tokenizer.init_kwargs["odd"] = object()
    with pytest.raises(UserError, match="tokenizer"):
        check_savable(tiny_gpt2, tokenizer)


def test_public_names_resolve() -> None:
    for name in ("install", "fold", "NormSites", "Site", "to_stock", "verify_export", "UserError"):
        assert getattr(ln_removal, name).__name__ == name
    assert set(ln_removal.__all__) <= set(dir(ln_removal))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ln_removal.nonsense  # noqa: B018


def test_rounding_of_huge_activations_is_not_taken_for_a_wrong_fold(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        tiny_gpt2.transformer.wpe.weight += 3e4  # the same for all channels: a norm subtracts it, float32 feels it
    frozen, folded = freeze_and_fold(tiny_gpt2, token_ids)
    assert logits_error(frozen, folded, token_ids) > TOLERANCE, "or there is nothing to decide"
    verify_export(frozen, folded, token_ids)
    assert "exact in float64" in caplog.text
    with torch.no_grad():
        folded.transformer.h[1].mlp.c_fc.weight[0] *= 1.01
    with pytest.raises(ExportError, match="differ"):
        verify_export(frozen, folded, token_ids)
