"""Entropy neurons: one that is planted into the null space of the unembedding, and the formulas against whole runs of the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from disarmed_model import disarm
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel

from ln_removal import from_disarmed, to_bridge
from ln_removal.interpret import neuron_effects
from ln_removal.interpret.neurons import _final, _first_order, candidates

PLANTED = 77


@pytest.fixture
def planted(tiny_gpt2: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """With a neuron of the last MLP that writes much into a direction which the unembedding does not read."""
    tiny_gpt2.double()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction -= direction.mean()  # LayerNorm would take its mean away
    direction /= direction.norm()
    with torch.no_grad():
        unembedding = tiny_gpt2.lm_head.weight
        unembedding -= torch.outer(unembedding @ direction, direction)
        tiny_gpt2.transformer.ln_f.weight.fill_(1)
        tiny_gpt2.transformer.h[-1].mlp.c_proj.weight[PLANTED] = 20 * direction
    return tiny_gpt2


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


class TestPlanted:
    def test_with_norms_all_of_its_effect_goes_through_the_norm(
        self, planted: GPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        bridge = to_bridge(planted)
        assert PLANTED in candidates(bridge, token_ids, 2)
        found = neuron_effects(bridge, token_ids, [3, PLANTED])
        assert found.variance.argmin() == PLANTED and found.variance[PLANTED] < 1e-12
        assert found.norm[PLANTED] == pytest.approx(20)
        assert found.effect[1] > 0.03 and np.abs(found.entropy_frozen[1]).max() < 1e-12
        assert found.mediated[1] == pytest.approx(1) and found.mediated_interval(1).low == pytest.approx(1)
        assert found.mediated[0] < 0.9

    def test_without_norms_it_does_nothing(self, planted: GPT2LMHeadModel, token_ids: Tensor) -> None:
        bridge = to_bridge(from_disarmed(disarm(planted)))
        found = neuron_effects(bridge, token_ids, [3, PLANTED])
        assert found.variance[PLANTED] < 1e-12 and found.effect[1] < 1e-12
        assert found.effect[0] > 1e-4 and found.mediated[0] == 0 and np.array_equal(found.loss_total, found.loss_frozen)
        document = found.to_json()
        assert document["ablated"]["share_mediated_by_norm"] == [0, None]
        json.dumps(document, allow_nan=False)


class TestAgainstWholeRuns:
    @pytest.mark.parametrize("norms", [True, False])
    def test_ablation(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, norms: bool) -> None:
        """The neuron is set to its mean by a hook; the frozen change divides the changed stream by the sigma of the old one."""
        model = tiny_gpt2.double() if norms else from_disarmed(disarm(tiny_gpt2)).double()
        bridge: TransformerBridge = to_bridge(model)
        found = neuron_effects(bridge, token_ids, [0, 50, 127])
        logits, cache = bridge.run_with_cache(token_ids)
        activation = cache["blocks.2.mlp.hook_post"]
        mean = activation[:, :-1].mean((0, 1))
        places = np.linspace(0, 22, 16).round().astype(int)
        right = token_ids[:, 1:, None]
        before = cache["ln_final.hook_in"]
        for row, neuron in enumerate((0, 50, 127)):

            def ablate(post: Tensor, hook: object, neuron: int = neuron) -> Tensor:
                post = post.clone()
                post[..., neuron] = mean[neuron]
                return post

            streams: list[Tensor] = []

            def keep(x: Tensor, hook: object, streams: list[Tensor] = streams) -> None:
                streams.append(x)

            with torch.no_grad():
                total = bridge.run_with_hooks(
                    token_ids, fwd_hooks=[("blocks.2.mlp.hook_post", ablate), ("ln_final.hook_in", keep)]
                )
                frozen = total
                if norms:
                    x, norm = streams[0], model.transformer.ln_f
                    sigma = (before.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
                    frozen = model.lm_head((x - x.mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias)
            for got, after in ((found.entropy_total, total), (found.entropy_frozen, frozen)):
                expected = (entropy(after) - entropy(logits))[:, places]
                np.testing.assert_allclose(got[row], expected.detach().numpy(), atol=1e-11)
            for got, after in ((found.loss_total, total), (found.loss_frozen, frozen)):
                change = after[:, :-1].log_softmax(-1).gather(-1, right) - logits[:, :-1].log_softmax(-1).gather(
                    -1, right
                )
                np.testing.assert_allclose(got[row], -change[:, places, 0].detach().numpy(), atol=1e-11)

    @pytest.mark.parametrize("norms", [True, False])
    def test_weights_and_correlation(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, norms: bool) -> None:
        model = tiny_gpt2.double() if norms else from_disarmed(disarm(tiny_gpt2)).double()
        bridge = to_bridge(model)
        found = neuron_effects(bridge, token_ids, [0])
        logits, cache = bridge.run_with_cache(token_ids)
        written = model.transformer.h[2].mlp.c_proj.weight.detach().numpy()
        columns = model.lm_head.weight.detach().numpy()  # (V, D)
        if norms:
            columns = columns * model.transformer.ln_f.weight.detach().numpy()
            columns = columns - columns.mean(axis=1, keepdims=True)
        entropies = entropy(logits)[:, :-1].detach().numpy().ravel()
        for neuron in (0, 9, 127):
            w = written[neuron]
            assert found.norm[neuron] == pytest.approx(np.sqrt((w**2).sum()))
            cosines = [w @ u / np.linalg.norm(w) / np.linalg.norm(u) for u in columns]
            assert found.variance[neuron] == pytest.approx(np.var(cosines))
            activation = cache["blocks.2.mlp.hook_post"][:, :-1, neuron].numpy().ravel()
            assert found.correlation[neuron] == pytest.approx(np.corrcoef(activation, entropies)[0, 1])

    def test_interval_is_over_documents(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        found = neuron_effects(to_bridge(tiny_gpt2.double()), token_ids, [0, 1, 2])
        overall = found.overall_mediated()
        expected = 1 - np.abs(found.entropy_frozen).sum() / np.abs(found.entropy_total).sum()
        assert overall.value == pytest.approx(expected) and overall.low <= overall.value <= overall.high


def test_candidates(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    bridge = to_bridge(tiny_gpt2.double())
    some = candidates(bridge, token_ids, 10)
    assert len(set(some)) == 10 and some == candidates(bridge, token_ids, 10) != candidates(
        bridge, token_ids, 10, seed=1
    )
    assert candidates(bridge, token_ids, 1000) == list(range(128))
    every = neuron_effects(bridge, token_ids, range(128))
    through = every.effect - np.abs(every.entropy_frozen).mean(axis=(1, 2))
    assert len(set(candidates(bridge, token_ids, 40)) & set(np.argsort(-through)[:10].tolist())) >= 9


@pytest.mark.parametrize("norms", [True, False])
def test_first_order(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, norms: bool) -> None:
    """The estimates are the derivatives of the model's entropy, and with sigma frozen of the entropy with a constant sigma."""
    model = tiny_gpt2.double() if norms else from_disarmed(disarm(tiny_gpt2)).double()
    bridge = to_bridge(model)
    stream = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    written = bridge.W_out[-1][:4].detach()
    found = _first_order(_final(bridge), stream, change, written)
    for frozen in (False, True):
        x = stream.clone().requires_grad_()
        if norms:
            sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            norm = model.transformer.ln_f
            read = (x - x.mean(-1, keepdim=True)) / (sigma.detach() if frozen else sigma) * norm.weight + norm.bias
        else:
            read = x
        (gradient,) = torch.autograd.grad(entropy(model.lm_head(read)).sum(), x)
        expected = (change * (gradient @ written.T)).abs().mean(0)
        np.testing.assert_allclose(found[int(frozen)], expected.numpy(), atol=1e-12)
