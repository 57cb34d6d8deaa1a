"""The models that are pretrained without norms: they are transformers' GPT-2 and GPT-NeoX but for what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from command_line import forked_code
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ln_removal.config.estimate import count_parameters
from ln_removal.config.recipe import ArchitectureSpec, TrainingSpec
from ln_removal.errors import UserError
from ln_removal.models.families import blocks_of
from ln_removal.models.layout import check_supported
from ln_removal.models.loading import load_config
from ln_removal.models.norm_choice import LearnableLeakyReLU, build_model, learnable_slopes
from ln_removal.pipelines.plan import architecture_of_model
from ln_removal.training.optimizers import build_optimizers

FAMILIES: tuple[Literal["gpt2", "pythia"], ...] = ("gpt2", "pythia")
EOT = 50
ACTIVATIONS = ("gelu", "relu", "leaky_relu", "learnable_leaky_relu")


def spec(family: str, **choices: Any) -> ArchitectureSpec:
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": EOT + 1}
    return ArchitectureSpec.model_validate({"family": family, **sizes, **choices})


def built(architecture: ArchitectureSpec, seed: int = 0) -> PreTrainedModel:
    """With random vectors too, so that a bias or a slope that is ignored shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(architecture, eot_token_id=EOT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, EOT, (2, 20), generator=torch.Generator().manual_seed(3))


