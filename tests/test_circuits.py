"""Circuits from weights: the scores of TransformerLens, planted heads, and attention scores that are sums over source pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import done, refused
from disarmed_model import disarm
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal import NormFreeGPT2LMHeadModel, from_disarmed, to_bridge
from ln_removal.interpret import folded_weights, score_terms, token_table, weight_circuits
from ln_removal.interpret.circuits import COMPOSITIONS, ScoreTerms


class TestScoresBySourcePair:
    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_patterns(self, request: pytest.FixtureRequest, token_ids: Tensor, fixture: str, layer: int) -> None:
        bridge = to_bridge(request.getfixturevalue(fixture))
        _, cache = bridge.run_with_cache(token_ids)
        for head in range(4):
            found = score_terms(bridge, token_ids, layer, head)
            assert found.pattern.dtype == torch.float64 and found.pattern_error < 1e-10
            expected = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
            torch.testing.assert_close(found.pattern, expected, rtol=0, atol=1e-10)
            scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][:, head].tril()
            torch.testing.assert_close(found.terms.sum((0, 1)), scores, rtol=0, atol=1e-10)
            assert len(found.sources) == found.terms.shape[0] == found.terms.shape[1] == 3 + 2 * layer
            assert found.shares().sum() == pytest.approx(1)

    def test_scaled_by_layer(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """Some GPT-2s divide the scores of layer l by l + 1."""
        config = GPT2Config(**{**tiny_gpt2.config.to_dict(), "scale_attn_by_inverse_layer_idx": True})
        model = GPT2LMHeadModel(config).eval().double()
        assert score_terms(to_bridge(model), token_ids, 2, 1).pattern_error < 1e-10

    def test_a_constant_of_a_query_has_no_share(self) -> None:
        """A term that is the same for all keys of a query changes nothing."""
        keys = torch.randn(1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
        constant = (100 * torch.ones(1, 6, 6, dtype=torch.float64)).tril()
        terms = torch.stack([torch.stack([keys, torch.zeros_like(keys)]), torch.stack([constant, -0.5 * keys])])
        found = ScoreTerms(["a", "b"], terms, keys, 0.0).shares()
        assert found == pytest.approx(np.array([[2, 0], [0, -1]]), abs=1e-9)


class TestAgainstTransformerLens:
    @pytest.mark.parametrize("kind", COMPOSITIONS)
    def test_composition_without_norms(self, ln_free: GPT2LMHeadModel, kind: str) -> None:
        bridge = to_bridge(ln_free)
        expected = bridge.all_composition_scores(kind).scores.detach().numpy()
        np.testing.assert_allclose(weight_circuits(bridge).composition[kind], expected, atol=1e-10)  # type: ignore[index]

    @pytest.mark.parametrize("kind", COMPOSITIONS)
    def test_composition_with_norms(self, with_norms: GPT2LMHeadModel, kind: str) -> None:
        """As TransformerLens gives them once it has folded the norms."""
        found = weight_circuits(to_bridge(with_norms)).composition[kind]  # type: ignore[index]
        theirs = to_bridge(with_norms)
        unfolded = theirs.all_composition_scores(kind).scores.detach().numpy()
        theirs.enable_compatibility_mode(
            disable_warnings=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        np.testing.assert_allclose(found, theirs.all_composition_scores(kind).scores.detach().numpy(), atol=1e-5)
        assert np.abs(found - unfolded).max() > 0.01

    def test_factored_matrices(self, ln_free: GPT2LMHeadModel) -> None:
        bridge = to_bridge(ln_free)
        found = folded_weights(bridge)
        torch.testing.assert_close(found.OV.AB, bridge.OV.AB.detach())
        torch.testing.assert_close(found.QK.AB, bridge.QK.AB.detach())

    def test_eigenvalues_by_brute_force(self, with_norms: GPT2LMHeadModel) -> None:
        """Of the whole matrices, vocabulary by vocabulary."""
        bridge = to_bridge(with_norms)
        found, weights = weight_circuits(bridge), folded_weights(bridge)
        for layer, head in ((0, 0), (2, 3)):
            ov = weights.W_E @ weights.OV.AB[layer, head] @ weights.W_U
            qk = weights.W_E @ weights.QK.AB[layer, head] @ weights.W_E.T
            for matrix, score in ((ov, found.copying), (qk, found.matching)):
                values = torch.linalg.eigvals(matrix)
                expected = float(values.real.sum() / values.abs().sum())
                assert score[layer, head] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    def test_copying_with_the_first_mlp(self, request: pytest.FixtureRequest, fixture: str) -> None:
        """The tokens' vectors are what the first block of the model itself writes with its MLP for a token on its own."""
        model = request.getfixturevalue(fixture)
        written: list[Tensor] = []
        handle = model.transformer.h[0].mlp.register_forward_hook(lambda *given: written.append(given[-1][:, 0]))
        with torch.no_grad():
            model.transformer.h[0]((model.transformer.wte.weight + model.transformer.wpe.weight.mean(0))[:, None])
        handle.remove()
        bridge = to_bridge(model)
        found, weights = weight_circuits(bridge), folded_weights(bridge)
        assert np.isnan(found.mlp_copying[0]).all() and np.isfinite(found.mlp_copying[1:]).all()
        for layer, head in ((1, 0), (2, 3)):
            values = torch.linalg.eigvals(written[0] @ weights.OV.AB[layer, head] @ weights.W_U)
            expected = float(values.real.sum() / values.abs().sum())
            assert found.mlp_copying[layer, head] == pytest.approx(expected, abs=1e-6)
            assert abs(expected - found.copying[layer, head]) > 1e-3


