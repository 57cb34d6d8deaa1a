"""Published LN-free models (disarmed LayerNorms): recognised, converted to a model without norms, or refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from disarmed_model import disarm, faithful, norms_of
from fake_hub import FakeHub, read_folder, run_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from ln_removal import NormFreeGPT2LMHeadModel, UserError, from_disarmed, to_stock
from ln_removal.cli.export import app
from ln_removal.export.convert import check_conversion, has_disarmed_norms
from ln_removal.export.verify import ExportError, norm_modules
from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config

TOLERANCE = 1e-4


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def untied(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    model.config.tie_word_embeddings = False
    weight = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(weight + 0.1 * torch.randn_like(weight))
    return model


def module_epsilon_only(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    model.config.layer_norm_epsilon = 1e-5
    return model


def config_epsilon_only(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    for norm in norms_of(model):
        norm.eps = 1e-5
    return model


def no_epsilon(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    return module_epsilon_only(config_epsilon_only(model))


def equal_weights_without_bias(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    with torch.no_grad():
        for norm in norms_of(model):
            norm.weight.fill_(1e6)
            norm.bias.zero_()
    return model


FORMS = {
    "as published": lambda model: model,
    "unembedding of its own": untied,
    "epsilon only in the modules": module_epsilon_only,
    "epsilon only in the configuration": config_epsilon_only,
    "epsilon nowhere": no_epsilon,
    "equal weights, no biases": equal_weights_without_bias,
}


class TestConversion:
    @pytest.mark.parametrize("form", FORMS)
    def test_same_logits(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, form: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = FORMS[form](disarm(tiny_gpt2))
        expected = logits(faithful(model), token_ids)
        before = copy.deepcopy(model.state_dict())
        epsilons = [norm.eps for norm in norms_of(model)]
        assert has_disarmed_norms(model)
        converted = from_disarmed(model)
        assert type(converted) is NormFreeGPT2LMHeadModel and norm_modules(converted) == []
        assert not converted.training and converted.config.tie_word_embeddings is False
        assert relative_error(logits(converted, token_ids), expected) < TOLERANCE
        assert check_conversion(model, converted, token_ids) < TOLERANCE
        assert ("took epsilon 1e+12" in caplog.text) == (form == "epsilon nowhere")
        # the source is left as it was, and shares no memory with the result
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.zero_()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [norm.eps for norm in norms_of(model)] == epsilons

    def test_in_float64_it_is_exact(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        model = disarm(tiny_gpt2)
        found = logits(from_disarmed(copy.deepcopy(model).double()), token_ids)
        # what is left is var / (2 eps) of each norm: the disarmed one is not quite a constant scale
        assert relative_error(found, logits(faithful(model), token_ids)) < 1e-9

    def test_weights_in_bfloat16(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        model = disarm(tiny_gpt2).to(torch.bfloat16)
        converted = from_disarmed(model)
        assert converted.dtype == torch.bfloat16
        assert relative_error(logits(converted, token_ids), logits(faithful(model), token_ids)) < 0.05

    @given(size=st.floats(1e-2, 2), seed=st.integers(0, 2**31 - 1))
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_weights(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, size: float, seed: int) -> None:
        model = disarm(tiny_gpt2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for norm in norms_of(model):
                norm.weight.copy_(1e6 * (size * torch.rand(32, generator=generator) + 0.01))
                norm.bias.normal_(generator=generator)
        expected = logits(faithful(model), token_ids)
        converted = from_disarmed(copy.deepcopy(model).double())
        assert relative_error(logits(converted, token_ids), expected) < TOLERANCE

    @pytest.mark.parametrize("lost", [False, True])
    def test_our_stock_form_is_one_too(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, caplog: pytest.LogCaptureFixture, lost: bool
    ) -> None:
        normfree = from_disarmed(disarm(tiny_gpt2))
        stock = to_stock(normfree)
        back = from_disarmed(no_epsilon(stock) if lost else stock)
        assert relative_error(logits(back, token_ids), logits(normfree, token_ids)) < 1e-5
        for name, value in normfree.state_dict().items():
            assert relative_error(back.state_dict()[name], value) < 1e-5, name
        assert ("took epsilon 1.09951e+12" in caplog.text) == lost


class TestRefused:
    def test_some_norms_are_left(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        model = disarm(tiny_gpt2)
        with torch.no_grad():
            model.transformer.h[1].ln_2.weight.fill_(1)
            model.transformer.ln_f.weight.fill_(1)
        with pytest.raises(UserError, match=r"2 of its 7 .* transformer\.h\.1\.mlp\.c_fc"):
            from_disarmed(model)

    def test_one_norm_still_normalises(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        model = module_epsilon_only(disarm(tiny_gpt2))
        norm = model.transformer.h[0].ln_1
        norm.eps = 1e-5
        norm.weight = torch.nn.Parameter(torch.ones(32))
        with pytest.raises(UserError, match=r"1 of its 7 .* transformer\.h\.0\.attn\.c_attn"):
            from_disarmed(model)

    def test_only_the_epsilon_is_huge(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        tiny_gpt2.config.layer_norm_epsilon = 1e12
        assert has_disarmed_norms(tiny_gpt2)
        with pytest.raises(UserError, match=r"1e\+12.*1e-5"):
            from_disarmed(tiny_gpt2)

    def test_weights_that_did_not_fit_float16(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        model = disarm(tiny_gpt2).half().float()
        with pytest.raises(UserError, match=r"ln_1\.weight.*float16"):
            from_disarmed(model)

    def test_another_architecture(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        with pytest.raises(UserError, match="Identity"):
            from_disarmed(from_disarmed(disarm(tiny_gpt2)))

    def test_activations_too_large_for_the_epsilon(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        model = disarm(tiny_gpt2)
        with torch.no_grad():
            model.transformer.wte.weight[:, 0] += 1e6  # one channel: std 1.8e5 against sqrt(eps) = 1e6
        with pytest.raises(ExportError, match=r"1e\+12"):
            check_conversion(model, from_disarmed(model), token_ids)

    def test_explosions_at_single_tokens_are_passed_over_with_a_warning(
        self, tiny_gpt2: GPT2LMHeadModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As in the published GPT-2 XL, on tokens that its training text lacked."""
        model = untied(disarm(tiny_gpt2))
        with torch.no_grad():
            model.transformer.wte.weight[7, 0] += 1e6
        ids = torch.randint(8, 100, (16, 12), generator=torch.Generator().manual_seed(0))
        converted = from_disarmed(model)
        assert check_conversion(model, converted, ids) < TOLERANCE and caplog.text == ""
        ids[3, 6] = ids[5, 0] = 7
        assert check_conversion(model, converted, ids) < TOLERANCE
        assert re.search(r"at \d+ of 192 positions .* still act", caplog.text)
        with torch.no_grad():  # still found when the fold is wrong
            converted.lm_head.bias[50] += 1
        with pytest.raises(ExportError, match="differs"):
            check_conversion(model, converted, ids)

    def test_a_wrong_conversion(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        model = disarm(tiny_gpt2)
        converted = from_disarmed(model)
        with torch.no_grad():
            converted.transformer.h[2].mlp.c_fc.weight.mul_(1.01)
        with pytest.raises(ExportError, match="differs"):
            check_conversion(model, converted, token_ids)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as one downloads it, with a tokenizer."""
    directory = write_model(tmp_path_factory.mktemp("published") / "gpt2_noLN", seed=3)
    model = GPT2LMHeadModel.from_pretrained(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    disarm(model).save_pretrained(directory)
    return directory


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def reference(directory: Path, ids: Tensor) -> Tensor:
    return logits(faithful(GPT2LMHeadModel.from_pretrained(directory)), ids)


IDS = torch.randint(0, 320, (3, 48), generator=torch.Generator().manual_seed(5))


class TestCommand:
    @pytest.mark.parametrize("form", ["normfree", "stock"])
    def test_export(self, published: Path, tmp_path: Path, form: str) -> None:
        result = export(published, "--format", form, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert float(result.output.split()[-1]) < 1e-5
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(loaded) is (NormFreeGPT2LMHeadModel if form == "normfree" else GPT2LMHeadModel)
        assert relative_error(logits(loaded, IDS), reference(published, IDS)) < TOLERANCE

    def test_configuration_without_the_epsilon(self, published: Path, tmp_path: Path) -> None:
        directory = tmp_path / "model"
        directory.mkdir()
        for name, content in read_folder(published).items():
            (directory / name).write_bytes(content)
        config = json.loads((directory / "config.json").read_text())
        config["layer_norm_epsilon"] = 1e-5
        (directory / "config.json").write_text(json.dumps(config))
        result = export(directory, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert relative_error(logits(loaded, IDS), reference(published, IDS)) < TOLERANCE

    def test_tokenizer_of_another_model(self, published: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        GPT2LMHeadModel.from_pretrained(published).save_pretrained(bare)
        result = export(bare, "--out", tmp_path / "out")
        assert result.exit_code == 2 and "has no tokenizer" in result.stderr and "--tokenizer" in result.stderr
        result = export(bare, "--tokenizer", published, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()

    @pytest.mark.slow
    def test_from_the_hub(self, published: Path, tmp_path: Path) -> None:
        arguments = ["someone/gpt2_noLN", "--out", str(tmp_path / "out")]
        code = f"from ln_removal.cli.export import app\napp({arguments!r})"
        with FakeHub() as hub:
            hub.add("models", "someone/gpt2_noLN", read_folder(published))
            done = run_client(code, hub.endpoint, tmp_path)
        assert done.returncode == 0, done.stderr
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(loaded.config) is NormFreeGPT2Config
        assert relative_error(logits(loaded, IDS), reference(published, IDS)) < TOLERANCE
