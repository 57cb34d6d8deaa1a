"""Patching: runs against brute force, estimates against TransformerLens, tangents that make every estimate exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import done, refused
from disarmed_model import disarm
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import EdgeAttributionConfig, Node, attribution_patch
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal import UserError, from_disarmed, to_bridge
from ln_removal.interpret import activation_patching, edge_effects, estimated_effects, load, patching_of_run
from ln_removal.interpret.interventions import (
    HEAD_KINDS,
    NODE_KINDS,
    NONLINEARITIES,
    Effects,
    Nonlinearity,
    pattern_of,
    run_pair,
)
from ln_removal.interpret.patching import Patching, error_of
from ln_removal.interpret.tasks import Prompt, PromptBatch, Task

KINDS = (*NODE_KINDS, *HEAD_KINDS)
LENGTH = 7
FIRST = 2
"""The token that differs between clean and corrupt prompts."""


def two_layers(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 in float64 of 2 layers, 3 heads and width 24, with random norms and biases."""
    settings = {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, **changes}
    config = GPT2Config(**settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def with_norms() -> GPT2LMHeadModel:
    return two_layers()


@pytest.fixture
def ln_free(with_norms: GPT2LMHeadModel) -> GPT2LMHeadModel:
    return from_disarmed(disarm(with_norms)).double()


@pytest.fixture(params=["with_norms", "ln_free"])
def either(request: pytest.FixtureRequest) -> GPT2LMHeadModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def task() -> Task:
    """Three prompts of 7 tokens, whose twins differ in the third."""
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for number in range(3):
        clean = torch.randint(0, 40, (LENGTH,), generator=generator).tolist()
        corrupt = [*clean[:FIRST], (clean[FIRST] + 7) % 40, *clean[FIRST + 1 :]]
        prompts.append(Prompt(tuple(clean), 3 + number, 20 + number, tuple(corrupt)))
    return Task("planted", "what was planted", tuple(prompts), False, 0)


def batch_of(task: Task, bridge: TransformerBridge) -> PromptBatch:
    (batch,) = task.batches(bridge)
    return batch


def metric(batch: PromptBatch, row: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits[0, -1, batch.answer[row]] - logits[0, -1, batch.wrong[row]]


class TestAgainstBruteForce:
    def test_every_patch_is_a_whole_run(self, either: GPT2LMHeadModel, task: Task) -> None:
        """From the embeddings on, through all layers and the whole unembedding."""
        bridge = to_bridge(either)
        batch = batch_of(task, bridge)
        found = activation_patching(bridge, batch)
        assert batch.corrupt is not None
        with torch.no_grad():
            _, clean = bridge.run_with_cache(batch.clean)
            for row in range(3):
                corrupt, score = batch.corrupt[row : row + 1], metric(batch, row)
                before = score(bridge(corrupt))

                def effect(name: str, place: tuple[Any, ...], row: int = row, corrupt: Tensor = corrupt) -> float:
                    def patch(x: Tensor, hook: object) -> Tensor:
                        x = x.clone()
                        x[0][place] = clean[name][row][place]
                        return x

                    return float(score(bridge.run_with_hooks(corrupt, fwd_hooks=[(name, patch)])) - before)  # noqa: B023

                for layer in range(2):
                    for index, kind in enumerate(NODE_KINDS):
                        expected = [effect(f"blocks.{layer}.hook_{kind}", (place,)) for place in range(LENGTH)]
                        np.testing.assert_allclose(
                            found.nodes[row, layer, :, index], expected, atol=1e-10, err_msg=kind
                        )
                    for index, kind in enumerate(HEAD_KINDS):
                        name = f"blocks.{layer}.attn.hook_{kind}"
                        expected = [effect(name, (slice(None), head)) for head in range(3)]
                        np.testing.assert_allclose(
                            found.heads[row, layer, :, index], expected, atol=1e-10, err_msg=kind
                        )
        assert np.abs(found.nodes[:, :, FIRST:]).max() > 0.1 and np.abs(found.heads).max() > 0.1

    def test_the_residual_stream_without_transformer_lens(self, either: GPT2LMHeadModel, task: Task) -> None:
        bridge = to_bridge(either)
        batch = batch_of(task, bridge)
        found = activation_patching(bridge, batch, kinds=("resid_pre",)).nodes[..., 0]
        with torch.no_grad():
            streams = either(batch.clean, output_hidden_states=True).hidden_states
            for row in range(3):
                score = metric(batch, row)
                assert batch.corrupt is not None
                before = score(either(batch.corrupt[row : row + 1]).logits)
                for layer in range(2):
                    for place in range(LENGTH):

                        def patch(module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                            x = inputs[0].clone()
                            x[0, place] = streams[layer][row, place]  # noqa: B023
                            return (x, *inputs[1:])

                        handle = either.transformer.h[layer].register_forward_pre_hook(patch)
                        after = score(either(batch.corrupt[row : row + 1]).logits)
                        handle.remove()
                        assert found[row, layer, place] == pytest.approx(float(after - before), abs=1e-10)

    def test_nothing_happens_before_the_token_that_differs(self, either: GPT2LMHeadModel, task: Task) -> None:
        bridge = to_bridge(either)
        found = activation_patching(bridge, batch_of(task, bridge)).nodes
        assert (found[:, :, :FIRST] == 0).all()
        assert (found[:, 0, FIRST + 1 :, 0] == 0).all(), "the embeddings behind it are the same"

    def test_patterns(self, task: Task) -> None:
        """Also of a GPT-2 that divides scores by the layer's number."""
        for changes in ({}, {"scale_attn_by_inverse_layer_idx": True}):
            bridge = to_bridge(two_layers(**changes))
            pair = run_pair(bridge, batch_of(task, bridge))
            for layer in range(2):
                name = f"blocks.{layer}.attn.hook_"
                found = pattern_of(bridge, layer, pair.corrupt[f"{name}q"], pair.corrupt[f"{name}k"])
                torch.testing.assert_close(found, pair.corrupt[f"{name}pattern"], rtol=0, atol=1e-12)


class TestAgainstTransformerLens:
    def test_nodes(self, either: GPT2LMHeadModel, task: Task) -> None:
        bridge = to_bridge(either)
        batch = batch_of(task, bridge)
        found = estimated_effects(bridge, batch, ["atp"])["atp"]
        for row in range(3):
            one = slice(row, row + 1)
            assert batch.corrupt is not None
            scores = attribution_patch(bridge, batch.clean[one], batch.corrupt[one], metric(batch, row)).node_scores
            for layer in range(2):
                heads = np.zeros((LENGTH, 3))
                for place in range(LENGTH):
                    mlp = scores[Node("mlp_out", place, layer=layer)]
                    assert found.nodes[row, layer, place, 2] == pytest.approx(mlp, abs=1e-10)
                    for head in range(3):
                        heads[place, head] = scores[Node("attn_head_out", place, layer=layer, head=head)]
                np.testing.assert_allclose(found.nodes[row, layer, :, 1], heads.sum(axis=1), atol=1e-10)
                np.testing.assert_allclose(found.heads[row, layer, :, 3], heads.sum(axis=0), atol=1e-10)
            embed = scores[Node("embed", FIRST)]
            assert found.nodes[row, 0, FIRST, 0] == pytest.approx(embed, abs=1e-10)

    def test_edges(self, either: GPT2LMHeadModel, task: Task) -> None:
        """With one step, edge by edge; and the edges that leave a component sum to its node."""
        bridge = to_bridge(either)
        found = edge_effects(bridge, task, steps=1)
        batch = batch_of(task, bridge)
        expected: dict[tuple[str, str], float] = {}
        for row in range(3):
            one = slice(row, row + 1)
            assert batch.corrupt is not None
            theirs = attribution_patch(
                bridge,
                batch.clean[one],
                batch.corrupt[one],
                metric(batch, row),
                config=EdgeAttributionConfig(granularity="edge"),
            )
            for edge, score in theirs.edge_scores.items():
                names = (named(edge[0]), named(edge[1]))
                expected[names] = expected.get(names, 0.0) + score / 3
        assert found.keys() == expected.keys()
        for edge, score in expected.items():
            assert found[edge] == pytest.approx(score, abs=1e-10), edge
        nodes = estimated_effects(bridge, batch, ["atp"])["atp"]
        leaving = {writer: sum(s for (one, _), s in found.items() if one == writer) for writer, _ in found}
        for layer in range(2):
            assert leaving[f"{layer}_mlp_out"] == pytest.approx(nodes.nodes[:, layer, :, 2].sum(1).mean(), abs=1e-10)
            for head in range(3):
                node = nodes.heads[:, layer, head, 3].mean()
                assert leaving[f"L{layer}H{head}"] == pytest.approx(node, abs=1e-10)

    def test_flags_are_put_back(self, with_norms: GPT2LMHeadModel, task: Task) -> None:
        bridge = to_bridge(with_norms)
        before = bridge(batch_of(task, bridge).clean)
        edge_effects(bridge, task, steps=2)
        assert not (bridge.cfg.use_attn_result or bridge.cfg.use_split_qkv_input or bridge.cfg.use_hook_mlp_in)
        torch.testing.assert_close(bridge(batch_of(task, bridge).clean), before, rtol=0, atol=1e-12)


def named(node: Node) -> str:
    if node.kind in ("embed", "logits"):
        return node.kind
    if node.head is None:
        return f"{node.layer}_{node.kind}"
    head = f"L{node.layer}H{node.head}"
    return head if node.kind == "attn_head_out" else f"{head} {node.kind[0]}"


class TestErrorBudget:
    def errors(self, model: GPT2LMHeadModel, task: Task, *real: Nonlinearity) -> dict[str, float]:
        bridge = to_bridge(model)
        batch = batch_of(task, bridge)
        estimate = estimated_effects(bridge, batch, ["atp"])["atp"]
        exact = activation_patching(bridge, batch, real=real)
        return {kind: error_of(estimate.of(kind), exact.of(kind)).value for kind in KINDS}

    def test_it_is_zero_if_all_is_linearised(self, either: GPT2LMHeadModel, task: Task) -> None:
        """For every node and head: each tangent is right, and its gradient is the model's."""
        for kind, error in self.errors(either, task).items():
            assert error < 1e-9, kind

    def test_without_norms_their_share_is_zero(self, ln_free: GPT2LMHeadModel, task: Task) -> None:
        for kind, error in self.errors(ln_free, task, "norm").items():
            assert error < 1e-9, kind

    def test_with_norms_it_is_not(self, with_norms: GPT2LMHeadModel, task: Task) -> None:
        for kind, error in self.errors(with_norms, task, "norm").items():
            assert error > 1, kind

    @pytest.mark.parametrize("real", ["softmax", "activation"])
    def test_the_others_remain(self, either: GPT2LMHeadModel, task: Task, real: Nonlinearity) -> None:
        assert self.errors(either, task, real)["resid_pre"] > 1

    def test_all_real_is_the_model(self, either: GPT2LMHeadModel, task: Task) -> None:
        bridge = to_bridge(either)
        found = patching_of_run(load({"original": either}), task, ["atp"]).found["original"]
        exact = activation_patching(bridge, batch_of(task, bridge), real=NONLINEARITIES)
        np.testing.assert_allclose(found.budget["all"].nodes[..., 0], exact.nodes[..., 0], atol=1e-12)
        assert found.budget_error("all") == found.error("atp", "resid_pre")

    @pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
    def test_of_other_activations(self, task: Task, activation: str) -> None:
        model = two_layers(activation_function=activation)
        assert self.errors(model, task)["mlp_out"] < 1e-9


class TestEstimates:
    def test_one_step_of_integrated_gradients_is_attribution_patching(
        self, either: GPT2LMHeadModel, task: Task
    ) -> None:
        bridge = to_bridge(either)
        found = estimated_effects(bridge, batch_of(task, bridge), ["atp", "eap-ig"], ig_steps=1)
        np.testing.assert_allclose(found["eap-ig"].nodes, found["atp"].nodes, atol=1e-12)
        np.testing.assert_allclose(found["eap-ig"].heads, found["atp"].heads, atol=1e-12)

    def test_many_steps_are_exact_at_the_embeddings(self, either: GPT2LMHeadModel, task: Task) -> None:
        """Completeness (Sundararajan et al. 2017): the integral along the whole path is the difference of its ends."""
        bridge = to_bridge(either)
        batch = batch_of(task, bridge)
        exact = activation_patching(bridge, batch, kinds=("resid_pre",)).nodes[:, 0, FIRST, 0]
        off = []
        for steps in (8, 64):
            found = estimated_effects(bridge, batch, ["eap-ig"], ig_steps=steps)["eap-ig"].nodes[:, 0, FIRST, 0]
            off.append(np.abs(found - exact).mean())
        assert off[1] < off[0] / 5 and off[1] < 0.02 * np.abs(exact).mean()

    def test_the_qk_fix_is_exact_where_nothing_nonlinear_follows(self, ln_free: GPT2LMHeadModel, task: Task) -> None:
        """Queries and keys of a last layer that only the unembedding reads; plain gradients miss the softmax there."""
        with torch.no_grad():
            ln_free.transformer.h[1].mlp.c_proj.weight.zero_()
        bridge = to_bridge(ln_free)
        batch = batch_of(task, bridge)
        exact = activation_patching(bridge, batch, kinds=("q", "k")).heads[:, 1, :, :2]
        found = estimated_effects(bridge, batch, ["atp", "atp-star"])
        assert np.abs(exact).max() > 1e-3
        np.testing.assert_allclose(found["atp-star"].heads[:, 1, :, :2], exact, atol=1e-10)
        assert np.abs(found["atp"].heads[:, 1, :, :2] - exact).max() > 0.05 * np.abs(exact).max()
        np.testing.assert_array_equal(found["atp"].nodes, found["atp-star"].nodes)
        np.testing.assert_array_equal(found["atp"].heads[..., 2:], found["atp-star"].heads[..., 2:])

    def test_the_one_head_that_moves_information_is_found(self, ln_free: GPT2LMHeadModel, task: Task) -> None:
        """All other heads write nothing: its output carries the whole difference of clean and corrupt run."""
        planted = 1
        with torch.no_grad():
            for layer, block in enumerate(ln_free.transformer.h):
                weight = block.attn.c_proj.weight.view(3, 8, 24)
                weight[[head for head in range(3) if (layer, head) != (0, planted)]] = 0
        models = load({"ln_free": ln_free})
        found = patching_of_run(models, task, ["atp"]).found["ln_free"]
        heads = found.exact.heads[..., HEAD_KINDS.index("z")]
        np.testing.assert_allclose(heads[:, 0, planted], found.clean - found.corrupt, atol=1e-10)
        heads[:, 0, planted] = 0
        assert np.abs(heads).max() < 1e-12


class TestResults:
    def patching(self, estimate: np.ndarray, exact: np.ndarray, clean: list[float]) -> Patching:
        """Of (P, effects) on the residual stream of one layer."""
        effects = []
        for values in (estimate, exact):
            one = Effects.empty(len(values), 1, values.shape[1], 1)
            one.nodes[:, 0, :, 0] = values
            effects.append(one)
        return Patching(np.array(clean), np.zeros(len(clean)), effects[1], {"atp": effects[0]}, {}, [])

    def test_by_hand(self) -> None:
        exact = np.array([[np.nan, 0.0, 1.0, 4.0], [0.0, 2.0, -1.0, 2.0]])
        estimate = np.array([[np.nan, 0.0, 2.0, 3.0], [0.0, 1.0, -1.0, 5.0]])
        found = self.patching(estimate, exact, [2.0, 0.1])
        assert found.error("atp", "resid_pre").value == pytest.approx(100 * 6 / 10)
        rows = [np.corrcoef(estimate[0, 2:], exact[0, 2:])[0, 1], np.corrcoef(estimate[1, 1:], exact[1, 1:])[0, 1]]
        assert found.correlation("atp", "resid_pre").value == pytest.approx(np.mean(rows))
        published = found.published("atp", "resid_pre")  # of the first prompt; the second's denominator is too small
        assert (published.mean, published.deviation, published.prompts) == pytest.approx((0.0, 0.5, 1))

    def test_intervals_are_over_prompts(self) -> None:
        exact = np.ones((10, 6))
        same = self.patching(1.1 * exact, exact, [1.0] * 10).error("atp", "resid_pre")
        assert same.low == pytest.approx(10) and same.high == pytest.approx(10)
        odd = 1.1 * exact
        odd[0] = 3
        wide = self.patching(odd, exact, [1.0] * 10).error("atp", "resid_pre")
        assert wide.low < wide.value - 5 and wide.high > wide.value + 5

    def test_json_has_no_nan(self, either: GPT2LMHeadModel, task: Task) -> None:
        """Not even where no prompt has a position, or a model answers alike whatever it reads."""
        with torch.no_grad():
            either.lm_head.weight.zero_()
        short = Task("short", "x", (*task.prompts, Prompt((1, 2, 3), 4, 5, (1, 9, 3))), False, 0)
        found = patching_of_run(load({"ln_free" if "Free" in type(either).__name__ else "original": either}), short)
        text = json.dumps(found.to_json(), allow_nan=False)
        assert json.loads(text)["task"]["prompts"] == 4

    def test_prompts_of_several_lengths(self, either: GPT2LMHeadModel, task: Task) -> None:
        """Each as if it were alone; the last positions stand on top of each other."""
        short = Prompt((1, 2, 3, 4), 4, 5, (1, 9, 3, 4))
        models = load({"original": either})
        both = patching_of_run(models, Task("x", "x", (task.prompts[0], short), False, 0), ["atp"]).found["original"]
        alone = patching_of_run(models, Task("x", "x", (short,), False, 0), ["atp"]).found["original"]
        assert np.isnan(both.exact.nodes[1, :, : LENGTH - 4]).all()
        for one, other in ((both.exact, alone.exact), (both.estimates["atp"], alone.estimates["atp"])):
            np.testing.assert_allclose(one.nodes[1, :, LENGTH - 4 :], other.nodes[0], atol=1e-12)
            np.testing.assert_allclose(one.heads[1], other.heads[0], atol=1e-12)
        assert np.isfinite(both.error("atp", "resid_pre").value)

    def test_prompts_without_twins(self, ln_free: GPT2LMHeadModel) -> None:
        single = Task("single", "x", (Prompt((1, 2, 3), 4, 5),), False, 0)
        with pytest.raises(UserError, match=r"single.*twin"):
            patching_of_run(load({"ln_free": ln_free}), single)


class TestCommand:
    @pytest.fixture
    def prompts(self, here: Path, tmp_path: Path) -> Path:
        lines = [
            {
                "clean": f"def f(a):\n    return {one}",
                "corrupt": f"def f(b):\n    return {one}",
                "answer": "a",
                "wrong": "b",
            }
            for one in ("(", "[", "-")
        ]
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def test_three_models_side_by_side(self, here: Path, prompts: Path) -> None:
        said = done(f"ln-analyze patching run --task {prompts} --out new/found").stdout
        for words in ("original", "control", "LN-free", "norm real", "all linearised", "without BOS", "queries"):
            assert words in said
        names = {"patching-resid-pre", "patching-heads", "patching-scatter", "patching-budget"}
        files = {path.name for path in Path("new/found").iterdir()}
        assert {f"{name}.{kind}" for name in names for kind in ("png", "pdf")} | {"patching.json"} <= files
        printed = json.loads(Path("new/found/patching.json").read_text())
        models = printed["models"]
        assert list(models) == ["original", "control", "ln_free"] and printed["task"]["prompts"] == 3
        for role, one in models.items():
            budget = {row: value["value"] for row, value in one["error_budget_per_cent"].items()}
            assert budget["none"] < 1e-8 and budget["softmax"] > 0 and budget["all"] > 0
            assert budget["norm"] < 1e-8 if role == "ln_free" else budget["norm"] > 1e-3
            assert list(one["estimates"]) == ["atp", "atp-star", "eap-ig"] and one["largest_edges"]

    def test_exact_only(self, here: Path, prompts: Path) -> None:
        printed = json.loads(
            done(f"ln-analyze patching run --task {prompts} --method exact --bos --out new/found --json").stdout
        )
        for one in printed["models"].values():
            assert one["estimates"] == {} and one["error_budget_per_cent"] == {}
            assert np.shape(one["exact"]["heads_logits"]["z"]) == (2, 2)
        assert printed["task"]["prepend_bos"] is True

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ("--task nothing.jsonl", ("nothing.jsonl", "brackets", "jsonl")),
            ("--task return", ("return", "brackets")),
            ("--task ioi", ("ioi", "tokens")),
            ("--method guess", ("guess", "atp-star")),
            ("--method ,", ("atp-star",)),
            ("--task model/config.json", ("config.json", "line 1")),
        ],
    )
    def test_bad_input_is_one_line(self, here: Path, options: str, words: tuple[str, ...]) -> None:
        said = refused(f"ln-analyze patching run {options}")
        assert all(word in said for word in words), said