def copier(sign: float) -> NormFreeGPT2LMHeadModel:
    """An attention-only model of two layers: L1H0 looks for its own token and copies it (or, with -1, suppresses it)."""
    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False)
    model = from_disarmed(disarm(GPT2LMHeadModel(config).eval())).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        tokens = torch.eye(16, 32, dtype=torch.float64)
        model.transformer.wte.weight.copy_(tokens)
        model.lm_head.weight.copy_(tokens)
        block = model.transformer.h[1].attn
        read = torch.eye(32, 16, dtype=torch.float64)
        for part in range(3):  # queries, keys and values of head 0
            block.c_attn.weight[:, 32 * part : 32 * part + 16] = read
        block.c_proj.weight[:16] = sign * read.T
    return model


class TestPlanted:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_a_head_that_copies(self, sign: float) -> None:
        found = weight_circuits(to_bridge(copier(sign)))
        assert found.copying[1, 0] == pytest.approx(sign, abs=1e-6)
        assert found.matching[1, 0] == pytest.approx(1)
        assert np.delete(found.copying.ravel(), 2).tolist() == [0, 0, 0]

    def test_its_token_table(self) -> None:
        rows = token_table(to_bridge(copier(1.0)), 1, 0, [3, 7], count=2)
        assert [row[0][0] for row in rows] == [3, 7]
        assert rows[0][0][1] == pytest.approx(15 / 16) and rows[0][1][1] == pytest.approx(-1 / 16)

    def test_its_score_is_of_the_token_embedding(self) -> None:
        """Query and key both read the token, and no other pair has a share."""
        ids = torch.tensor([[1, 2, 3, 1, 2, 3, 5, 1]])
        found = score_terms(to_bridge(copier(1.0)), ids, 1, 0)
        shares = dict(np.ndenumerate(found.shares()))
        token = found.sources.index("embed")
        assert shares.pop((token, token)) == pytest.approx(1) and all(abs(share) < 1e-12 for share in shares.values())
        assert found.pattern[0, 7, 0] == found.pattern[0, 7, 3] == found.pattern[0, 7].max()

    def test_an_induction_head(self) -> None:
        """L0H1 writes the previous token, which the keys of L1H0 read: the strongest K-composition."""
        model = copier(1.0)
        with torch.no_grad():
            first, second = model.transformer.h[0].attn, model.transformer.h[1].attn
            token, previous = torch.eye(32, 16, dtype=torch.float64), torch.eye(32, dtype=torch.float64)[:, 16:]
            first.c_attn.weight[:, 64 + 16 : 64 + 32] = token  # values of head 1 read the token
            first.c_proj.weight[16:] = previous.T  # and it writes where nothing else does
            second.c_attn.weight[:, 32 : 32 + 16] = previous  # keys of L1H0 read that
        found = weight_circuits(to_bridge(model))
        assert found.strongest("K")[0][0] == "L0H1 -> L1H0" and found.strongest("K")[0][1] > 0.2
        assert found.strongest("Q") == [] and found.strongest("V") == []


def test_command(here: Path) -> None:
    said = done("ln-analyze circuits run --documents 2 --length 16 --out new/found").stdout
    assert "copying" in said and "L1H1" in said
    found = json.loads(Path("new/found/circuits.json").read_text())
    for one in found["models"].values():
        assert np.max(one["pattern_error"]) < 1e-10
        assert one["copying_score_with_first_mlp"][0] == [None, None]
        assert all(-1 <= score <= 1 for score in one["copying_score_with_first_mlp"][1])
        assert np.shape(one["copying_score"]) == (2, 2) and np.shape(one["composition_score"]["K"]) == (2, 2, 2, 2)
    assert found["head"] in said and len(found["models"]["control"]["raised_tokens"]) == 8
    assert "L1H1" in refused("ln-analyze circuits run --head L1H2 --documents 1 --length 8 --out new/found")
    names = {path.name for path in Path("new/found").iterdir()}
    assert {"circuits-heads.png", "circuits-eigenvalues.pdf", "circuits-composition.png"} <= names
