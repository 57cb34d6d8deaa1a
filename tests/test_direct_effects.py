"""Direct effects: exact without norms, wrong with them, the same as TransformerLens' and as ablation by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import direct_logit_attribution
from transformers import GPT2LMHeadModel

from ln_removal import to_bridge
from ln_removal.interpret import answer_effects, components, direct_effects, logit_differences
from ln_removal.interpret.attribution import DIRECTIONS, DirectEffects, Direction, Kind
from ln_removal.interpret.tasks import Prompt, Task

KINDS: tuple[Kind, ...] = ("head", "mlp")


class TestError:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_zero_without_norms(
        self, ln_free: GPT2LMHeadModel, token_ids: Tensor, direction: Direction, kind: Kind
    ) -> None:
        for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
            part = direct_effects(to_bridge(ln_free.to(dtype)), token_ids)[direction].only(kind)
            assert part.error().value < most, dtype
            assert part.sign_flips().value == 0 and part.rank_correlation().value > 1 - 1e-9
            assert np.abs(part.ablation).mean() > 0.01

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_not_with_norms(
        self, with_norms: GPT2LMHeadModel, token_ids: Tensor, direction: Direction, kind: Kind
    ) -> None:
        part = direct_effects(to_bridge(with_norms), token_ids)[direction].only(kind)
        error = part.error()
        assert error.value > 5 and error.low < error.value < error.high
        assert 0 < part.sign_flips().value < 50 and 0.2 < part.rank_correlation().value < 1

    def test_by_hand(self) -> None:
        """Two heads and an MLP, two documents of two positions."""
        ablation = np.array([[[1.0, -2.0], [4.0, 1.0]], [[2.0, 2.0], [-1.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
        attribution = ablation + np.array([[[1.0, 1.0], [-1.0, 0.0]], [[0.0, 1.0], [2.0, -4.0]], [[0, 0], [0, -3.0]]])
        effects = DirectEffects(["L0H0", "L0H1", "0_mlp_out"], attribution, ablation)
        heads = effects.only("head")
        assert heads.labels == ["L0H0", "L0H1"]
        assert heads.error().value == pytest.approx(100 * 10 / 16)
        assert heads.sign_flips().value == pytest.approx(100 * 2 / 8)
        assert effects.only("mlp").error().value == pytest.approx(75)
        assert effects.component_errors == pytest.approx([100 * 3 / 8, 100 * 7 / 8, 75])
        assert effects.component_sign_flips == pytest.approx([0, 50, 25])
        expected = spearmanr(attribution[1].ravel(), ablation[1].ravel()).statistic
        assert effects.component_rank_correlations[1] == pytest.approx(expected)
        # the order of the two heads at each position: right, right, right, wrong
        order = [np.sign(one[0] - one[1]) for one in (attribution[:2], ablation[:2])]
        assert heads.rank_correlation().value == pytest.approx((order[0] * order[1]).mean())

    def test_a_component_that_only_moves_the_scale_is_missed(self) -> None:
        """Orthogonal to the direction, so its attribution is 0; its ablation makes all else count for more."""
        effects = DirectEffects(["L0H0"], np.zeros((1, 2, 3)), np.full((1, 2, 3), -0.5))
        assert effects.error().value == pytest.approx(100)

    def test_interval_covers_documents(self) -> None:
        """Documents that are alike make an interval of a point; one that is not makes it wide."""
        ablation = np.ones((2, 10, 4))
        same = DirectEffects(["L0H0", "L0H1"], 1.1 * ablation, ablation).error()
        assert same.low == pytest.approx(same.high) == pytest.approx(10)
        odd = 1.1 * ablation
        odd[:, 0] = 3
        wide = DirectEffects(["L0H0", "L0H1"], odd, ablation).error()
        assert wide.low < wide.value - 5 and wide.high > wide.value + 5


class TestAgainstTransformerLens:
    @pytest.mark.parametrize("unit", ["head", "component"])
    def test_without_norms(self, ln_free: GPT2LMHeadModel, token_ids: Tensor, unit: str) -> None:
        """Its attribution of the right token, and of right minus runner-up, at every position."""
        found = direct_effects(to_bridge(ln_free), token_ids)
        theirs = to_bridge(ln_free)
        with torch.no_grad():
            logits = theirs(token_ids)
        theirs.enable_compatibility_mode(no_processing=True, disable_warnings=True)
        for place in (0, 7, 22):
            right = token_ids[:, place + 1]
            runner_up = logits[:, place].scatter(-1, right[:, None], -torch.inf).argmax(-1)
            for direction, other in (("correct", None), ("difference", runner_up)):
                expected = direct_logit_attribution(
                    theirs, token_ids, answer_tokens=right, incorrect_tokens=other, unit=unit, pos=place
                )
                self._agree(found[direction], expected, place)  # type: ignore[index]

    @pytest.mark.parametrize("unit", ["head", "component"])
    def test_with_norms(self, with_norms: GPT2LMHeadModel, token_ids: Tensor, unit: str) -> None:
        """Its defaults fold the final norm and centre the unembedding, so its right token is our centred direction."""
        found = direct_effects(to_bridge(with_norms), token_ids)
        theirs = to_bridge(with_norms)
        theirs.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
        for place in (0, 7, 22):
            expected = direct_logit_attribution(
                theirs, token_ids, answer_tokens=token_ids[:, place + 1], unit=unit, pos=place
            )
            self._agree(found["centred"], expected, place)

    @staticmethod
    def _agree(found: DirectEffects, expected: object, place: int) -> None:
        ours = dict(zip(found.labels, found.attribution[:, :, place], strict=True))
        labels, attribution = expected.labels, expected.attribution.detach().numpy()  # type: ignore[attr-defined]
        compared = [label for label in labels if label in ours]
        assert len(compared) >= 3
        for label, values in zip(labels, attribution, strict=True):
            if label in compared:
                np.testing.assert_allclose(ours[label], values, atol=1e-5, rtol=1e-5, err_msg=label)


class TestAgainstBruteForce:
    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    def test_the_component_is_taken_out_of_the_final_residual_stream(
        self, request: pytest.FixtureRequest, token_ids: Tensor, fixture: str
    ) -> None:
        """Through the model's own final norm and the whole unembedding, one component after the other."""
        bridge: TransformerBridge = to_bridge(request.getfixturevalue(fixture))
        found, parts = direct_effects(bridge, token_ids), components(bridge, token_ids)
        right = token_ids[:, 1:, None]
        before = parts.logits[:, :-1]
        runner_up = before.scatter(-1, right, -torch.inf).argmax(-1, keepdim=True)
        for number, label in enumerate(parts.labels):

            def without(x: Tensor, hook: object, part: Tensor = parts.written[number]) -> Tensor:
                return x - part

            with torch.no_grad():
                after = bridge.run_with_hooks(token_ids, fwd_hooks=[("ln_final.hook_in", without)])[:, :-1]
            change = before - after
            correct = change.gather(-1, right)
            expected = {
                "correct": correct,
                "difference": correct - change.gather(-1, runner_up),
                "centred": correct - change.mean(-1, keepdim=True),
            }
            for direction in DIRECTIONS:
                wanted = expected[direction][..., 0].numpy()
                np.testing.assert_allclose(found[direction].ablation[number], wanted, atol=1e-10, err_msg=label)

    def test_a_head_is_ablated_in_the_last_layer(self, ln_free: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """Where nothing reads a head but the unembedding, its direct effect is what zeroing it changes."""
        with torch.no_grad():
            ln_free.transformer.h[2].mlp.c_proj.weight.zero_()
        bridge = to_bridge(ln_free)
        found = direct_effects(bridge, token_ids)["correct"]

        def zero(z: Tensor, hook: object) -> Tensor:
            z = z.clone()
            z.view(*z.shape[:2], 4, 8)[:, :, 3] = 0
            return z

        with torch.no_grad():
            before = bridge(token_ids)
            after = bridge.run_with_hooks(token_ids, fwd_hooks=[("blocks.2.attn.hook_z", zero)])
        change = (before - after)[:, :-1].gather(-1, token_ids[:, 1:, None])[..., 0]
        np.testing.assert_allclose(found.attribution[found.labels.index("L2H3")], change.numpy(), atol=1e-10)


class TestAnswers:
    def test_they_are_those_of_the_direction_between_two_answers(
        self, with_norms: GPT2LMHeadModel, ln_free: GPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        """At the last position of prompts of several lengths, in their order."""
        rows = [tuple(row[:length].tolist()) for row, length in zip(token_ids, (9, 12, 9, 7), strict=True)]
        task = Task("mine", "", tuple(Prompt(row, 10 + row[1] % 80, 1) for row in rows), False, None)
        for model in (with_norms, ln_free):
            bridge = to_bridge(model)
            found = answer_effects(bridge, task)
            for number, one in enumerate(task.prompts):
                parts = components(bridge, torch.tensor([one.clean]))
                stream = parts.residual[0, -1]
                logits = bridge.ln_final(stream) @ bridge.W_U
                for part, label in enumerate(parts.labels):
                    moved = logits - bridge.ln_final(stream - parts.written[part, 0, -1]) @ bridge.W_U
                    expected = (moved[one.answer] - moved[one.wrong]).item()
                    assert found.ablation[found.labels.index(label), number, 0] == pytest.approx(expected, abs=1e-10)
        bias = np.array([float(bridge.b_U[one.answer] - bridge.b_U[one.wrong]) for one in task.prompts])
        summed = found.attribution.sum(axis=(0, 2)) + bias
        np.testing.assert_allclose(summed, logit_differences(bridge, task)[0], atol=1e-10)
        np.testing.assert_allclose(found.attribution, found.ablation, atol=1e-10)


class TestComponents:
    @pytest.mark.parametrize("fixture", ["with_norms", "ln_free"])
    def test_they_sum_to_the_residual_stream(
        self, request: pytest.FixtureRequest, token_ids: Tensor, fixture: str
    ) -> None:
        found = components(to_bridge(request.getfixturevalue(fixture)), token_ids)
        assert found.written.dtype == torch.float64
        torch.testing.assert_close(found.written.sum(0), found.residual, rtol=0, atol=1e-12)
        assert found.kinds.count("head") == 12 and found.kinds.count("mlp") == 3

    def test_batches_do_not_matter(self, with_norms: GPT2LMHeadModel, token_ids: Tensor) -> None:
        bridge = to_bridge(with_norms)
        one, other = (direct_effects(bridge, token_ids, batch=batch)["centred"] for batch in (1, 3))
        np.testing.assert_allclose(one.ablation, other.ablation, atol=1e-12)
        np.testing.assert_allclose(one.attribution, other.attribution, atol=1e-12)

    def test_json_has_no_nan(self) -> None:
        """A head that writes nothing has no error."""
        effects = DirectEffects(["L0H0", "0_mlp_out"], np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))
        found = effects.to_json()
        assert found["components"]["error_per_cent"] == [None, None]
        assert found["by_kind"]["head"]["error_per_cent"]["value"] is None
