"""Observation while training: what it measures, beside transformers' own outputs, and that it leaves the training alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from small_model import tiny_neox
from tiny_training import CONTEXT, TinyRun, tiny_spec, weights_sha256
from torch import Tensor, nn

from ln_removal.models.attention import largest_entropy
from ln_removal.models.families import blocks_of, final_norm_of
from ln_removal.models.norm_choice import LearnableLeakyReLU
from ln_removal.training.probe import Probe

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel


def without_norms(model: PreTrainedModel) -> PreTrainedModel:
    for block in blocks_of(model):
        for name, module in list(block.named_children()):
            if isinstance(module, nn.LayerNorm):
                setattr(block, name, nn.Identity())
    return model


@pytest.fixture(params=["gpt2", "gpt2 without norms", "neox", "neox without norms, not parallel"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, _, changes = request.param.partition(" ")
    gpt2: PreTrainedModel = request.getfixturevalue("tiny_gpt2")
    found = gpt2 if family == "gpt2" else tiny_neox(parallel="not parallel" not in changes)
    return without_norms(found) if "without norms" in changes else found


def probe_of(tokens: Tensor, **changes: object) -> Probe:
    return Probe(tokens, **({"every": 5, "steps": 100} | changes))


def test_the_figures_are_those_of_transformers_outputs(model: PreTrainedModel, token_ids: Tensor) -> None:
    found = probe_of(token_ids).observe(model)

    layers, heads, (sequences, queries) = len(blocks_of(model)), 4, token_ids.shape
    model.set_attn_implementation("eager")
    streams: list[Tensor] = []
    handle = final_norm_of(model).register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    with torch.no_grad():
        outputs = model(token_ids, output_attentions=True, output_hidden_states=True)
    handle.remove()
    stream = torch.stack([*outputs.hidden_states[:layers], streams[0]])
    attentions = torch.stack(outputs.attentions).double()
    entropy = torch.special.entr(attentions).sum(-1).mean((1, 3))

    assert found["queries"] == queries
    torch.testing.assert_close(torch.tensor(found["entropy"]).double(), entropy, atol=1e-5, rtol=1e-5)
    assert torch.tensor(found["entropy"]).shape == (layers, heads)
    assert (torch.tensor(found["entropy"]) < largest_entropy(queries)).all()
    torch.testing.assert_close(torch.tensor(found["residual_norm"]), stream.norm(dim=-1).mean((1, 2)))
    assert found["nan_counts"] == [0] * layers
    assert found["nonfinite_residual"] == [0] * (layers + 1)
    assert found["attention_entries"] == sequences * heads * queries * queries
    assert all(math.isnan(norm) for norm in found["gradient_norm"])
    assert found["slopes"] == []


def test_the_gradient_norm_is_that_of_each_block(model: PreTrainedModel, token_ids: Tensor) -> None:
    model(token_ids, labels=token_ids).loss.backward()
    for parameter in blocks_of(model)[1].parameters():
        parameter.grad = None
    found = probe_of(token_ids).observe(model)["gradient_norm"]
    for layer, block in enumerate(blocks_of(model)):
        if layer == 1:
            assert math.isnan(found[layer])
        else:
            every = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
            assert found[layer] == pytest.approx(every.norm().item(), rel=1e-5)


def test_slopes_of_layers_and_of_the_network(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    for layer, block in enumerate(tiny_gpt2.transformer.h):
        block.mlp.act = LearnableLeakyReLU(0.1 * layer)
    assert probe_of(token_ids).observe(tiny_gpt2)["slopes"] == pytest.approx([0.0, 0.1, 0.2])
    shared = tiny_gpt2.transformer.h[1].mlp.act
    for block in tiny_gpt2.transformer.h:
        block.mlp.act = shared
    assert probe_of(token_ids).observe(tiny_gpt2)["slopes"] == pytest.approx([0.1])


def test_a_model_that_overflows_float16_shows_where(token_ids: Tensor) -> None:
    model = without_norms(tiny_neox(parallel=False))
    with torch.no_grad():
        blocks_of(model)[0].mlp.dense_4h_to_h.weight.mul_(1e6)  # enormous, and finite in float32
    exact = probe_of(token_ids).observe(model)
    assert exact["nan_counts"] == [0, 0] and exact["nonfinite_residual"] == [0, 0, 0]
    narrow = probe_of(token_ids, precision="float16").observe(model)
    assert narrow["nan_counts"][0] == 0 and narrow["nan_counts"][1] > 0
    assert narrow["nonfinite_residual"][0] == 0 and narrow["nonfinite_residual"][1] > 0
    assert all(math.isfinite(value) for value in narrow["entropy"][0])
    assert all(math.isnan(value) for value in narrow["entropy"][1])


def test_nothing_is_left_behind(model: PreTrainedModel, token_ids: Tensor) -> None:
    model(token_ids, labels=token_ids).loss.backward()
    model.train()
    blocks_of(model)[0].eval()
    modes = [module.training for module in model.modules()]
    before = weights_sha256(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    attention, state = model.config._attn_implementation, torch.get_rng_state()

    first = probe_of(token_ids).observe(model)

    assert [module.training for module in model.modules()] == modes
    assert weights_sha256(model) == before
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert model.config._attn_implementation == attention and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert probe_of(token_ids).observe(model) == first


@pytest.mark.parametrize("removal", [True, False])
def test_training_is_bitwise_the_same_with_and_without(tmp_path: Path, removal: bool) -> None:
    def trained(name: str, probe: Probe | None) -> TinyRun:
        run = TinyRun(tmp_path / name, spec=tiny_spec(steps=20), removal=removal)
        run.train(micro_batch=4, probe=probe)
        return run

    tokens = torch.randint(0, 60, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    plain = trained("plain", None)
    watched = trained("watched", Probe(tokens, every=3, steps=20))
    assert weights_sha256(plain.model) == weights_sha256(watched.model)
    assert plain.losses() == watched.losses()
    rows = watched.metrics("observation")
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12, 15, 18, 19]
    assert all(len(row["residual_norm"]) == 3 and all(norm > 0 for norm in row["gradient_norm"]) for row in rows)
    assert plain.metrics("observation") == []


def test_a_compiled_step_is_not_compiled_again(tmp_path: Path) -> None:
    torch._dynamo.reset()  # a graph of another test would have to be compiled again
    run = TinyRun(tmp_path / "run", spec=tiny_spec(steps=20))
    run.objective.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    probe = Probe(torch.zeros(2, CONTEXT, dtype=torch.int64), every=9, steps=20)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run.train(probe=probe)
    assert len(run.metrics("observation")) == 4
