"""The report in a real browser: it asks for nothing, complains of nothing, and shows the summary's figures."""

import json
import re

import pytest
from helpers.chromium import Tab, browsing, find_chromium
from helpers.summaries import EVIL, FEW, lookup, make_summary

from kava_trainer.reports.comparison import write_comparison
from kava_trainer.reports.page import report_page
from kava_trainer.reports.run_reader import read_run

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium"
)

FIGURES = "[...document.querySelectorAll('[data-figure]')].map(e => [e.dataset.figure, e.value ?? null, e.innerText])"
SCROLLS = "[document.documentElement.scrollWidth, innerWidth]"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        summary = make_summary(None if name == "one" else FEW, output_dir=str(folder), long_argument="x" * 500)
        summary.content.samples[0].answers["teacher"] = "y" * 2000
        summary.content.final.cka = 0.25 if name == "one" else None
        summary.write(folder / name, "completed")
    (folder / "one" / "report.html").write_text(report_page(read_run(folder / "one")), encoding="utf-8")
    write_comparison([read_run(folder / "one"), read_run(folder / "two")], folder / "comparison.html")
    return folder


@pytest.mark.parametrize("page", ["one/report.html", "comparison.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_asks_for_nothing_complains_of_nothing_and_fits(browser, folder, page, scheme, width):
    tab = Tab(browser, width, scheme=scheme).open(folder / page)
    scroll, inner = tab.evaluate(SCROLLS)
    assert inner == width
    assert scroll <= width
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [(folder / page).as_uri()]
    red, green, blue = map(int, re.findall(r"\d+", tab.evaluate(BACKGROUND)))
    assert (max(red, green, blue) < 64) if scheme == "dark" else (min(red, green, blue) > 192)
    narrow = tab.evaluate("Math.min(...[...document.querySelectorAll('figure > svg')].map(e => e.clientWidth))")
    assert narrow > 250


def test_the_figures_that_a_reader_sees_are_the_summary_s(browser, folder):
    tab = Tab(browser).open(folder / "one" / "report.html")
    summary = json.loads((folder / "one" / "run_summary.json").read_text())
    found = tab.evaluate(FIGURES)
    assert len(found) == 47
    for place, exact, shown in found:
        value = lookup(summary, place)
        assert json.loads(exact or "null") == value, place
        assert shown.strip() == "not measured" if value is None else re.search(r"\d", shown), place
    assert tab.evaluate("document.querySelector('h2').innerText") == "Success"
    assert EVIL in tab.evaluate("document.querySelector('article pre').innerText")
    assert tab.evaluate("document.scripts.length") == 0
    compared = [exact for place, exact, _ in Tab(browser).open(folder / "comparison.html").evaluate(FIGURES)
                if place == "final.cka"]  # fmt: skip
    assert compared == ["0.25", None]


def test_the_text_of_the_plots_is_text_in_the_colours_of_the_scheme(browser, folder):
    colours = []
    for scheme in ("light", "dark"):
        tab = Tab(browser, scheme=scheme).open(folder / "one" / "report.html")
        assert "Student before" in tab.evaluate("document.querySelector('figure').textContent")
        colours.append(tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"))
    assert colours[0] != colours[1]
    assert all(colour.startswith("rgb") for colour in colours)


def test_it_prints(browser, folder):
    content = Tab(browser, scheme="dark").open(folder / "one" / "report.html").pdf()
    assert content.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type /Page\b(?!s)", content)) <= 30


def test_what_this_file_watches_for_would_be_seen(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p style='width: 2000px'>x</p><img src='missing.png'><script>console.error(1); throw 2</script>")
    tab = Tab(browser, 360).open(page)
    scroll, inner = tab.evaluate(SCROLLS)
    assert scroll > inner or inner > 360
    assert len(tab.complaints()) >= 2
    assert page.with_name("missing.png").as_uri() in tab.requests()
