"""Attention heads, the residual stream and the logit lens: planted cases, and formulas against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from disarmed_model import disarm
from torch import Tensor
from transformer_lens import head_detector
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel

from ln_removal import from_disarmed, to_bridge
from ln_removal.errors import UserError
from ln_removal.interpret import head_scores, heads, layer_predictions, passes, residual_shape
from ln_removal.interpret.models import Documents
from ln_removal.interpret.streams import CLASSES, joined
from ln_removal.models.attention import largest_entropy
from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel

EOT = 100


@pytest.fixture(params=["with norms", "ln-free"])
def bridge(request: pytest.FixtureRequest, tiny_gpt2: GPT2LMHeadModel) -> TransformerBridge:
    return to_bridge(tiny_gpt2.double() if request.param == "with norms" else from_disarmed(disarm(tiny_gpt2)).double())


VOCABULARY, POSITIONS, HEAD = 20, 24, 32


@pytest.fixture
def planted() -> TransformerBridge:
    """Two layers of two heads each, made by hand: previous token, sink; induction, duplicate token.

    The residual stream holds the token, the position, and the token before, each as a unit vector.
    """
    token, position, before = (slice(0, 20), slice(20, 44), slice(44, 64))
    config = NormFreeGPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = NormFreeGPT2LMHeadModel(config).eval()
    strong = 200.0 * math.sqrt(HEAD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, token] = torch.eye(VOCABULARY)
        model.transformer.wpe.weight[:, position] = torch.eye(POSITIONS)
        first, second = (block.attn for block in model.transformer.h)
        weights, biases = first.c_attn.weight, first.c_attn.bias
        for place in range(1, POSITIONS):  # a query asks for the position before its own
            weights[20 + place, :POSITIONS] = strong * torch.eye(POSITIONS)[place - 1]
        weights[position, 64 : 64 + POSITIONS] = torch.eye(POSITIONS)
        weights[token, 128 : 128 + VOCABULARY] = torch.eye(VOCABULARY)
        first.c_proj.weight[:VOCABULARY, before] = torch.eye(VOCABULARY)
        biases[HEAD] = strong  # the other head's queries all ask for position 0
        weights[position, 64 + HEAD : 64 + HEAD + POSITIONS] = torch.eye(POSITIONS)
        weights = second.c_attn.weight
        weights[token, :VOCABULARY] = strong * torch.eye(VOCABULARY)
        weights[before, 64 : 64 + VOCABULARY] = torch.eye(VOCABULARY)
        weights[token, HEAD : HEAD + VOCABULARY] = strong * torch.eye(VOCABULARY)
        weights[token, 64 + HEAD : 64 + HEAD + VOCABULARY] = torch.eye(VOCABULARY)
    return to_bridge(model.double())


class TestHeads:
    def test_planted_heads(self, planted: TransformerBridge) -> None:
        """What each head was made for is 1, or what follows from its construction; a head that finds nothing is uniform."""
        texts = torch.stack([torch.arange(12), torch.arange(12).flip(0)])
        period = 10
        copies = torch.stack(
            [torch.randperm(20, generator=torch.Generator().manual_seed(n))[:period] for n in range(3)]
        )
        found = head_scores(planted, texts, copies.repeat(1, 2))
        previous, sink, induction, duplicate = (0, 0), (0, 1), (1, 0), (1, 1)
        by_head = {score: found.by_head(score) for score in heads.SCORES}

        for score in ("published_sink_rate", "later_sink_rate", "sink_heads"):
            assert by_head[score][sink] == pytest.approx(1), score
        assert by_head["entropy"][sink] == pytest.approx(0, abs=1e-9)
        assert found.strongest("published_sink_rate") == sink

        assert by_head["previous"][previous] == pytest.approx(1)
        assert (
            by_head["published_sink_rate"][previous] == pytest.approx(2 / 12)
            and by_head["later_sink_rate"][previous] == 0
        )

        # Position 0 has no token before it, so it holds its own there; the first query of the second copy also looks at it.
        assert by_head["induction"][induction] == pytest.approx((period - 0.5) / period)
        assert found.strongest("induction") == induction
        # Half of the attention is on the query's own place.
        assert by_head["duplicate"][duplicate] == pytest.approx(0.5)
        assert found.strongest("duplicate") == duplicate

        # In a text without repetition the induction head attends uniformly: 1, 1/2 and 1/3 pass the threshold.
        assert by_head["published_sink_rate"][induction] == pytest.approx(3 / 12)
        assert by_head["later_sink_rate"][induction] == 0 and by_head["sink_heads"][induction] == 0
        assert by_head["entropy"][induction] == pytest.approx(largest_entropy(12))

    def test_against_loops(self, bridge: TransformerBridge, token_ids: Tensor) -> None:
        """On random models, every score by its formula, head by head and query by query."""
        copies = token_ids[:2, :10].repeat(1, 2)
        found = head_scores(bridge, token_ids, copies)
        patterns, copied = (
            np.stack(
                [bridge.run_with_cache(ids)[1][f"blocks.{layer}.attn.hook_pattern"].numpy() for layer in range(3)], 1
            )
            for ids in (token_ids, copies)
        )
        assert patterns.dtype == np.float64
        for n, layer, head in np.ndindex(4, 3, 4):
            rows = patterns[n, layer, head]
            expected = {
                "published_sink_rate": np.mean([row[0] > 0.3 for row in rows]),
                "later_sink_rate": np.mean([row[0] > 0.3 for row in rows[3:]]),
                "sink_heads": float(np.mean([row[0] for row in rows]) > 0.3),
                "entropy": np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in rows]),
                "previous": np.mean([rows[t, t - 1] for t in range(1, 24)]),
            }
            for score, value in expected.items():
                assert found.values[score][n, layer, head] == pytest.approx(value, abs=1e-12), (score, n, layer, head)  # type: ignore[index]
        for n, layer, head in np.ndindex(2, 3, 4):
            text, rows = copies[n].tolist(), copied[n, layer, head]
            for score, behind in (("duplicate", 0), ("induction", 1)):
                sums = []
                for t in range(20):
                    places = [s + behind for s in range(t) if text[s] == text[t]]
                    if places:
                        sums.append(sum(rows[t, place] for place in places))
                assert found.values[score][n, layer, head] == pytest.approx(np.mean(sums), abs=1e-12), score  # type: ignore[index]

    def test_against_transformer_lens(self, bridge: TransformerBridge, token_ids: Tensor) -> None:
        """Its detector divides by all queries, ours by those that have something to look at."""
        copies = torch.arange(10)[None].repeat(1, 2)
        found = head_scores(bridge, token_ids, copies)
        _, cache = bridge.run_with_cache(copies)
        mask = head_detector.get_induction_head_detection_pattern(copies)
        for layer, head in np.ndindex(3, 4):
            theirs = head_detector.compute_head_attention_similarity_score(
                cache[f"blocks.{layer}.attn.hook_pattern"][0, head], mask, exclude_bos=False,
                exclude_current_token=False, error_measure="mul",
            )  # fmt: skip
            assert found.by_head("induction")[layer, head] == pytest.approx(20 / 10 * theirs)

    def test_batches_do_not_matter(
        self, bridge: TransformerBridge, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = head_scores(bridge, token_ids, token_ids.repeat(1, 1))
        monkeypatch.setattr(passes, "VALUES_IN_A_PASS", 1)
        alone = head_scores(bridge, token_ids, token_ids)
        for score in heads.SCORES:
            np.testing.assert_allclose(whole.values[score], alone.values[score], atol=1e-12)


class TestResidualStream:
    def test_against_loops(self, bridge: TransformerBridge, token_ids: Tensor) -> None:
        """Every quantity by its formula, site by site and class by class; ranks by a singular value decomposition."""
        found = residual_shape(bridge, token_ids, EOT)
        _, cache = bridge.run_with_cache(token_ids)
        assert found.sites == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
        assert found.counts.sum(-1).tolist() == [4 * 24 - 7, 3, 4]
        names = [f"blocks.{n}.hook_resid_{place}" for n in range(3) for place in ("pre", "mid")] + [
            "blocks.2.hook_resid_post"
        ]
        for site, name in enumerate(names):
            stream = cache[name].numpy()
            by_class: dict[str, list[np.ndarray]] = {title: [] for title in CLASSES}
            for n, t in np.ndindex(4, 24):
                title = "position 0" if t == 0 else "end of text" if token_ids[n, t] == EOT else "ordinary"
                by_class[title].append(stream[n, t])
            for place, title in enumerate(CLASSES):
                x = np.stack(by_class[title])
                size = np.linalg.norm(x, axis=1)
                mean = x.mean(axis=0)
                values = np.linalg.svd(x - mean, compute_uv=False)[: len(x) - 1]
                share = values / values.sum()
                expected = {
                    "l2": size.mean(),
                    "cosine_to_mean": (x @ mean / size / np.linalg.norm(mean)).mean(),
                }
                for quantity, value in expected.items():
                    assert found.mean(quantity)[site, place] == pytest.approx(value, abs=1e-10), (name, title, quantity)
                ratio = np.mean([np.abs(row).max() / np.median(np.abs(row)) for row in x])
                assert found.mean("max_over_median")[site, place] == pytest.approx(ratio, rel=1e-10)
                rank = math.exp(-(share * np.log(share)).sum())
                assert found.effective_rank[site, place] == pytest.approx(rank, rel=1e-5), (name, title)

    def test_positions_that_are_all_the_same_have_no_rank(self, bridge: TransformerBridge) -> None:
        ids = torch.randint(0, EOT, (5, 9), generator=torch.Generator().manual_seed(0))
        ids[:, 0] = EOT  # a BOS
        found = residual_shape(bridge, ids, EOT)
        assert np.isnan(found.effective_rank[:, 2]).all() and found.mean("cosine_to_mean")[:, 2] == pytest.approx(1)
        assert (found.counts[1] == 0).all() and np.isnan(found.mean("l2")[:, 1]).all()
        document = found.to_json()
        assert document["end_of_text"]["l2"][0]["value"] is None and document["position_0"]["effective_rank"][0] is None
        assert document["ordinary"]["l2"][0]["low"] < document["ordinary"]["l2"][0]["high"]

    def test_rank_of_a_plane(self) -> None:
        """Points in two directions of the same spread have an effective rank of 2, whatever their mean."""
        from ln_removal.interpret.streams import _effective_ranks

        x = torch.zeros(4, 16, dtype=torch.float64)
        x[0, 3], x[1, 3], x[2, 7], x[3, 7] = 2, -2, 2, -2
        x += 50
        mean = x.mean(0)
        found = _effective_ranks((x.T @ x)[None, None], mean[None, None], torch.tensor([4.0]))
        assert found[0, 0] == pytest.approx(2, abs=1e-4)

    @pytest.mark.parametrize("bos", [False, True])
    def test_texts_are_pairs_of_documents(self, bos: bool) -> None:
        rows = np.arange(15).reshape(3, 5)
        if bos:
            rows[:, 0] = EOT
        texts = joined(Documents(rows, bos, "documents", "", 0), EOT)
        assert texts.tolist() == [[*rows[0], *([] if bos else [EOT]), *rows[1]]]
        with pytest.raises(UserError, match="two"):
            joined(Documents(rows[:1], bos, "documents", "", 0), EOT)


class TestLens:
    def test_against_loops(self, bridge: TransformerBridge, token_ids: Tensor) -> None:
        """The model's own final norm and unembedding of each layer, and the output at the last."""
        found = layer_predictions(bridge, token_ids, top=3)
        logits, cache = bridge.run_with_cache(token_ids)
        streams = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(3)] + [cache["blocks.2.hook_resid_post"]]
        assert found.layers == ["0_pre", "1_pre", "2_pre", "final_post"] and found.top_logits.dtype == np.float64
        output = logits.log_softmax(-1)
        for layer, stream in enumerate(streams):
            with torch.no_grad():
                read = bridge.ln_final(stream) @ bridge.W_U + bridge.b_U
            log_probs = read.log_softmax(-1)
            for n, t in np.ndindex(4, 23):
                order = read[n, t].argsort(descending=True)
                right = int(token_ids[n, t + 1])
                assert found.top_tokens[layer, n, t].tolist() == order[:3].tolist()
                assert found.rank[layer, n, t] == order.tolist().index(right)
                kl = sum(
                    math.exp(p) * (p - q) for p, q in zip(output[n, t].tolist(), log_probs[n, t].tolist(), strict=True)
                )
                assert found.divergence[layer, n, t] == pytest.approx(kl, abs=1e-11)
                assert found.loss[layer, n, t] == pytest.approx(-float(log_probs[n, t, right]), abs=1e-11)
                assert found.top_logits[layer, n, t] == pytest.approx(read[n, t, order[:3]].tolist(), abs=1e-11)
        assert np.abs(found.divergence[-1]).max() < 1e-12
        assert found.top_logits[-1] == pytest.approx(logits[:, :-1].topk(3).values.detach().numpy(), abs=1e-11)

    def test_without_norms_a_layer_adds_its_direct_effects(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """The logits of two layers differ by what the block between them writes times the unembedding; with norms they do not."""
        for model, exact in ((from_disarmed(disarm(tiny_gpt2)), True), (tiny_gpt2, False)):
            bridge = to_bridge(model.double())
            found = layer_predictions(bridge, token_ids, top=101)
            every = np.take_along_axis(found.top_logits, found.top_tokens.argsort(-1), -1)  # (L + 1, N, T, V) by id
            _, cache = bridge.run_with_cache(token_ids)
            written = cache["blocks.1.hook_attn_out"] + cache["blocks.1.hook_mlp_out"]
            off = np.abs(every[2] - every[1] - (written @ bridge.W_U)[:, :-1].detach().numpy()).max()
            assert (off < 1e-10) == exact, off

    def test_pieces_of_a_document_do_not_matter(
        self, bridge: TransformerBridge, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ln_removal.interpret import lens

        whole = layer_predictions(bridge, token_ids)
        monkeypatch.setattr(lens, "VALUES_IN_A_PASS", 5 * 4 * 101)
        pieces = layer_predictions(bridge, token_ids)
        assert np.array_equal(whole.top_tokens, pieces.top_tokens)
        np.testing.assert_allclose(whole.divergence, pieces.divergence, atol=1e-12)
