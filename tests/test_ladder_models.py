"""The means to train a GPT-2 without norms: against formulas written out here, saved, exported, in TransformerLens, capped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ln_removal.config.recipe import ArchitectureSpec, TrainingSpec
from ln_removal.errors import UserError
from ln_removal.export.convert import to_bridge
from ln_removal.export.verify import logits_error
from ln_removal.export.write import export_model
from ln_removal.models.attention import fused_attention
from ln_removal.models.chosen_parts import ReLU
from ln_removal.models.families import blocks_of
from ln_removal.models.layout import check_supported
from ln_removal.models.loading import load_model
from ln_removal.models.norm_choice import build_model
from ln_removal.models.norm_free import from_norm_choice
from ln_removal.training.loss import Objective
from ln_removal.training.optimizers import SpectralCap, build_optimizers

LAYERS, HEADS, WIDTH, WORDS = 3, 2, 32, 320
FREE = {"block_norm": "none", "final_norm": "none"}
MEANS = {"residual_gain": "learned", "initialisation": "unit"}


def built(*, seed: int = 0, disturbed: bool = True, **choices: Any) -> PreTrainedModel:
    """A model, with random vectors and scalars so that one that is ignored shows."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 24, "vocab_size": WORDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(ArchitectureSpec.model_validate({**sizes, **choices}), eot_token_id=WORDS - 1)
        with torch.no_grad():
            for parameter in model.parameters() if disturbed else ():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_and_its_gradient_are_those_of_pytorch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(500, generator=generator), torch.tensor([0.0, -0.0, 1e-38, -1e-38, torch.inf])])
    gradient = torch.randn(505, generator=generator).to(dtype)
    found = []
    for module in (ReLU(), torch.nn.ReLU(), torch.compile(ReLU())):
        x = values.to(dtype).requires_grad_()
        out = module(x)
        out.backward(gradient)
        assert x.grad is not None
        found.append((out.detach(), x.grad))
    for out, grad in found:
        assert torch.equal(out, found[1][0])
        assert torch.equal(grad, found[1][1])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, WORDS, (2, 20), generator=torch.Generator().manual_seed(3))


def written_out(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of a GPT-2 with choices, by formulas, in float64 from the model's parameters."""
    config: Any = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def place(kind: str, name: str, x: Tensor) -> Tensor:
        if kind == "none":
            return x
        gamma, beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if kind == "layernorm":
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma + beta
        alpha = weights[f"{name}.alpha"]
        return (
            gamma * (torch.tanh(alpha * x) if kind == "dyt" else torch.erf(alpha * x + weights[f"{name}.shift"])) + beta
        )

    def linear(name: str, x: Tensor) -> Tensor:
        out, bias = x @ weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if bias is not None:
            out[..., : len(bias)] += bias
        if config.residual_gain == "none" or not name.endswith("c_proj"):
            return out
        return out * weights.get(f"{name}.learned", 1 / math.sqrt(2 * LAYERS))

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)

    def attention(name: str, x: Tensor) -> Tensor:
        own = f"{name}.c_attn.map" if config.qk_norm else f"{name}.c_attn"
        query, key, value = map(split, linear(own, x).split(WIDTH, -1))
        if config.qk_norm:
            scale = [(part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key)]
            query = query / scale[0] * weights[f"{name}.c_attn.norm.query"]
            key = key / scale[1] * weights[f"{name}.c_attn.norm.key"]
        width = WIDTH / HEADS
        scores = query @ key.transpose(-1, -2) / (width if config.attention_scale == "1/k" else math.sqrt(width))
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        heads = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return linear(f"{name}.c_proj", heads.transpose(1, 2).flatten(-2))

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: ids.shape[1]]
    if config.initialisation == "unit":
        x = x / (math.sqrt(2) * 0.02)
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        x = x + attention(f"{name}.attn", place(config.block_norm, f"{name}.ln_1", x))
        inside = linear(f"{name}.mlp.c_fc", place(config.block_norm, f"{name}.ln_2", x))
        gelu = 0.5 * inside * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)))
        x = x + linear(f"{name}.mlp.c_proj", inside.clamp(min=0) if config.activation == "relu" else gelu)
    return place(config.final_norm, "transformer.ln_f", x) @ weights["lm_head.weight"].T