def plain_twin(model: PreTrainedModel, architecture: ArchitectureSpec) -> PreTrainedModel:
    """transformers' own class with the same weights, zeros for missing biases, identities for missing norms."""
    published = ArchitectureSpec.model_validate(
        architecture.model_dump(include={"family", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size"})
    )
    twin = build_model(published, eot_token_id=EOT).eval()
    assert type(twin).__module__.startswith("transformers.")
    ours = dict(model.state_dict())
    width, heads = architecture.n_embd, architecture.n_head
    for name, tensor in twin.state_dict().items():
        found = ours.pop(name, None)
        if found is None:
            found = torch.zeros_like(tensor)
        elif found.shape != tensor.shape:  # the bias of queries and keys, in each family's order
            zeros = torch.zeros(width)
            if architecture.family == "gpt2":
                found = torch.cat((found, zeros))
            else:
                found = torch.cat((found.view(heads, 2, -1), zeros.view(heads, 1, -1)), dim=1).flatten()
        tensor.copy_(found)
    assert all("slope" in name for name in ours), list(ours)
    activation: dict[str, Any] = {"relu": torch.relu, "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.3)}
    for block in blocks_of(twin):
        if architecture.block_norm == "none":
            for name in ("ln_1", "ln_2", "input_layernorm", "post_attention_layernorm"):
                if hasattr(block, name):
                    setattr(block, name, nn.Identity())
        if architecture.activation in activation:
            block.mlp.act = Applied(activation[architecture.activation])
    if architecture.final_norm == "none":
        name = "ln_f" if architecture.family == "gpt2" else "final_layer_norm"
        setattr(twin.base_model, name, nn.Identity())
    return twin


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biases", ["all", "paper"])
@pytest.mark.parametrize(("block_norm", "final_norm"), [("layernorm", "none"), ("none", "layernorm"), ("none", "none")])
@pytest.mark.parametrize("activation", ["gelu", "relu", "leaky_relu"])
def test_what_is_chosen_and_nothing_else_differs_from_the_published_model(
    family: str, biases: str, block_norm: str, final_norm: str, activation: str, ids: torch.Tensor
) -> None:
    slope = {"negative_slope": 0.3} if activation == "leaky_relu" else {}
    architecture = spec(
        family, biases=biases, block_norm=block_norm, final_norm=final_norm, activation=activation, **slope
    )
    model = built(architecture)
    with torch.no_grad():
        expected = plain_twin(model, architecture)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_with_norms_biases_and_no_slope_it_is_transformers_own_class(
    family: str, activation: str, ids: torch.Tensor
) -> None:
    architecture = spec(family, activation=activation)
    model = built(architecture)
    assert type(model).__name__ in ("GPT2LMHeadModel", "GPTNeoXForCausalLM")
    assert model.config.model_type in ("gpt2", "gpt_neox")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain_twin(model, architecture)(ids).logits)


@settings(max_examples=25, deadline=None)
@given(
    choices=st.fixed_dictionaries(
        {
            "family": st.sampled_from(FAMILIES),
            "n_layer": st.integers(1, 3),
            "n_head": st.integers(1, 3),
            "vocab_size": st.integers(2, 60),
            "n_positions": st.integers(1, 20),
            "block_norm": st.sampled_from(["layernorm", "none", "dyt", "derf"]),
            "final_norm": st.sampled_from(["layernorm", "none", "dyt", "derf"]),
            "biases": st.sampled_from(["all", "paper"]),
            "activation": st.sampled_from(ACTIVATIONS),
        }
    ),
    network=st.booleans(),
    means=st.fixed_dictionaries(
        {
            "residual_gain": st.sampled_from(["none", "fixed", "learned"]),
            "initialisation": st.sampled_from(["gpt2", "unit"]),
            "qk_norm": st.booleans(),
            "attention_scale": st.sampled_from(["1/sqrt(k)", "1/k"]),
        }
    ),
)
def test_parameters_are_counted_as_they_are(choices: dict[str, Any], network: bool, means: dict[str, Any]) -> None:
    if choices["family"] == "gpt2":
        choices |= means
    if network and choices["activation"] == "learnable_leaky_relu":
        choices["slopes"] = "network"
    architecture = ArchitectureSpec.model_validate({**choices, "n_embd": 8 * choices["n_head"]})
    model = build_model(architecture, eot_token_id=0)
    assert count_parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slopes", ["layer", "network"])
def test_saved_and_loaded_a_model_gives_equal_logits(
    family: str, activation: str, slopes: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    choices = {"slopes": slopes} if activation == "learnable_leaky_relu" else {}
    model = built(spec(family, block_norm="none", biases="paper", activation=activation, **choices))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert load_config(str(tmp_path)).block_norm == "none"


def test_a_fresh_process_loads_it_with_the_package(ids: torch.Tensor, tmp_path: Path) -> None:
    model = built(spec("pythia", block_norm="none", activation="learnable_leaky_relu", slopes="network"))
    model.save_pretrained(tmp_path)
    code = f"""
import ln_removal, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model).__name__, float(model(torch.tensor({ids.tolist()})).logits.double().sum()))
"""
    name, total = forked_code(code).split()
    assert name == "RevivalGPTNeoXForCausalLM"
    with torch.no_grad():
        assert float(total) == pytest.approx(float(model(ids).logits.double().sum()), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_has_one_slope_and_each_layer_its_own(family: str, ids: torch.Tensor) -> None:
    one = built(spec(family, activation="learnable_leaky_relu", slopes="network"))
    each = built(spec(family, activation="learnable_leaky_relu", slopes="layer"))
    for model, count in ((one, 1), (each, 3)):
        slopes = learnable_slopes(model)
        assert len(slopes) == count
        names = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
        assert names == list(slopes) and [name for name in model.state_dict() if "slope" in name] == names
    # The one slope acts in every layer: with each layer's set to it, the two are the same function.
    shared = next(iter(learnable_slopes(one).values()))
    state = {name: tensor for name, tensor in one.state_dict().items() if "slope" not in name}
    each.load_state_dict(state, strict=False)
    with torch.no_grad():
        for slope in learnable_slopes(each).values():
            slope.copy_(shared)
        assert torch.equal(one(ids).logits, each(ids).logits)
    one(ids).logits.sum().backward()
    assert shared.grad is not None and float(shared.grad) != 0


def test_slopes_begin_where_the_recipe_says_and_are_not_decayed() -> None:
    architecture = spec("gpt2", activation="learnable_leaky_relu", negative_slope=0.25)
    model = build_model(architecture, eot_token_id=EOT)
    assert [slope.item() for slope in learnable_slopes(model).values()] == [0.25] * 3
    (optimizer,) = build_optimizers(
        model, TrainingSpec(steps=1, tokens_per_step=8, learning_rate=0.1, weight_decay=0.5)
    )
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert [decays[id(slope)] for slope in learnable_slopes(model).values()] == [0.0] * 3
    assert decays[id(model.transformer.h[0].mlp.c_fc.weight)] == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_matrices_inside_the_blocks_of_either_family(family: str) -> None:
    model = build_model(spec(family, block_norm="none"), eot_token_id=EOT)
    tiny = TrainingSpec(steps=1, tokens_per_step=8, learning_rate=0.1, optimizer="muon")
    muon, adamw = build_optimizers(model, tiny)
    assert sum(len(group["params"]) for group in muon.param_groups) == 3 * 4
    owned = [
        parameter for optimizer in (muon, adamw) for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert len(owned) == len(set(map(id, owned))) == len(list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_arms_of_one_seed_begin_with_the_same_matrices(family: str) -> None:
    arms = []
    for choices in ({"activation": "gelu"}, {"block_norm": "none", "activation": "relu"}):
        torch.manual_seed(5)
        arms.append(build_model(spec(family, biases="paper", **choices), eot_token_id=EOT).state_dict())
    matrices = [name for name, tensor in arms[0].items() if tensor.ndim == 2]
    assert len(matrices) >= 3 * 4 + 2
    assert all(torch.equal(arms[0][name], arms[1][name]) for name in matrices)


def test_the_papers_biases_come_with_the_papers_initialisation() -> None:
    """Its code draws every matrix with 0.02; transformers begins GPT-2's projections into the stream at 0.02 / sqrt(2 L)."""

    def deviation(biases: str) -> float:
        sizes = {"n_layer": 8, "n_head": 4, "n_embd": 64, "n_positions": 24, "vocab_size": EOT + 1}
        model = build_model(
            ArchitectureSpec.model_validate({**sizes, "biases": biases, "block_norm": "none"}), eot_token_id=EOT
        )
        return float(torch.cat([block.mlp.c_proj.weight.detach().flatten() for block in model.transformer.h]).std())

    assert deviation("paper") == pytest.approx(0.02, rel=0.02)
    assert deviation("all") == pytest.approx(0.02 / 4, rel=0.02)


def test_leaky_relu_and_its_gradient() -> None:
    module = LearnableLeakyReLU(0.1).double()
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert y.tolist() == pytest.approx([-0.2, 0.0, 0.0, 3.0])
    y.sum().backward()
    assert float(module.slope.grad or 0) == pytest.approx(-2.0)
    assert x.grad is not None and x.grad.tolist()[0] == pytest.approx(0.1) and x.grad.tolist()[3] == 1.0
    assert module(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.slope.data.fill_(0.7)
    module.reset_parameters()
    assert module.slope.item() == pytest.approx(0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removal_refuses_them(family: str, tmp_path: Path) -> None:
    model = built(spec(family, activation="leaky_relu"))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT-2"):
        architecture_of_model(str(tmp_path))
    if family == "pythia":
        with pytest.raises(UserError, match="LeakyReLU"):
            check_supported(model)
