"""report.html in a real browser: the figures that a reader sees, a phone's width, dark mode, print, and planted scripts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import IMAGE, SCRIPT, write_run

from ln_removal.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium: pip install selenium")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False}


def program(*names: str) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.common.exceptions import WebDriverException

    chromium, driver = program("chromium", "chromium-browser", "google-chrome"), program("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"the browser test needs {missing}, which is not on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    try:
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"{chromium} does not start here: {error.msg}")
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in whose recipe, corpus, model names and samples a script and an image with a handler are planted."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "run", text=SCRIPT + IMAGE)
    write_report(directory)
    return directory


def show(browser: Any, run: Path, metrics: dict[str, Any] = DESKTOP, **media: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [], **media})
    browser.get((run / "report.html").as_uri())


def scheme(value: str) -> list[dict[str, str]]:
    return [{"name": "prefers-color-scheme", "value": value}]


def brightness(color: str) -> float:
    """0 black, 255 white, of an rgb(...) colour as the browser computed it."""
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", color)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


def colours(browser: Any) -> tuple[float, float]:
    """Brightness of page and text."""
    found = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color, "
        "getComputedStyle(document.querySelector('svg text')).fill]"
    )
    page, text, axis = map(brightness, found)
    assert abs(page - axis) > 80, "the axis labels of the charts cannot be read"
    return page, text


def test_figures_on_the_page_are_those_of_results_json(browser: Any, run: Path) -> None:
    show(browser, run)
    results = json.loads((run / "results.json").read_text())

    def shown(figure: str, role: str) -> float:
        cell = browser.find_element("css selector", f"[data-figure={figure}][data-role={role}] .value")
        assert cell.is_displayed()
        return float(cell.text)

    for role in ("original", "control", "ln_free"):
        assert shown("cross_entropy", role) == pytest.approx(results["cross_entropy"][role], abs=5e-5)
        assert shown("bits_per_byte", role) == pytest.approx(results["bits_per_byte"][role], abs=5e-5)
        assert shown("accuracy", role) == pytest.approx(100 * results["accuracy"][role], abs=5e-3)
        spread = results["loss_spread"][role]
        assert shown("percentile_99_9", role) == pytest.approx(spread["percentile_99_9"], abs=5e-3)
        error = browser.find_element("css selector", f"[data-figure=accuracy][data-role={role}] .pm").text
        assert float(error.lstrip("± ")) == pytest.approx(100 * results["accuracy_standard_error"][role], abs=5e-3)
    assert float(browser.find_element("css selector", "[data-figure=gap]").text) == pytest.approx(
        results["gap"], abs=5e-5
    )
    difference = browser.find_element("css selector", "[data-difference='ln_free-control']").text
    assert float(difference) == pytest.approx(results["by_data"][0]["differences"][0]["mean"], abs=5e-5)


@pytest.mark.parametrize("metrics", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_no_horizontal_scrolling_and_readable_charts(browser: Any, run: Path, metrics: dict[str, Any]) -> None:
    show(browser, run, metrics)
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    width, available = browser.execute_script(
        "const r = document.documentElement; return [r.scrollWidth, r.clientWidth]"
    )
    assert width <= available <= metrics["width"]
    charts = [chart for chart in browser.find_elements("css selector", "svg.chart") if chart.is_displayed()]
    assert len(charts) == 5, "loss, two data sets by position, residual stream, constants: each once"
    for chart in charts:
        assert 250 < chart.size["width"] <= available
        size, scale = browser.execute_script(
            "const t = arguments[0].querySelector('text.tick'); "
            "return [parseFloat(getComputedStyle(t).fontSize), t.getScreenCTM().a]",
            chart,
        )
        assert size * scale > 9.5, "axis labels shrink below what can be read"


def test_dark_and_light_and_print(browser: Any, run: Path) -> None:
    show(browser, run, features=scheme("light"))
    page, text = colours(browser)
    assert page > 240 and text < 60
    show(browser, run, features=scheme("dark"))
    page, text = colours(browser)
    assert page < 40 and text > 200
    show(browser, run, features=scheme("dark"), media="print")
    page, text = colours(browser)
    assert page > 240 and text < 60, "paper is white"


def test_planted_scripts_do_not_run_and_are_shown(browser: Any, run: Path) -> None:
    show(browser, run)
    assert browser.title.startswith("LayerNorm removal: tiny <script>")
    assert browser.find_elements("css selector", "script, img, [onerror]") == []
    sample = browser.find_element("css selector", ".sample mark").text.replace("\u2423", " ")
    assert sample == SCRIPT + IMAGE, "the text itself is there to read"


def test_a_script_that_did_get_in_would_not_run(browser: Any, run: Path, tmp_path: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(html.replace("</main>", SCRIPT + IMAGE + "</main>"), encoding="utf-8")
    show(browser, tmp_path)
    assert len(browser.find_elements("css selector", "script")) == 1
    assert browser.title != "planted", "the content security policy lets inline scripts run"


def test_the_page_asks_for_nothing(browser: Any, run: Path) -> None:
    for log in ("performance", "browser"):
        browser.get_log(log)  # what earlier pages left
    show(browser, run)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [(run / "report.html").as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