@pytest.mark.parametrize(
    "choices",
    [
        {"block_norm": "dyt", "final_norm": "dyt"},
        {"block_norm": "derf", "final_norm": "derf", "biases": "paper"},
        {"block_norm": "derf", "final_norm": "layernorm", "initialisation": "unit"},
        {**FREE, "residual_gain": "fixed", "activation": "relu"},
        {**FREE, **MEANS, "activation": "relu", "biases": "paper"},
        {"block_norm": "none", "qk_norm": True, "biases": "paper"},
        {**FREE, **MEANS, "qk_norm": True, "tied": False},
        {"attention_scale": "1/k", "initialisation": "unit"},
        {**FREE, "attention_scale": "1/k", "activation": "relu", "biases": "paper"},
        {"attention_scale": "1/k", "qk_norm": True},
    ],
)
def test_logits_are_those_of_the_formulas(choices: dict[str, Any], ids: Tensor) -> None:
    model = built(**choices)
    expected = written_out(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )
        wide = model.double()
        torch.testing.assert_close(wide(ids).logits, written_out(wide, ids), rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter_and_are_those_of_the_formulas(ids: Tensor) -> None:
    model = built(**FREE, **MEANS, qk_norm=True).double()
    scalar = torch.linspace(-1, 1, WORDS, dtype=torch.float64)
    (model(ids).logits @ scalar).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and bool(gradient.any()) for gradient in found.values())
    for name in ("transformer.h.1.attn.c_proj.learned", "transformer.h.0.attn.c_attn.norm.key"):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter.view(-1)[0] += step
                values.append(float((written_out(model, ids) @ scalar).sum()))
        assert float(found[name].view(-1)[0]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("biases", ["all", "paper"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "leaky_relu"])
@pytest.mark.parametrize("gain", ["none", "fixed", "learned"])
def test_the_stream_begins_at_one_and_the_branches_add_as_much(biases: str, activation: str, gain: str) -> None:
    sizes = {"n_layer": 8, "n_head": 4, "n_embd": 128, "n_positions": 64, "vocab_size": 500}
    chosen = {**FREE, "initialisation": "unit", "residual_gain": gain, "activation": activation, "biases": biases}
    torch.manual_seed(1)
    model = build_model(ArchitectureSpec.model_validate({**sizes, **chosen}), eot_token_id=0).eval()
    # The first position attends to itself alone, so its attention branch is not averaged away.
    ids = torch.randint(0, 500, (200, 1))
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    squares = [float(state.square().mean()) for state in found.hidden_states]
    assert squares[0] == pytest.approx(1, rel=0.1)
    # Each of 16 branches gets a stream of mean square s and adds s / 16.
    assert squares[-1] == pytest.approx((1 + 1 / 16) ** 16, rel=0.2)
    assert float(found.logits.std()) < 1


def test_without_choices_nothing_changes() -> None:
    """The keys' defaults are what a GPT-2 without them was: the same weights from the same random state, bit for bit."""
    off = {"residual_gain": "none", "initialisation": "gpt2", "qk_norm": False, "attention_scale": "1/sqrt(k)"}
    for choices in ({**FREE, "biases": "paper"}, {"block_norm": "none"}, {}):
        one, other = built(disturbed=False, **choices), built(disturbed=False, **choices, **off)
        assert type(one) is type(other)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_arms_of_one_seed_begin_with_the_same_matrices_up_to_a_factor() -> None:
    plain = built(disturbed=False, biases="paper", **FREE).state_dict()
    for choices in (
        MEANS,
        {"residual_gain": "fixed"},
        {"initialisation": "unit"},
        {"qk_norm": True},
        {"attention_scale": "1/k"},
    ):
        arm = built(disturbed=False, biases="paper", **FREE, **choices).state_dict()
        for name, tensor in plain.items():
            own = arm.get(name, arm.get(name.replace("c_attn.", "c_attn.map.")))
            assert own is not None
            if tensor.ndim == 2:
                factor = float(own.norm() / tensor.norm())
                torch.testing.assert_close(own, factor * tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "choices",
    [
        {**FREE, **MEANS, "biases": "paper"},
        {"block_norm": "dyt", "final_norm": "derf"},
        {"qk_norm": True, **MEANS},
        {**MEANS, "attention_scale": "1/k"},
    ],
)
def test_saved_and_loaded_a_model_gives_equal_logits(choices: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    model = built(**choices)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


# ----------------------------------------------------------------------------------------------------------- LN-free form


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
@pytest.mark.parametrize("biases", ["all", "paper"])
@pytest.mark.parametrize(
    "choices",
    [{}, MEANS, {"residual_gain": "fixed", "activation": "relu", "attention_scale": "1/k"}],
)
def test_a_model_without_norms_is_an_ln_free_model(
    family: str, biases: str, choices: dict[str, Any], ids: Tensor
) -> None:
    if family == "pythia" and "residual_gain" in choices:
        choices = {"activation": "relu"}
    model = built(family=family, biases=biases, **FREE, **choices)
    free = from_norm_choice(model)
    assert free.config.model_type.startswith("normfree_") and not hasattr(free.config, "residual_gain")
    with torch.no_grad():
        assert logits_error(model, free, ids) < 1e-5
        wide = from_norm_choice(model.double())
        assert logits_error(model, wide, ids) < 1e-13


@pytest.mark.parametrize(
    ("choices", "left"),
    [
        ({"block_norm": "none", "activation": "relu"}, "LayerNorm in front of the unembedding"),
        ({"block_norm": "dyt", "final_norm": "derf"}, "DyT in its blocks and Derf in front of the unembedding"),
        ({**FREE, "qk_norm": True}, "an RMSNorm of queries and keys"),
        ({**FREE, "activation": "leaky_relu", "negative_slope": 0.1}, "leaky ReLUs with a slope of 0.1"),
        ({**FREE, "activation": "learnable_leaky_relu"}, "leaky ReLUs with learned slopes"),
    ],
)
def test_what_is_left_is_said(choices: dict[str, Any], left: str, tmp_path: Path) -> None:
    model = built(**choices)
    with pytest.raises(UserError, match=left):
        to_bridge(model)
    with pytest.raises(UserError):  # of a removal
        check_supported(model, keep=())
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match=left):
        export_model(tmp_path / "model", tmp_path / "free", form="normfree")
    assert not (tmp_path / "free").exists()


def test_it_is_exported_and_put_into_transformer_lens(ids: Tensor, tmp_path: Path) -> None:
    model = built(disturbed=False, **FREE, **MEANS)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    assert export_model(tmp_path / "model", tmp_path / "free", form="normfree") < 1e-4
    free = load_model(tmp_path / "free").model
    assert type(free).__name__ == "NormFreeGPT2LMHeadModel"
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(free(ids).logits, expected, rtol=1e-4, atol=1e-4)
        for one in (model, free):
            torch.testing.assert_close(to_bridge(one)(ids), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--format normfree"):  # its columns do not have mean zero
        export_model(tmp_path / "model", tmp_path / "stock", form="stock")


# --------------------------------------------------------------------------------------------------------- spectral cap


def capped(model: PreTrainedModel, cap: float) -> SpectralCap:
    spec = TrainingSpec(steps=1, tokens_per_step=8, learning_rate=0.1, spectral_cap=cap)
    *_, found = build_optimizers(model, spec)
    assert isinstance(found, SpectralCap)
    return found


def maps_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Each map inside the blocks as (inputs, outputs), with queries, keys and values apart."""
    found = {}
    for number, block in enumerate(blocks_of(model)):
        for name, tensor in block.named_parameters():
            if tensor.ndim == 2:
                parts = tensor.detach().chunk(3, dim=1) if "c_attn" in name else (tensor.detach(),)
                found |= {f"{number}.{name}.{index}": part for index, part in enumerate(parts)}
    return found


def rms_norm_of(matrix: Tensor) -> float:
    inputs, outputs = matrix.shape
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2)) * math.sqrt(inputs / outputs)


def test_the_cap_bounds_every_matrix_and_leaves_small_ones_alone() -> None:
    model = built(disturbed=False, **FREE, **MEANS)
    before = {name: tensor.clone() for name, tensor in maps_of(model).items()}
    sizes = {name: rms_norm_of(tensor) for name, tensor in before.items()}
    cap = sorted(sizes.values())[len(sizes) // 2] * 1.0001
    outside = {name: value.clone() for name, value in model.state_dict().items() if ".h." not in name}
    capped(model, cap).step()
    for name, tensor in maps_of(model).items():
        if sizes[name] < cap * 0.999:
            assert torch.equal(tensor, before[name])
        assert rms_norm_of(tensor) <= cap * 1.02  # power iteration finds it from below
        torch.testing.assert_close(tensor / tensor.norm(), before[name] / before[name].norm())
    assert all(torch.equal(value, outside[name]) for name, value in model.state_dict().items() if name in outside)


@pytest.mark.parametrize("family", ["pythia", "llama"])
def test_the_cap_is_for_every_family(family: str) -> None:
    norm = "rmsnorm" if family == "llama" else "layernorm"
    model = built(family=family, disturbed=False, block_norm=norm, final_norm=norm)
    matrices = [tensor for block in blocks_of(model) for tensor in block.parameters() if tensor.ndim == 2]
    with torch.no_grad():
        for number, tensor in enumerate(matrices):
            tensor.mul_(1 + number)
    before = [rms_norm_of(tensor.T) for tensor in matrices]
    capped(model, 0.5).step()
    assert min(before) < 0.5 < max(before)
    for tensor, size in zip(matrices, before, strict=True):
        assert rms_norm_of(tensor.T) == pytest.approx(min(size, 0.5), rel=0.02)


def test_the_cap_follows_matrices_that_change() -> None:
    model = built(disturbed=False, **FREE, initialisation="unit")
    cap, generator = capped(model, 2.0), torch.Generator().manual_seed(0)
    for _ in range(100):
        with torch.no_grad():
            for tensor in maps_of(model).values():
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))
        cap.step()
    largest = max(map(rms_norm_of, maps_of(model).values()))
    assert 1.9 < largest <= 2.0 * 1.03


@pytest.mark.parametrize(
    "choices",
    [
        {**FREE, **MEANS, "biases": "paper", "activation": "relu", "attention_scale": "1/k"},
        {"block_norm": "dyt", "final_norm": "derf", "qk_norm": True},
    ],
)
def test_a_step_is_one_graph_with_the_same_loss_and_gradients(choices: dict[str, Any], ids: Tensor) -> None:
    gradients = []
    for compiled in (False, True):
        objective = Objective(built(**choices), eot_token_id=None)
        with fused_attention(objective.model):
            step: Any = objective
            if compiled:
                torch.compiler.reset()
                step = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False)
            loss = step(ids).total
            loss.backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
