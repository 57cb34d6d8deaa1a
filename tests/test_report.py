"""report.html as text: every figure of the run is on it, nothing that it quotes is markup, what is missing is left out."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_run import IMAGE, LAYERS, SCRIPT, write_run
from typer.testing import CliRunner

from ln_removal.cli.report import app
from ln_removal.errors import UserError
from ln_removal.evaluation import results as results_file
from ln_removal.report.figures import Chart, Series, figure
from ln_removal.report.page import write_report
from ln_removal.report.run_record import LOSSES as PUBLISHED
from ln_removal.report.run_record import read_constants, read_curve


class Page(HTMLParser):
    """The tags, and the text outside style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))  # SVG's <line/>

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(run: Path) -> tuple[str, Page]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


def test_every_section_and_figure_is_there(run: Path) -> None:
    html, page = page_of(run)
    assert not page.unbalanced and not page._open
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Training",
        "Loss by position",
        "Residual stream",
        "Frozen constants",
        "Worst samples",
        "Odd text",
        "Continuations",
        "Published results",
        "Recipe and versions",
    ]
    words = " ".join("".join(page.words).split())
    for shown in ("2.7281", "2.7689", "2.8262", "+0.0573", "± 0.0222", "76.10", "75.45", "± 0.97", "0.0123", "1.1100"):
        assert shown in words, shown
    assert "+0.0500 to +0.0600" in words and "57 documents" in words and "worst 99.125" in words
    assert "5.625" in words and "17.25" in words, "frozen constants"
    for one in PUBLISHED:
        assert str(one.ln_free) in words and one.source in words
    assert "arxiv.org/abs/2409.13710" in html and "arxiv.org/abs/2507.02559" in html
    assert "tokens_per_step = 4096" in words and "ln_removal" in words


def test_losses_on_prompts_and_which_of_them_bos_harms(run: Path) -> None:
    html, page = page_of(run)
    table = re.findall(r'<table id="prompts">.*?</table>', html, re.DOTALL)[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
    assert rows[0][1:5] == ["original", "control", "LN-free", "LN-free - control"]
    assert rows[2] == ["document start, with BOS", "3.292", "3.342", "3.393", "+0.050", "+0.040 to +0.070"]
    assert len(rows) == 5
    words = " ".join("".join(page.words).split())
    assert "+0.300 with BOS and +0.050 without" in words and "(second copy, text)" in words
    assert "(document start)" not in words, "BOS adds nothing to that gap"
    assert "TransformerLens" in words and "tabs, with BOS" in words


def test_it_needs_nothing_from_outside_and_runs_nothing(run: Path) -> None:
    html, page = page_of(run)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "form", "base"}
    loading = [a for _, attributes in page.tags for a in attributes if a in ("src", "srcset", "data", "action")]
    assert not loading and "url(" not in html and "@import" not in html
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "default-src 'none'" in html and 'name="viewport"' in html
    assert len(html) < 300_000


@pytest.mark.parametrize("planted", [SCRIPT, IMAGE, '"><b onclick=x>', "</pre></style>&amp;", "'`{}\\"])
def test_text_of_corpus_recipe_and_models_is_no_markup(tmp_path: Path, planted: str) -> None:
    html, page = page_of(write_run(tmp_path / "run", text=planted))
    plain = page_of(write_run(tmp_path / "plain"))[1]
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags], "the planted text made or ate a tag"
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in plain.tags], "it made an attribute"
    shown = "".join(page.words)
    assert shown.count(planted) >= 8, "and it is shown as it is"
    assert planted not in html or planted == "'`{}\\"


def test_control_characters_are_visible(run: Path) -> None:
    html, _ = page_of(run)
    assert "before \u240c\u2400" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html)


