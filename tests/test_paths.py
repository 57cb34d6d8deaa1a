"""Path expansion: the terms sum to the logits, each is the sum of its paths, and a planted path is found."""

from __future__ import annotations

import json
from itertools import combinations, product
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import done
from disarmed_model import disarm
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal import from_disarmed, to_bridge
from ln_removal.interpret import expand, path_sums
from ln_removal.interpret.paths import GROUPS, named_paths


class TestSum:
    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    def test_to_the_logits(self, request: pytest.FixtureRequest, token_ids: Tensor, fixture: str) -> None:
        bridge = to_bridge(request.getfixturevalue(fixture))
        found = expand(bridge, token_ids)
        assert found.streams.dtype == torch.float64
        assert found.sum_error(bridge) < 1e-10
        torch.testing.assert_close(found.streams.sum(0), found.residual, rtol=0, atol=1e-10)

    def test_every_path_is_in_a_term(self, ln_free: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """3 layers of 4 heads: (1 + 4)^3 paths from each embedding, and those from MLPs and biases."""
        found = path_sums(to_bridge(ln_free), token_ids[:1], named=False)
        assert found.paths == 2 * 5**3 + 2 * (5**2 + 5 + 1)
        assert len(found.terms) == 2 * 4 + 2 * (3 + 2 + 1)
        assert found.orders == [0, 1, 2, 3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_an_order_zero_model_is_a_bigram_model(self, dtype: torch.dtype) -> None:
        """Without layers that write, the token and position embeddings are all there is."""
        config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        model = from_disarmed(disarm(GPT2LMHeadModel(config).eval())).to(dtype)
        with torch.no_grad():
            for layer in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        found = path_sums(to_bridge(model), torch.arange(12)[None])
        groups = dict(zip(GROUPS, np.abs(found.by_group_and_order()).sum(axis=1), strict=True))
        assert groups["token"] > 0 and groups["position"] > 0 and groups["MLPs"] == groups["attention biases"] == 0


class TestAgainstBruteForce:
    def test_each_term_is_the_sum_of_its_paths(self, ln_free: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """Every path from the embeddings multiplied out, matrix by matrix, from weights and the model's own patterns."""
        bridge = to_bridge(ln_free)
        ids = token_ids[:1]
        found = expand(bridge, ids)
        _, cache = bridge.run_with_cache(ids)
        streams = {(term.source, term.order): stream for term, stream in zip(found.terms, found.streams, strict=True)}
        with torch.no_grad():
            for source, hook in (("embed", "hook_embed"), ("pos_embed", "hook_pos_embed")):
                for order in range(4):
                    total, count = torch.zeros_like(found.residual[0]), 0
                    for layers in combinations(range(3), order):
                        for heads in product(range(4), repeat=order):
                            x = cache[hook][0]
                            for layer, head in zip(layers, heads, strict=True):
                                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
                                x = pattern @ x @ bridge.W_V[layer, head] @ bridge.W_O[layer, head]
                            total, count = total + x, count + 1
                    assert count == comb(3, order) * 4**order
                    torch.testing.assert_close(streams[source, order][0], total, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    def test_named_paths_sum_to_their_terms(
        self, request: pytest.FixtureRequest, token_ids: Tensor, fixture: str
    ) -> None:
        """Those with no, one and two heads, also through norms."""
        bridge = to_bridge(request.getfixturevalue(fixture))
        found = path_sums(bridge, token_ids, "difference", named=False)
        sums: dict[tuple[str, int], np.ndarray] = {}
        for row in range(4):
            for name, values in named_paths(bridge, token_ids[row : row + 1], "difference"):
                source, *heads = name.split(" -> ")
                total = sums.setdefault((source, len(heads)), np.zeros((4, 23)))
                total[row] += values[0]
        for term, expected in zip(found.terms, found.effects.attribution, strict=True):
            if term.order <= 2:
                np.testing.assert_allclose(sums[term.source, term.order], expected, atol=1e-10, err_msg=str(term))

    def test_a_planted_path(self, ln_free: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """Only L0H1 and L2H3 write, so no path goes through another head, and the one through both is there."""
        with torch.no_grad():
            for layer, head in ((0, 1), (1, None), (2, 3)):
                kept = ln_free.transformer.h[layer].attn.c_proj.weight
                for other in range(4):
                    if other != head:
                        kept[8 * other : 8 * other + 8] = 0
        found = path_sums(to_bridge(ln_free), token_ids)
        sizes = {path.name: path.size for path in found.named}
        assert sizes["embed -> L0H1 -> L2H3"] > 1e-5
        assert all(size == 0 for name, size in sizes.items() if set(name.split(" -> ")[1:]) - {"L0H1", "L2H3"})
        assert found.by_group_and_order()[:, 3].tolist() == [0, 0, 0, 0]


class TestEffects:
    def test_exact_only_without_norms(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        ln_free = from_disarmed(disarm(tiny_gpt2)).double()
        for model, low, high in ((ln_free, 0, 1e-10), (tiny_gpt2.double(), 5, 1e4)):
            found = path_sums(to_bridge(model), token_ids, named=False)
            for order in found.orders:
                assert low <= found.error_of_order(order).value < high, (type(model), order)

    def test_orders_groups_and_the_bias_make_the_logit(self, ln_free: GPT2LMHeadModel, token_ids: Tensor) -> None:
        bridge = to_bridge(ln_free)
        found = path_sums(bridge, token_ids, "correct", named=False)
        with torch.no_grad():
            right = token_ids[:, 1:]
            mean = (bridge(token_ids)[:, :-1].gather(-1, right[..., None])[..., 0] - bridge.b_U[right]).mean()
        assert sum(one.value for one in found.by_order()) == pytest.approx(float(mean), abs=1e-10)
        assert sum(one.value for one in found.by_group().values()) == pytest.approx(float(mean), abs=1e-10)
        assert found.by_group_and_order().sum() == pytest.approx(float(mean), abs=1e-10)


def test_command(here: Path) -> None:
    said = done("ln-analyze paths run --documents 2 --length 16 --out new/found").stdout
    assert "embed" in said and "2 heads" in said
    found = json.loads(Path("new/found/paths.json").read_text())
    assert found["models"]["ln_free"]["sum_error_logits"] < 1e-10
    errors = {
        role: max(order["ablation_error_per_cent"]["value"] for order in one["by_order"])
        for role, one in found["models"].items()
    }
    assert errors["ln_free"] < 1e-9 and errors["original"] > 1 and errors["control"] > 1
    assert {"paths-orders.png", "paths-orders.pdf"} <= {path.name for path in Path("new/found").iterdir()}
