"""`ln-analyze paper`: its figures are those of the single analyses, its page is whole, safe and linked, mistakes are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import done, refused
from report_run import IMAGE, SCRIPT, write_run
from test_report import Page

from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret import load, neurons
from ln_removal.interpret.paper import PUBLISHED, Paper, Row, paper_of_run
from ln_removal.interpret.tasks import read_task
from ln_removal.report.page import write_report
from ln_removal.report.paper import cell_parts, comparison, published_cell

ROLES = ["original", "control", "ln_free"]
TEXT = ("--documents", "4", "--length", "24")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    lines = [
        {
            "clean": f"def f(a):\n    return {one}",
            "corrupt": f"def f(b):\n    return {one}",
            "answer": "a",
            "wrong": "b",
        }
        for one in "([-"
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The finished run under a name that is markup; the current directory is where its recipe finds its model."""
    directory = tmp_path_factory.mktemp("paper") / "<script>alert(1)<b>run"
    shutil.copytree(world / "run", directory, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        yield directory


@pytest.fixture(scope="module")
def said(run: Path, prompts: Path) -> str:
    """What the command prints; it writes into the run."""
    asked = ("--task", prompts, "--prompts", "3", "--ablated", "40")
    return str(done("ln-analyze", "paper", run, *TEXT, *asked).stdout)


def found_by(run: Path, out: Path, name: str, *options: str | Path) -> dict[str, Any]:
    """The models of another analysis."""
    done("ln-analyze", name, run, *options, "--out", out)
    models: dict[str, Any] = json.loads((out / f"{name}.json").read_text())["models"]
    return models


def test_figures_are_those_of_the_single_analyses(run: Path, prompts: Path, said: str, tmp_path: Path) -> None:
    rows = json.loads((run / "analysis" / "interpret.json").read_text())["rows"]
    single = {
        "dla": found_by(run, tmp_path, "dla", *TEXT, "--direction", "centred"),
        "patching": found_by(run, tmp_path, "patching", "--task", prompts, "--method", "atp", "--no-budget"),
        "attention": found_by(run, tmp_path, "attention", *TEXT, "--copies", "2"),
        "behaviour": found_by(run, tmp_path, "behaviour", *TEXT, "--task", "none", "--prompts", "3"),
    }
    places: dict[str, tuple[str, ...]] = {
        "direct_effect_error": ("dla", "directions", "centred", "by_kind", "head", "error_per_cent"),
        "attribution_patching_error": ("patching", "estimates", "atp", "by_kind", "resid_pre", "error_per_cent"),
        "published_sink_rate": ("attention", "published_sink_rate_per_cent", "mean"),
        "later_sink_rate": ("attention", "later_sink_rate_per_cent", "mean"),
        "sink_heads": ("attention", "sink_heads_per_cent", "mean"),
        "calibration_error": ("behaviour", "calibration_error", "without_bos"),
    }
    for key, kind in (("document_start_loss", "document start"), ("random_copy_loss", "second copy, random tokens")):
        for bos in ("with_bos", "without_bos"):
            places[f"{key}_{bos}"] = ("behaviour", "loss_nats", kind, bos)
    assert set(places) <= set(rows) <= {*places, "entropy_neurons_share"}
    for key, (analysis, *path) in places.items():
        assert list(rows[key]["models"]) == ROLES and rows[key]["analysis"] == analysis
        for role in ROLES:
            value: Any = single[analysis][role]
            for name in path:
                value = value[name]
            for end in ("value", "low", "high"):
                assert rows[key]["models"][role][end] == pytest.approx(value[end], rel=1e-12, abs=1e-12), (key, role)
    assert rows["direct_effect_error"]["models"]["ln_free"]["value"] < 1e-8
    assert rows["direct_effect_error"]["models"]["control"]["value"] > 0.1


def test_the_page_is_whole_safe_and_has_the_figures(run: Path, said: str) -> None:
    html = (run / "analysis" / "paper.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.unbalanced
    assert not {tag for tag, _ in page.tags} & {"script", "b", "link", "iframe"}
    assert "<script>alert(1)<b>run" in "".join(page.words), "the name itself is there to read"
    assert "default-src 'none'" in html and "url(" not in html
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 7 and all(one.startswith("data:image/png;base64,iVBOR") for one in sources)
    rows = json.loads((run / "analysis" / "interpret.json").read_text())["rows"]
    words = "".join(page.words)
    value = rows["attribution_patching_error"]["models"]["original"]["value"]
    assert f"{value:.1f}" in words and "49.1 / 57.9 / 0.0" in words and "no clear change" in words
    assert words.count(": disagrees with the paper") == sum(
        one["agrees_with_published_change"] is False for one in rows.values()
    )
    assert "original" in said and "paper.html" in said and "LN-free" in said
    files = {path.name for path in (run / "analysis").iterdir()}
    assert {"paper.png", "paper.pdf", "paper-calibration.png", "paper-dla-centred.pdf"} <= files
    assert not any(name.startswith(("dla", "attention")) for name in files), "figures of single analyses are left alone"


def test_the_report_links_the_page_where_there_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text=SCRIPT + IMAGE)
    assert "analysis/paper.html" not in write_report(run).read_text()
    (run / "analysis").mkdir()
    (run / "analysis" / "paper.html").write_text("a page")
    assert '<a href="analysis/paper.html">' in write_report(run).read_text()


def test_entropy_neurons_are_those_above_one_half_and_their_share_is_that_of_neurons(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ln_removal.interpret.paper as paper

    models = load(run)
    documents = models.documents(4, length=24, prepend_bos=False)
    task = read_task(prompts, models.tokenizer, prepend_bos=False)
    found = paper_of_run(models, documents, task, prompts=2, ablated=8)
    first = found.neurons.results["original"]
    best = int(np.nanargmax(first.mediated))
    shares = np.sort(first.mediated)
    monkeypatch.setattr(paper, "ENTROPY_NEURON", float(shares[-2:].mean()))  # between the two largest shares
    assert found.entropy_neurons == [int(first.ablated[best])]
    row = next(one for one in found.rows() if one.key == "entropy_neurons_share")
    assert str(first.ablated[best]) in row.title and row.values["ln_free"] == Interval(0, 0, 0)
    for role, value in row.values.items():
        assert value == pytest.approx(found.neurons.results[role].mediated_interval(best, seed=documents.seed))
    monkeypatch.setattr(paper, "ENTROPY_NEURON", 2.0)
    assert not found.entropy_neurons and "entropy_neurons_share" not in found.to_json()["rows"]
    alone = Paper(**{**vars(found), "neurons": replace(found.neurons, results={"original": first})})
    assert alone.entropy_neurons == [] and isinstance(first, neurons.NeuronEffects)


@pytest.mark.parametrize(
    ("key", "values", "word"),
    [
        ("attribution_patching_error", {"original": (70, 60, 80), "ln_free": (33, 24, 42)}, "disagrees"),
        ("attribution_patching_error", {"original": (70, 40, 80), "ln_free": (33, 24, 42)}, "agrees"),
        ("published_sink_rate", {"original": (15, 14, 16), "ln_free": (12, 11, 13)}, "agrees"),
        ("published_sink_rate", {"original": (10, 9, 11), "ln_free": (12, 11.5, 13)}, "disagrees"),
        ("published_sink_rate", {"ln_free": (12, 11, 13)}, None),
        ("published_sink_rate", {"original": (np.nan, np.nan, np.nan), "ln_free": (12, 11, 13)}, None),
        ("sink_heads", {"original": (10, 9, 11), "ln_free": (12, 11, 13)}, None),
    ],
)
def test_what_agrees_with_the_paper(key: str, values: dict[str, tuple[float, float, float]], word: str | None) -> None:
    row = Row(key, "this", "per cent", 1, {role: Interval(*one) for role, one in values.items()}, "documents", "x")
    sentence = comparison(row)
    assert (word is None) == (sentence == "") and (word or "") in sentence
    assert row.agrees == (None if word is None else word == "agrees")
    json.dumps(row.to_json(), allow_nan=False)
    if key == "published_sink_rate":
        assert published_cell(row) == "55.3 / - / 45.3" and PUBLISHED[key].values["original"] == 55.3


def test_rounding_is_shown_as_an_order_of_magnitude() -> None:
    assert cell_parts(Interval(7e-13, 6e-13, 8e-13), 1) == ("7e-13", "")
    assert cell_parts(Interval(39.52, 37.8, 41.2), 1) == ("39.5", "[37.8, 41.2]")
    assert cell_parts(Interval(0, 0, 0), 3) == ("0", "") and cell_parts(Interval(np.nan, np.nan, np.nan), 1)[0] == "-"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("nowhere", "nowhere"),
        ("run --task nothing.jsonl", "brackets"),
        ("run --task return", "brackets"),
        ("run --task ioi", "ioi"),
        ("run --length 3", "8"),
        ("run --documents 0", "documents"),
        ("run --ablated 0", "ablated"),
    ],
)
def test_mistakes_are_one_line(here: Path, options: str, word: str) -> None:
    assert word in refused(f"ln-analyze paper {options} --out new")
    assert not Path("new").exists()