def test_events_and_curves_from_metrics(run: Path) -> None:
    curve = read_curve(run / "metrics.jsonl")
    assert len(curve.steps) == 60 and math.isnan(curve.losses[40]), "the line cut short is passed over"
    assert curve.evaluations == [(60.0, pytest.approx(2.9))]
    assert list(curve.freezes) == ["ln_2", "ln_1_qk", "ln_1_v", "ln_f", "special"]
    assert curve.freezes["ln_2"] == [(5.0, 8.0)] and len(curve.freezes["special"]) == 2
    html, _ = page_of(run)
    wide = html.split('<div class="wide">')[1].split("</div>")[0]
    assert wide.count('class="span"') == 6 and wide.count('class="band"') == 1
    # The step that was not finite interrupts the thin line of each of the two runs.
    assert wide.count('<polyline class="faint') == 4


def test_frozen_constants_from_the_newest_checkpoint(run: Path) -> None:
    found = read_constants(run / "state")
    assert [constant.site for constant in found[:LAYERS]] == ["ln_2.0", "ln_2.1", "ln_2.2"]
    assert len(found) == 3 * LAYERS + 1 and found[-1].site == "ln_f"
    assert (found[1].ordinary, found[1].end_of_text, found[1].first) == (2.5, 2.0, 17.25)
    (run / "state" / "step-000090").mkdir()
    (run / "state" / "step-000090" / "model.safetensors").write_bytes(b"damaged")
    assert read_constants(run / "state") == found
    assert read_constants(run / "nothing") == []


def test_a_bare_run_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps(
            {
                "format": "ln-removal results 1",
                "models": {"original": "gpt2", "ln_free": "out/model"},
                "cross_entropy": {"original": 3.1, "ln_free": 3.2},
                "tokens": 10,
                "seconds": 1.0,
                "device": "cpu",
                "settings": {"data": "d", "context": 8},
                "versions": {},
            }
        )
    )
    html, page = page_of(tmp_path)
    assert not page.unbalanced
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Published results", "Recipe and versions"]
    words = "".join(page.words)
    assert "3.2000" in words and "no control was trained" in words and "ln-evaluate" in words
    assert "control" not in re.findall(r'<table id="scores">.*?</table>', html, re.DOTALL)[0]


def test_losses_that_are_not_finite(run: Path) -> None:
    found = results_file.read(run / "results.json")
    broken = found.model_copy(
        update={"cross_entropy": found.cross_entropy.model_copy(update={"ln_free": math.inf}), "gap": math.inf}
    )
    results_file.write(broken, run / "results.json")
    _, page = page_of(run)
    assert "inf" in "".join(page.words) and not page.unbalanced


def test_command(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, [str(run)])
    assert done.exit_code == 0 and done.stdout == f"report: {run / 'report.html'}\n"
    assert [path.name for path in run.glob("report.html*")] == ["report.html"]
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such directory"),
        ([str(tmp_path)], "has no results.json"),
    ):
        failed = runner.invoke(app, arguments)
        assert failed.exit_code == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
    (run / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"r\.json|results\.json"):
        write_report(run)


def test_chart_places_values_on_its_axes() -> None:
    points = [(0.0, 1.0), (5.0, 2.0), (10.0, 3.0)]
    html = figure(Chart([Series("a", points, "control")], "x", "y", "a & b"), "caption")
    (wide, _) = re.findall(r'<polyline class="line control" points="([^"]*)"', html)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in wide.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)</text>', html.split('<div class="narrow">')[0]))
    positions = {float(value): float(y) - 4 for y, value in ticks.items()}
    assert positions[2] == pytest.approx(y1, abs=0.2), "the tick of 2 stands where the value 2 is drawn"
    assert "a &amp; b" in html


def test_chart_with_nothing_to_draw_or_one_point() -> None:
    assert figure(Chart([Series("a", [(0, math.nan)], "control")], "x", "y", "d"), "c") == ""
    assert figure(Chart([Series("a", [(0, -1.0)], "control")], "x", "y", "d", log_y=True), "c") == ""
    assert "polyline" in figure(Chart([Series("a", [(3, 5.0)], "control")], "x", "y", "d", log_x=True), "c")
