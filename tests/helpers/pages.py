"""The report as a reader sees it."""

import json
import re
from html.parser import HTMLParser

import pytest

from helpers.summaries import lookup

RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


class Page(HTMLParser):
    """What a page shows: its figures by their places, its headings, and the texts of its tags."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.order = "", []
        self.figures, self.tags, self.texts, self._open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.order.append((tag, ""))
        if tag not in ("meta", "link", "line", "path", "use"):
            self._open.append((tag, attributes))
        if "data-figure" in attributes:
            self.figures.append([attributes["data-figure"], attributes.get("value"), ""])

    @classmethod
    def with_ends(cls, text):
        """The tags of a page in order, with a slash those that end, and texts as ("", text)."""
        return cls(text).order

    def handle_endtag(self, tag):
        self.order.append((f"/{tag}", ""))
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        self.raw += data
        if tag not in ("style", "title"):
            self.order.append(("", data))
        self.texts.setdefault(tag, []).append(data.strip())
        if "data-figure" in attributes:
            self.figures[-1][2] += data


def check_page(text, summary):
    """Every figure on the page is the summary's, exactly and as people read it; all are there that were measured, and
    no other."""
    page = Page(text)
    for place, exact, shown in page.figures:
        value = lookup(summary, place)
        assert json.loads(exact) == value, place
        plain = re.sub(r" × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda power: "e" + power[1].translate(RAISED), shown)
        number, unit = re.fullmatch(r"(-?[\d.,e+-]+) ?(.*)", plain).groups()
        scale = {"%": 0.01, "GB": 1e9, "MB": 1e6}.get(unit, 1)
        read = float(number.replace(",", "")) * scale
        if re.search(r"min|h", unit):
            continue
        decimals = len(number.partition(".")[2]) if "e" not in number else 4
        assert read == pytest.approx(value, rel=0.0005, abs=0.51 * 10**-decimals * scale), place
    wanted = {f"final.{name}" for name in summary["final"] if name != "pairs"}
    wanted |= {f"throughput.{name}" for name in summary["throughput"]}
    wanted |= {f"cos_sim_at.{step}" for step in summary["cos_sim_at"]} | {"global_step", "duration_seconds"}
    wanted |= {
        f"evaluation.{who}.{name}"
        for who in summary["evaluation"]
        for name in ("perplexity", "cross_entropy", "exact_match", "retention_cross_entropy")
    }
    assert {place for place in wanted if lookup(summary, place) is not None} == {place for place, _, _ in page.figures}
    return page
