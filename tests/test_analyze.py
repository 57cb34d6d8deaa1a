"""ln-analyze: observations read back, figures drawn on one scale, figures and tables that say what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import done
from tiny_training import CONTEXT, LAYERS, TinyRun, tiny_spec

from ln_removal.files.metrics_log import set_aside, truncate_metrics
from ln_removal.interpret.entropies import HeadEntropies
from ln_removal.interpret.observations import distinct_names, find_runs, read_observations
from ln_removal.models.attention import largest_entropy
from ln_removal.report import analysis_tables, plots
from ln_removal.training.probe import Probe

QUERIES, HEADS = 32, 3
LARGEST = largest_entropy(QUERIES)


def row(step: int, *, layers: int = 4, nans: int = 0, slopes: tuple[float, ...] = (), **changes: Any) -> dict[str, Any]:
    """An observation in which layer l has heads at 0.2, 0.5 and (0.95 in even layers, else 0.6) of the largest entropy."""
    entropy: list[Any] = [
        [0.2 * LARGEST, 0.5 * LARGEST, (0.6 if layer % 2 else 0.95) * LARGEST] for layer in range(layers)
    ]
    if nans:
        entropy[-1] = [None] * HEADS
    return {
        "kind": "observation",
        "step": step,
        "queries": QUERIES,
        "entropy": entropy,
        "nan_counts": [0] * (layers - 1) + [nans],
        "attention_entries": 1000,
        "nonfinite_residual": [0] * layers + [nans],
        "residual_norm": [*range(1, layers + 1), None if nans else layers + 1],
        "gradient_norm": [0.1] * layers,
        "slopes": list(slopes),
    } | changes


def write_run(directory: Path, *rows: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    lines = [json.dumps({"kind": "train", "step": 0, "loss": 5.0}), *map(json.dumps, rows)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """table/ with two arms of one seed each, 4 and 6 layers deep; unstable and slopes beside it."""
    write_run(tmp_path / "table/ln/seed-0", *(row(step) for step in (0, 10, 19)))
    write_run(tmp_path / "table/free/seed-0", *(row(step, layers=6) for step in (0, 10, 19)))
    write_run(tmp_path / "table/free/seed-0/control", row(0))
    write_run(tmp_path / "unstable", row(0), row(10, nans=7), row(19, nans=900))
    write_run(tmp_path / "network", *(row(step, slopes=(0.01 - step / 1000,)) for step in (0, 10, 19)))
    write_run(tmp_path / "layers", *(row(step, slopes=(0.01, 0.02, 0.03, step / 1000)) for step in (0, 10, 19)))
    write_run(tmp_path / "unobserved")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def are_figures(directory: Path, *names: str) -> None:
    assert {path.name for path in directory.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf")
    }
    for name in names:
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (directory / f"{name}.pdf").read_bytes().startswith(b"%PDF")


# ------------------------------------------------------------------------------------------------------------- reading


def test_what_a_training_observed_is_read_back(tmp_path: Path) -> None:
    probe = Probe(torch.arange(2 * CONTEXT).view(2, CONTEXT) % 60, every=8, steps=20)
    run = TinyRun(tmp_path / "run", spec=tiny_spec(steps=20), removal=False)
    run.train(probe=probe)
    (found,) = read_observations([tmp_path / "run"])
    assert found.name == "run" and found.queries == CONTEXT and found.steps.tolist() == [0, 8, 16, 19]
    assert found.entropy.shape == (4, LAYERS, 2) and found.residual_norm.shape == (4, LAYERS + 1)
    assert found.slopes.shape == (4, 0) and not found.nan_counts.any()
    assert ((found.entropy > 0) & (found.entropy < largest_entropy(CONTEXT))).all()
    last = probe.observe(run.model)  # after the last update: near what was seen before it, and not the same
    assert 0 < np.abs(np.array(last["entropy"]) - found.entropy[-1]).max() < 0.5


def test_null_is_nan_a_repeated_step_counts_as_it_was_last_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", row(5), row(0, nans=3), row(5, nans=2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(9))[:-40])
    (found,) = read_observations([run])
    assert found.steps.tolist() == [0, 5] and found.nan_counts[:, -1].tolist() == [3, 2]
    assert np.isnan(found.entropy[:, -1]).all() and not np.isnan(found.entropy[:, :-1]).any()


def test_what_a_run_saw_while_it_diverged_outlives_its_rollback(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", row(0), row(10), row(20, nans=4), row(23, nans=9))
    set_aside(run / "metrics.jsonl", 10)
    truncate_metrics(run / "metrics.jsonl", 10)
    (back,) = read_observations([run])
    assert back.steps.tolist() == [0, 10, 20, 23] and back.nan_counts[:, -1].tolist() == [0, 0, 4, 9]
    with (run / "metrics.jsonl").open("a") as file:  # it goes on, past those steps
        file.writelines(json.dumps(row(step)) + "\n" for step in (10, 20, 30))
    (on,) = read_observations([run])
    assert on.steps.tolist() == [0, 10, 20, 30] and not on.nan_counts.any()


def test_a_directory_stands_for_the_runs_in_it_and_names_tell_them_apart(runs: Path) -> None:
    found = find_runs([runs / "unstable", runs / "table"])
    assert found == [runs / "unstable", runs / "table/free/seed-0", runs / "table/ln/seed-0"]
    assert distinct_names(found) == [f"{runs.name}/unstable", "free/seed-0", "ln/seed-0"]
    assert distinct_names(found[1:]) == ["free/seed-0", "ln/seed-0"]
    assert distinct_names([runs / "table/ln/seed-0"]) == ["seed-0"]


# ------------------------------------------------------------------------------------------------------------- figures


def heads(name: str, entropy: Any, queries: int = QUERIES) -> HeadEntropies:
    return HeadEntropies(name, None, queries, np.array(entropy, dtype=np.float64))


def test_models_side_by_side_share_one_colour_scale_up_to_the_largest_entropy() -> None:
    with plots.house_style():
        figure = plots.head_heatmap(
            [heads("flat", np.full((2, 3), 0.1)), heads("deep", np.full((5, 2), 0.99 * LARGEST))]
        )
    images = [image for axes in figure.axes for image in axes.images]
    assert [image.get_clim() for image in images] == [(0, LARGEST)] * 2
    assert [image.get_array().shape for image in images] == [(2, 3), (5, 2)]
    dots = [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes[:2]]
    assert dots == [0, 10]
    bracket = figure.axes[2].lines[0]
    assert (min(bracket.get_ydata()), max(bracket.get_ydata())) == pytest.approx((0.9 * LARGEST, LARGEST))


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    with plots.house_style():
        figure = plots.head_heatmap([heads("$HOME/$x_", np.full((2, 3), 0.1))])
        assert figure.axes[0].get_title(loc="left") == "$HOME/$x_"
        assert [path.suffix for path in plots.save(figure, tmp_path, "heads")] == [".png", ".pdf"]


def test_nan_heads_are_hatched_and_are_not_in_the_band() -> None:
    one = heads("sick", [[math.nan, 0.95 * LARGEST], [0.1, math.nan]])
    with plots.house_style():
        figure = plots.head_heatmap([one])
    assert len(figure.axes[0].patches) == 2
    assert one.overload_shares.tolist() == [0.5, 0.0]
    assert one.to_json()["entropy"] == [[None, 0.95 * LARGEST], [0.1, None]]


def test_lines_over_steps_have_a_line_a_layer_and_gaps_where_there_is_no_number(runs: Path) -> None:
    found = read_observations([runs / "unstable", runs / "table/free/seed-0"])
    with plots.house_style():
        layers = plots.layers_over_steps(found)
        norms = plots.norms_over_steps(found)
    assert [len(axes.lines) for axes in layers.axes[:2]] == [4, 6]
    assert layers.axes[0].get_ylim() == layers.axes[1].get_ylim()
    assert [len(axes.lines) for axes in norms.axes[:2]] == [5, 7]
    assert np.isnan(norms.axes[0].lines[-1].get_ydata()).tolist() == [False, True, True]


# ------------------------------------------------------------------------------------------------------------ commands


def test_entropy_as_json_at_a_step(runs: Path) -> None:
    found = json.loads(done("ln-analyze entropy table/ln/seed-0 --step 10 --json").stdout)
    (one,) = found["runs"]
    assert (one["step"], one["queries"], one["observed_steps"]) == (10, QUERIES, [0, 10, 19])
    assert one["overload_share"] == pytest.approx([1 / 3, 0, 1 / 3, 0])
    assert (one["heads_in_overload_band"], one["heads"]) == (2, 12)
    assert one["largest_entropy"] == pytest.approx(math.lgamma(QUERIES + 1) / QUERIES)
    assert np.array(one["layer_entropy_over_steps"]).shape == (3, 4)
    are_figures(runs / "table/ln/seed-0/analysis", "entropy-heads", "entropy-layers", "entropy-overload")
    assert all(Path(path).is_file() for path in found["figures"])


def test_nans_by_layer_and_none_in_words(runs: Path) -> None:
    shown = done("ln-analyze nans unstable table/ln/seed-0 --out figures").stdout.splitlines()
    assert shown[0].startswith("unstable: NaN in the attention of layer 3 from step 10 on, at most 900 of 1,000")
    assert "residual stream not finite from step 10 on, behind block 3" in shown[0]
    assert shown[1].startswith(
        "seed-0: no NaN in any layer's attention, residual stream finite, in 3 observations, from"
    )
    are_figures(runs / "figures", "nans", "residual-norms", "gradient-norms")
    (found,) = analysis_tables.nan_json(read_observations([runs / "unstable"]))
    assert found["first_nan_step"] == [None, None, None, 10]
    assert [counts[-1] for counts in found["nan_counts"]] == [0, 7, 900]
    assert found["residual_norm"][1][-1] is None


def test_a_training_from_the_inside_in_one_figure(runs: Path) -> None:
    shown = done("ln-analyze training unstable table/ln/seed-0 layers --out figures").stdout
    are_figures(runs / "figures", "training")
    assert "unstable" in shown and "layers" in shown
    found = analysis_tables.training_json(read_observations([runs / "unstable", runs / "table/ln/seed-0"]))
    # In the unstable run the three heads of layer 3 are NaN at the end, and of the others one of three is overloaded in even layers.
    assert [one["overloaded"] for one in found] == [pytest.approx(2 / 12), pytest.approx(2 / 12)]
    assert found[0]["mean_entropy"] is None and found[1]["mean_entropy"] == pytest.approx(LARGEST * (1.65 + 1.3) / 6)
    assert found[0]["largest_residual_norm"] == {"value": 5.0, "step": 0} == found[1]["largest_residual_norm"]
    assert found[0]["residual_norm"][1][-1] is None and found[0]["slopes"] == [[], [], []]


def test_slopes_of_network_and_layers(runs: Path) -> None:
    shown = done("ln-analyze slopes network layers unstable --out figures").stdout  # one of three has none
    are_figures(runs / "figures", "slopes")
    assert "network" in shown and "layer 3" in shown and "-0.0090" in shown and "unstable" not in shown
    found = analysis_tables.slope_json(read_observations([runs / "network", runs / "layers"]))
    assert found[0]["slopes"] == {"network": pytest.approx([0.01, 0.0, -0.009])}
    assert found[1]["slopes"]["layer 3"] == pytest.approx([0.0, 0.01, 0.019])


def test_models_are_measured_on_a_text_as_transformers_would(runs: Path) -> None:
    text = "def f(x):\n    return x * 2\n\n" * 200
    (runs / "text.py").write_text(text)
    (one,) = json.loads(done("ln-analyze entropy tiny --text text.py --context 48 --json").stdout)["runs"]

    from ln_removal.models.loading import load_model

    loaded = load_model("tiny")
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])
    count = len(ids) // 48
    chosen = [count * index // 32 for index in range(32)] if count > 32 else list(range(count))
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = loaded.model(ids[: count * 48].view(count, 48)[chosen], output_attentions=True)
    expected = torch.special.entr(torch.stack(outputs.attentions).double()).sum(-1).mean((1, 3))
    np.testing.assert_allclose(np.array(one["entropy"]), expected.numpy(), atol=1e-4)
    assert (one["name"], one["step"], one["queries"]) == ("tiny", None, 48)
