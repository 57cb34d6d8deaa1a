"""What the benchmarks compute from what they measure."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

from growth_estimate import ASSUMED, architecture, read, run_of, token_seconds
from int8 import as_linear, described, kind_of
from measuring import RESULTS, machine
from removal import finished, identity, write_table
from removal_quality import show, stays_below, table
from revival_parity import SIZES, disturb, our_model
from revival_peer import peer_weights
from revival_throughput import figures, ratio
from soak import growth, thinned
from train_throughput import _earlier_runs, _whole

from ln_removal.config.recipe import ArchitectureSpec
from ln_removal.evaluation.prompts import KINDS
from ln_removal.models.norm_choice import build_model


def test_growth_is_that_of_medians_after_the_warm_up() -> None:
    warm_up, flat = [100.0] * 10, [1000.0] * 90
    assert growth(warm_up + flat)["share"] == 0
    assert growth(warm_up + flat[:-1] + [9000.0])["share"] == 0, "one high sample is no growth"
    rising = warm_up + [1000.0 + 2 * step for step in range(90)]
    assert growth(rising)["share"] == pytest.approx(160 / 1009, rel=0.01)
    assert growth([0.0] * 40)["share"] == growth([5.0])["share"] == 0
    rows = [{"seconds": second} for second in range(3600)]
    kept = thinned(rows)
    assert len(kept) == 400 and kept[0] == rows[0] and kept[-1] == rows[-1]


def test_tokens_count_only_when_everything_is_constant() -> None:
    run = {"evaluations": [(20, 2.7), (40, 2.7), (60, 3.1), (80, 2.74), (100, 2.73)]}
    assert stays_below(run, 2.75, 0) == 80, "above once more at 60"
    gentle = {"evaluations": [(20, 2.7), (40, 2.7), (60, 2.7), (80, 2.74)]}
    assert stays_below(gentle, 2.75, 50) == 60, "at 20 and 40 LayerNorms were still there"
    assert stays_below(gentle, 2.75, 60) == 80, "the evaluation at 60 saw the mixes of step 59"
    assert stays_below(gentle, 2.6, 0) == math.inf


def test_arms_of_another_model_or_length_are_run_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    arms = ["control-prompts", "gpt2", "gpt2-together", "paper-2-prompts"]
    given = {"model": tmp_path / "model", "out": tmp_path, "steps": 120, "tokens_per_step": 1024, "arms": arms}
    options = argparse.Namespace(**given, device="cpu", json=None)
    run = {
        "of": identity(options),
        "evaluations": [(20, 3.0)],
        "cross_entropy": 3.0,
        "worst_training_loss": 4.0,
        "odd_text": {"tabs": 5.0},
        "tokens_per_second": 1.0,
    }
    runs = {
        "control-prompts": run,
        "gpt2": {**run, "cross_entropy": 3.25},
        "gpt2-together": {"of": run["of"], "failed": "it diverged"},
        "paper-2-prompts": {**run, "of": [60, *run["of"][1:]]},
    }
    for arm, result in runs.items():
        (tmp_path / f"{arm}.json").write_text(json.dumps(result))
    assert list(finished(options)) == arms[:3], "a divergence is a result"
    write_table(options, {})
    written = json.loads((tmp_path / "removal.json").read_text())
    assert written["missing"] == ["paper-2-prompts"]
    assert {row["arm"]: row["gap"][0] for row in written["table"]} == {"control-prompts": 0, "gpt2": 0.25}
    options.steps = 200
    assert not finished(options)


def test_the_table_of_arms_shows_prompts_where_every_run_has_them() -> None:
    def run(gap: float) -> dict[str, Any]:
        kinds = {kind: {"without": 2 + gap, "with": 2 + 3 * gap} for kind in KINDS}
        return {**older, "prompts": kinds, "odd_text_bos": {"tabs": 6.5}}

    older = {
        "evaluations": [(20, 3.0)],
        "cross_entropy": 3.0,
        "worst_training_loss": 4.0,
        "odd_text": {"tabs": 5.0},
        "tokens_per_second": 1.0,
    }
    rows = table(
        {
            "control": {0: run(0), 1: run(0)},
            "staged-plain": {0: run(0.1), 1: run(0.2)},
            "at-once": {0: run(1), 1: older},
        },
        1,
        {},
        {},
    )
    shown = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in show(rows).splitlines()
        for cells in [line.split("|")]
    }
    assert shown["staged-plain"][-7:] == ["6.50", *["+0.1500", "+0.4500"] * 3]
    assert shown["at-once"][-7:] == ["-"] * 7 and shown["at-once"][-8] == "5.00"


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1]) == pytest.approx(2.0)
    seconds = {
        "peer_attentions": [2.0, 4.0, 2.0],
        "peer_reports": [3.0, 5.0, 3.0],
        "ours": [1.0, 2.0, 1.0],
        "ours_observed": [1.5, 2.5, 1.5],
    }
    found = figures(seconds)
    assert found["times_ours"]["peer_attentions"] == 2.0 and found["times_ours"]["ours"] == 1.0
    assert found["seconds_a_look"] == {"peer_reports": 1.0, "ours_observed": 0.5}


def test_an_estimate_begins_at_what_was_measured() -> None:
    measured = read(RESULTS / "train_throughput-nvidia-h200.json", RESULTS / "profile-gpt2-nvidia-h200.json")
    assert 1 / token_seconds(architecture("gpt2"), measured) == pytest.approx(measured.tokens_per_second)
    small, large = (token_seconds(architecture(size), measured) for size in ("gpt2", "gpt2-large"))
    assert 774 / 124.4 > large / small > 36 * 1280 / (12 * 768), "between the growth of N and that of L D"
    alone, eight = (run_of(gpus, 1e11, 50_000, 10**9) for gpus in (1, 8))
    assert alone["efficiency"] == 1 and alone["compute_seconds"] == pytest.approx(8 * eight["compute_seconds"])
    ring = 2 * 7 / 8 * 4e9 / 1e11  # each GPU sends 7/8 of the gradients twice
    latency = 4e9 / ASSUMED["bucket_bytes"] * ASSUMED["seconds_per_bucket"]
    assert eight["reduction_seconds"] == pytest.approx(ring + latency)


def test_figures_of_another_machine_are_measured_again(tmp_path: Path) -> None:
    here = machine("cpu")
    entry = {"tokens_per_second": {"median": 1.0}}
    run = {"contestants": {"ours": {**entry, "whole": True}, "hf_trainer": {**entry, "whole": False}}}
    file = tmp_path / "throughput.json"
    assert _earlier_runs(file, here) == [], "there is none yet"
    file.write_text(json.dumps({"machine": here, "runs": [run]}))
    assert _earlier_runs(file, here) == [run]
    assert _whole(run, "ours") and not _whole(run, "hf_trainer") and not _whole(run, "gpt2_noln")
    file.write_text(json.dumps({"machine": {**here, "gpu": "NVIDIA H200"}, "runs": [run]}))
    assert _earlier_runs(file, here) == [] and _earlier_runs(file, None) == [run]


def test_every_weight_goes_to_the_peer_once_and_its_other_biases_are_zero() -> None:
    ours = our_model("layernorm", "relu")
    disturb(ours)
    state = ours.state_dict()
    theirs = peer_weights(state, SIZES["n_layer"])
    queries_and_keys, values = (theirs[f"transformer.h.2.attn.{part}_attn.weight"] for part in ("qk", "v"))
    assert torch.equal(torch.cat([queries_and_keys, values], dim=1), state["transformer.h.2.attn.c_attn.weight"])
    added = {name for name in theirs if name not in state and not name.endswith(("qk_attn.weight", "qk_attn.bias"))}
    zeros = {name for name in added if name.endswith(".bias")}
    assert len(zeros) == 4 * SIZES["n_layer"]  # values, the attention's output, the MLP's two
    assert all(not theirs[name].any() for name in zeros)
    moved = sum(tensor.numel() for name, tensor in theirs.items() if name not in zeros)
    assert moved == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    "means",
    [
        {},
        {"residual_gain": "learned", "initialisation": "unit", "qk_norm": True, "biases": "paper"},
        {"attention_scale": "1/k", "biases": "paper"},
    ],
)
def test_a_gpt2_of_linear_maps_computes_the_same(means: dict[str, Any]) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 40, "block_norm": "none"}
    model = build_model(ArchitectureSpec.model_validate(sizes | means), eot_token_id=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        ids = torch.arange(16).view(2, 8)
        expected = model(ids).logits
        torch.testing.assert_close(as_linear(model)(ids).logits, expected, rtol=1e-5, atol=1e-4)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 4 + 1 and all(map(kind_of, linear))


def test_outliers_are_described_by_their_formulas() -> None:
    normal = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    found = described(normal)
    assert found["kurtosis"] == pytest.approx(3, rel=0.05) and found["neurons"] == pytest.approx(1, rel=0.02)
    one = torch.zeros(500, 64)
    one[:, 3] = 5.0
    assert described(one)["neurons"] == pytest.approx(64) and described(one)["ratio"] == math.inf
    assert described(torch.tensor([[1.0, -2.0, 3.0, -10.0]]))["ratio"] == pytest.approx(10 / 3)
