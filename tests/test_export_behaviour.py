"""What users do with an LN-free model in transformers: generate, pipelines, placement, checkpointing, compiling, 8 bits."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from disarmed_model import disarm
from massive_activations import freeze_in_order
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerBase, pipeline
from transformers.pytorch_utils import Conv1D

from ln_removal import NormFreeGPT2LMHeadModel, from_disarmed
from ln_removal.models.loading import load_model

PROMPT = "def add(first, second):\n    return"


@pytest.fixture(scope="module")
def embedded() -> tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The embedded model without norms, its constants those of a text, and its tokenizer."""
    loaded = load_model("tiny")
    tokens = loaded.tokenizer((PROMPT + " first + second\n\n\n") * 16, return_tensors="pt").input_ids[:, :128]
    return freeze_in_order(loaded.model, tokens), loaded.tokenizer


@pytest.fixture(scope="module")
def saved(
    embedded: tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("saved")
    for part in embedded:
        part.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(embedded: tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]) -> NormFreeGPT2LMHeadModel:
    return embedded[0]


@pytest.fixture(scope="module")
def tokenizer(embedded: tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return embedded[1]


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(2, 20) tokens."""
    found: Tensor = tokenizer(PROMPT * 8, return_tensors="pt").input_ids[:, :40].reshape(2, 20)
    return found


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    found: Tensor = model(ids, **inputs).logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beams"]
)
def test_generate_is_the_same_with_and_without_a_cache(
    model: NormFreeGPT2LMHeadModel, ids: Tensor, options: dict[str, object]
) -> None:
    options = options | {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_logits_step_by_step_with_a_cache(model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:
    expected = logits(model, ids)
    cache, steps = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-5


def test_left_padding(model: NormFreeGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A short prompt beside a long one gives what it gives alone."""
    padded = copy.deepcopy(tokenizer)
    padded.pad_token, padded.padding_side = padded.eos_token, "left"
    prompts = ["import os", PROMPT + " first + second\n"]
    batch = padded(prompts, return_tensors="pt", padding=True)
    assert (batch.attention_mask == 0).any()
    position_ids = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": padded.pad_token_id}
    generated = model.generate(**batch, **options)
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        length = alone.input_ids.shape[1]
        assert relative_error(together[row, -length:], logits(model, alone.input_ids)[0]) < 1e-5
        assert torch.equal(generated[row, -8 - length :], model.generate(**alone, **options)[0])


def test_pipeline(saved: Path, model: NormFreeGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    generate = pipeline("text-generation", model=str(saved), device="cpu", dtype=torch.float32)
    assert type(generate.model) is NormFreeGPT2LMHeadModel
    text = generate(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    alone = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**alone, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    both = generate([PROMPT, "import"], max_new_tokens=4, do_sample=False)
    assert len(both) == 2


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(saved: Path, model: NormFreeGPT2LMHeadModel, ids: Tensor, where: str | dict[str, str]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=where)
    assert relative_error(logits(loaded, ids.to(loaded.device)).cpu(), logits(model, ids)) < 1e-4


def test_blocks_on_disk(saved: Path, model: NormFreeGPT2LMHeadModel, ids: Tensor, tmp_path: Path) -> None:
    """Every module has a place of its own: nothing is tied across the map."""
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.ln_f": "cpu"}
    places |= {f"transformer.h.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.n_layer)} | {
        "lm_head": "disk"
    }
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=str(tmp_path))
    assert relative_error(logits(loaded, ids), logits(model, ids)) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model: NormFreeGPT2LMHeadModel, ids: Tensor, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert trained.is_gradient_checkpointing
            trained.enable_input_require_grads()
        trained(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    plain, checkpointed = gradients
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_compiled(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    model = from_disarmed(disarm(tiny_gpt2))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert relative_error(logits(compiled, token_ids, use_cache=False), logits(model, token_ids)) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestInt8:
    """Dynamic int8 on the CPU. Baroni et al. found LN-free models hard to quantise, so closeness is not asked for."""

    def test_the_unembedding(self, model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        assert not isinstance(quantized.lm_head, nn.Linear)
        assert relative_error(logits(quantized, ids), logits(model, ids)) < 0.05

    def test_every_matrix(self, model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:
        """GPT-2's own linear layers are Conv1D, which quantisers leave alone until they are made nn.Linear."""
        linear = copy.deepcopy(model)
        for name, module in list(linear.named_modules()):
            if isinstance(module, Conv1D):
                linear.set_submodule(name, as_linear(module))
        torch.testing.assert_close(logits(linear, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
        quantized = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)
        assert not [name for name, module in quantized.named_modules() if type(module) in (nn.Linear, Conv1D)]
        found = logits(quantized, ids)
        assert torch.isfinite(found).all()
        expected = logits(model, ids)
        cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.9
        generated = quantized.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 24)


def as_linear(module: Conv1D) -> nn.Linear:
    """A Conv1D, whose weight is (in, out), as nn.Linear."""
    linear = nn.Linear(*module.weight.shape)
    with torch.no_grad():
        linear.weight.copy_(module.weight.T)
        linear.bias.copy_(module.bias)
    return linear


def test_nothing_warns_on_loading(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(saved)
