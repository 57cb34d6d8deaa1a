"""The benchmarks beside ReLU's Revival: our weights in the peer's layout, ratios by round, and parity where a checkout is at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from revival_parity import ARMS, SIZES, batch, compare, disturb, nan_of_one_head, our_model
from revival_peer import find_checkout, peer_module, peer_weights
from revival_throughput import SHAPES, figures, ratio, report

from ln_removal.config.recipe import load_recipe
from ln_removal.models.attention import attention_entropy

if TYPE_CHECKING:
    from types import ModuleType

WHERE = Path("/tmp/peers")  # where benchmarks/README.md checks the peers out


@pytest.fixture(scope="module")
def peer() -> tuple[ModuleType, ModuleType]:
    """The peer's model_utils and train_utils."""
    checkout = find_checkout(WHERE)
    if checkout is None:
        pytest.skip(f"no checkout of Nandan91/relu-revival-normfree in {WHERE}")
    return peer_module(checkout, "model_utils"), peer_module(checkout, "train_utils")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layernorm", "none"])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(arm))
def test_same_weights_give_the_peers_logits_gradients_and_entropy(
    peer: tuple[ModuleType, ModuleType], norm: str, arm: tuple[str, str, str]
) -> None:
    found = compare(*peer, norm, *arm)
    double = found["float64"]
    if arm[1] == "gelu":  # exact there, the tanh approximation of GPT-2 here
        assert 1e-4 < double["largest_logit_difference"] < 0.2
        assert found["largest_entropy_difference"] < 1e-2
        return
    assert double["largest_logit_difference"] < 1e-10
    assert double["largest_relative_gradient_difference"] < 1e-10
    assert found["float32"]["largest_logit_difference"] < 1e-3 < found["float32"]["largest_logit"]
    assert found["largest_entropy_difference"] < 1e-5
    assert max(found["entropy_by_layer"]) > 1, "uneven, but not collapsed: there must be something to compare"


@pytest.mark.slow
def test_the_peer_counts_nans_a_head_and_calls_their_entropy_zero(peer: tuple[ModuleType, ModuleType]) -> None:
    found = nan_of_one_head(*peer)
    assert all(found["peer_times_heads_is_ours"])
    assert found["ours"]["nan_counts"][0] == 0 < found["ours"]["nan_counts"][1]
    assert found["ours"]["entropy_of_layer_1_by_head"][0] is None
    healthy = found["ours"]["entropy_of_layer_1_by_head"][1:]
    assert found["peer"]["entropy_by_layer"][1] == pytest.approx(sum(healthy) / SIZES["n_head"], abs=1e-5)


def test_no_checkout_where_there_is_none(tmp_path: Path) -> None:
    assert find_checkout(tmp_path) is None
    assert find_checkout(tmp_path / "nothing") is None
    (tmp_path / "Nandan91+relu-revival-normfree").mkdir()
    assert find_checkout(tmp_path) == (tmp_path / "Nandan91+relu-revival-normfree").resolve()
    assert find_checkout(tmp_path / "Nandan91+relu-revival-normfree") is not None


def test_every_weight_goes_to_the_peer_once_and_its_other_biases_are_zero() -> None:
    ours = our_model("layernorm", "relu")
    disturb(ours)
    state = ours.state_dict()
    theirs = peer_weights(state, SIZES["n_layer"])
    joined = torch.cat(
        [theirs["transformer.h.2.attn.qk_attn.weight"], theirs["transformer.h.2.attn.v_attn.weight"]], dim=1
    )
    torch.testing.assert_close(joined, state["transformer.h.2.attn.c_attn.weight"], rtol=0, atol=0)
    assert theirs["transformer.h.2.attn.qk_attn.bias"].shape == (2 * SIZES["n_embd"],)
    added = {name for name in theirs if name not in state and not name.endswith(("qk_attn.weight", "qk_attn.bias"))}
    zeros = {name for name in added if name.endswith(".bias")}
    assert len(zeros) == 4 * SIZES["n_layer"]  # values, the attention's output, the MLP's two
    assert all(not theirs[name].any() for name in zeros)
    moved = sum(tensor.numel() for name, tensor in theirs.items() if name not in zeros)
    assert moved == sum(tensor.numel() for tensor in state.values())


def test_entropy_is_the_sum_that_the_peer_takes_without_its_nans() -> None:
    ours = our_model("none", "relu")
    disturb(ours)
    probabilities = torch.softmax(
        torch.randn(2, 3, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf), dim=-1
    )
    theirs = -torch.nansum(probabilities * probabilities.log(), dim=-1)
    torch.testing.assert_close(attention_entropy(probabilities), theirs)
    probabilities[0, 0, 3] = torch.nan
    assert attention_entropy(probabilities)[0, 0, 3].isnan()


def test_what_is_compared_differs_from_the_initialisation() -> None:
    fresh, moved = our_model("none", "learnable_leaky_relu"), our_model("none", "learnable_leaky_relu")
    disturb(moved)
    slopes = set()
    for (name, before), after in zip(fresh.named_parameters(), moved.parameters(), strict=True):
        assert not torch.equal(before, after), name
        slopes |= {round(after.item(), 6)} if name.endswith(".slope") else set()
    assert len(slopes) == SIZES["n_layer"], "slopes that are alike would hide a mix-up of layers"
    assert batch().max() < SIZES["vocab_size"]


def test_the_published_shape_is_that_of_the_recipe() -> None:
    recipe, shape = load_recipe("normfree/codeparrot-gpt2"), SHAPES["gpt2"]
    assert recipe.architecture is not None
    for name in ("n_layer", "n_embd", "n_head", "vocab_size"):
        assert getattr(shape, name) == getattr(recipe.architecture, name), name
    assert (shape.context, shape.tokens_per_step) == (recipe.data.context, recipe.training.tokens_per_step)


def test_ratios_are_taken_round_by_round() -> None:
    slow_second_round = [1.0, 10.0, 1.1]
    assert ratio([2.0, 20.0, 2.2], slow_second_round) == pytest.approx(2.0)
    seconds = {
        "peer_attentions": [2.0, 4.0, 2.0],
        "peer_reports": [3.0, 5.0, 3.0],
        "ours": [1.0, 2.0, 1.0],
        "ours_observed": [1.5, 2.5, 1.5],
    }
    found = figures(seconds)
    assert found["times_ours"]["peer_attentions"] == 2.0 and found["times_ours"]["ours"] == 1.0
    assert found["seconds_a_look"] == {"peer_reports": 1.0, "ours_observed": 0.5}
    assert found["look_share_of_100_steps"] == {"peer_reports": 0.005, "ours_observed": 0.005}
    contestants = {
        who: {"seconds_a_step": {"median": samples[0]}, "peak_memory_bytes": 2**30} for who, samples in seconds.items()
    }
    contestants["ours_eager"] = {"error": "out of memory"}
    run = {"shape": "gpt2", "precision": "float16", "tokens_per_step": 1000, "contestants": contestants, **found}
    lines = report(run).splitlines()
    assert any(line.split()[:2] == ["ours_eager", "failed"] for line in lines)
    assert any(
        line.split() == ["peer_reports", "3000.0", "333", "3.00", "1000.0", "0.5%", "1.00", "GiB"] for line in lines
    )


def test_figures_without_ours_have_no_ratio() -> None:
    assert figures({"peer": [1.0]}) == {"times_ours": {}, "seconds_a_look": {}, "look_share_of_100_steps": {}}
