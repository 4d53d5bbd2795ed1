"""The student's own answers on the page of a run."""

import pytest
from helpers.pages import Page
from helpers.summaries import EVIL, FEW, make_summary

from kava_trainer.reports.findings.rollouts import RolloutPair, excerpt
from kava_trainer.reports.page import report_page
from kava_trainer.reports.run_reader import read_run

HEADING = "The student's own answers, first and last"


def page_of(folder, pairs):
    summary = make_summary(FEW)
    summary.content.rollouts = pairs
    summary.write(folder, "completed")
    record = read_run(folder)
    assert record.summary.rollouts == pairs
    return report_page(record)


def test_first_and_last_answers_stand_side_by_side_and_are_never_taken_for_html(tmp_path):
    pairs = [RolloutPair(f"{EVIL} {n}", f"{EVIL} first {n}", f"{EVIL} last {n}") for n in range(10)]
    text = page_of(tmp_path, pairs)
    page = Page(text)
    assert HEADING in page.texts["h2"]
    cells = [own for own in page.texts["pre"] if "first" in own or "last" in own]
    assert cells == [own for pair in pairs for own in (pair.first, pair.last)]
    assert all(pair.prompt in page.texts["pre"] for pair in pairs)
    assert "<script" not in text.lower()


def test_an_empty_answer_is_told_as_one(tmp_path):
    assert Page(page_of(tmp_path, [RolloutPair("2+2?", "", "4")])).texts["pre"].count("(an empty answer)") == 1


@pytest.mark.parametrize("pairs", [None, []])
def test_a_run_without_them_has_no_section(tmp_path, pairs):
    assert HEADING not in Page(page_of(tmp_path, pairs)).texts["h2"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", ""),
        ("x" * 397, "x" * 397),
        ("a" * 240 + "m" * 500 + "z" * 150, f"{'a' * 240} [...] {'z' * 150}"),
    ],
)
def test_a_long_answer_keeps_its_beginning_and_its_end(text, cut):
    assert excerpt(text) == cut
    assert len(excerpt(text)) <= 400  # what is open on the page


@pytest.mark.parametrize("text", ["{}", "a" * 235 + "{}" + "z" * 300, "a" * 300 + "{}" + "z" * 140])
def test_no_part_of_a_secret_is_left_where_a_text_is_cut(monkeypatch, text):
    monkeypatch.setenv("HUB_TOKEN", "hf_0123456789")
    shown = excerpt(text.format("hf_0123456789"))
    assert not any(part in shown for part in ("hf_", "012", "789"))
