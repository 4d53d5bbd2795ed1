"""The pictures of a report, drawn by matplotlib without its global state: inline SVG for the page, and one PNG."""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .charts import Chart, number_text

INKS = {"ink": "#1c2330", "quiet": "#667085", "mild": "#98a2b3", "grid": "#d9dee7", "paper": "#ffffff"}
"""Colours of a page by the name of their variable; `COLOURS` are those of the curves."""

COLOURS = ("#2563c9", "#c2410c", "#0f766e", "#7c3aed", "#a16207", "#be185d")

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
"""How the curves of a chart are dashed, in order, as `stroke-dasharray`: colour alone tells not everybody apart."""

_FEW = 40
"""A curve with at most so many points shows each of them."""

_LINES, _LINE = 5, 165
"""Lines of text in the picture, and characters in one of them."""

_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kava"}

_VARIABLES = {
    **{colour: f"var(--{name})" for name, colour in INKS.items()},
    **{colour: f"var(--c{index})" for index, colour in enumerate(COLOURS)},
}

Bars = list[tuple[str, float | None, str]]
"""A label, a value, None where it was not measured, and the text for it."""

_BAR_COLOURS = {"Teacher": INKS["quiet"], "Student before": INKS["mild"], "Control": COLOURS[1]}
"""Of the bars with these labels; any other bar has the first colour of the curves."""


def _number(value: float, _: object = None) -> str:
    text = f"{value:g}" if abs(value) >= 1e-4 or value == 0 else number_text(value)
    return text.replace("-", "\N{MINUS SIGN}", 1)


def _frame(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INKS["grid"])
    axes.set_facecolor("none")
    axes.tick_params(colors=INKS["quiet"], length=0, labelsize=11)
    axes.set_axisbelow(True)


def _scale(axes: Axes, chart: Chart) -> None:
    """Ticks with plain numbers, also on a logarithmic axis, which needs numbers above 0."""
    values = [value for curve in chart.curves for _, value in curve.points]
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.logarithmic and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        decades = max(values) / min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1000 else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        return
    axes.yaxis.set_major_locator(MaxNLocator(5))
    largest = max(map(abs, values), default=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if largest >= 10_000 else FuncFormatter(_number))
    if chart.from_zero:
        axes.set_ylim(0, 1.1 * largest or 1)
    elif max(values) - min(values) < 1e-6 * largest:  # a flat line stands in the middle, with a plain scale
        axes.set_ylim(*((0, 2 * largest) if min(values) >= 0 else (-2 * largest, 0)))


def _draw(axes: Axes, chart: Chart) -> None:
    _frame(axes)
    axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
    for index, curve in enumerate(chart.curves):
        dashes = DASHES[index % len(DASHES)]
        axes.plot(
            [step for step, _ in curve.points],
            [value for _, value in curve.points],
            color=COLOURS[index % len(COLOURS)],
            linestyle=(0, tuple(float(part) / 2 for part in dashes.split())) if dashes else "-",
            linewidth=2,
            marker="o" if len(curve.points) <= _FEW else "",
            markersize=4,
            label=curve.label,
        )
    _scale(axes, chart)
    if chart.guide is not None:
        value, word = chart.guide
        axes.axhline(value, color=INKS["quiet"], linewidth=1, linestyle=(0, (2, 2)))
        low, high = axes.get_ylim()
        x, side = (0.005, "left") if 2 * value > low + high else (1, "right")  # away from curves that rise
        place = axes.get_yaxis_transform()
        axes.text(x, value, word, color=INKS["quiet"], size=10, ha=side, va="bottom", transform=place)


def _draw_bars(axes: Axes, bars: Bars) -> None:
    """Horizontal bars from the top, each with its text."""
    _frame(axes)
    axes.spines["bottom"].set_visible(False)
    largest = max((value for _, value, _ in bars if value is not None), default=0)
    heights = [value or 0.0 for _, value, _ in bars]
    places = range(len(bars))
    axes.barh(places, heights, color=[_BAR_COLOURS.get(label, COLOURS[0]) for label, _, _ in bars], height=0.62)
    axes.set_yticks(places, [label for label, _, _ in bars], color=INKS["ink"])
    axes.set_xlim(0, 1.25 * largest or 1)
    axes.set_xticks([])
    axes.invert_yaxis()
    for place, (_, value, text) in enumerate(bars):
        colour = INKS["quiet"] if value is None else INKS["ink"]
        axes.text((value or 0) + 0.015 * axes.get_xlim()[1], place, text, va="center", color=colour, size=11)


def _svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page: without a size, its colours variables of the page, its ids its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', text)
    text = re.sub(r"font-family: [^;\"]*;?|font: [^;\"]*;", _font, text)
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", text).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


def _font(found: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", found[0])
    return f"font-size: {size[0]};" if size else ""


def chart_svg(chart: Chart) -> str:
    """A chart as SVG, about 330 wide, without title and legend: those are the page's, in text that wraps."""
    figure = Figure(figsize=(4.6, 2.7))
    figure.subplots_adjust(left=0.14, right=0.985, top=0.95, bottom=0.11)
    _draw(figure.subplots(), chart)
    return _svg(figure, chart.name)


def bars_svg(name: str, bars: Bars) -> str:
    """Bars from the top as SVG, about 330 wide; the name must be unique on the page."""
    figure = Figure(figsize=(4.6, 0.34 * len(bars) + 0.2))
    figure.subplots_adjust(left=0.33, right=0.99, top=0.97, bottom=0.03)
    _draw_bars(figure.subplots(), bars)
    return _svg(figure, name)


def _told(whole: Sequence[str], others: Sequence[str]) -> list[str]:
    """The lines of the picture's text: those of `others` that fit, then all of `whole`."""
    kept = [line for text in whole for line in textwrap.wrap(text, _LINE)]
    told = [line for text in others for line in textwrap.wrap(text, _LINE)]
    room = max(_LINES - len(kept), 1)
    return [*(told if len(told) <= room else [*told[: room - 1], f"{told[room - 1]} ..."]), *kept]


def write_png(
    path: Path,
    title: str,
    verdict: str,
    colour: str,
    whole: Sequence[str],
    others: Sequence[str],
    charts: Sequence[Chart],
    bars: dict[str, Bars],
) -> None:
    """Draw verdict, curves and bars into one picture of 1600 x 900.

    Args:
        path: of the file.
        title: what was distilled.
        verdict: a word or two.
        colour: of the verdict.
        whole: sentences below it that are never cut off.
        others: sentences between the two; what does not fit beside the former is cut off with dots.
        charts: at most four.
        bars: two of them by title.
    """
    figure = Figure(figsize=(16, 9), dpi=100, facecolor=INKS["paper"])
    plain: dict[str, Any] = {"parse_math": False, "va": "top"}  # a name may hold dollar signs
    figure.text(0.03, 0.965, textwrap.shorten(title, 110), size=17, color=INKS["quiet"], **plain)
    figure.text(0.03, 0.925, verdict, size=34, weight="bold", color=colour, **plain)
    figure.text(0.03, 0.86, "\n".join(_told(whole, others)), size=12.5, color=INKS["ink"], linespacing=1.45, **plain)
    grid = figure.add_gridspec(2, 3, left=0.045, right=0.975, top=0.655, bottom=0.05, wspace=0.18, hspace=0.4)
    for place, chart in zip(((0, 0), (0, 1), (1, 0), (1, 1)), charts, strict=False):
        axes = figure.add_subplot(grid[place])
        _draw(axes, chart)
        axes.set_title(chart.title, loc="left", color=INKS["ink"], size=14, weight="bold", pad=24)
        if len(chart.curves) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=5, frameon=False, fontsize=10.5,
                handlelength=2.2, columnspacing=1.2, labelcolor=INKS["ink"],
            )  # fmt: skip
    for row, (name, rows) in enumerate(bars.items()):
        axes = figure.add_subplot(grid[row, 2])
        _draw_bars(axes, rows)
        axes.set_title(name, loc="left", color=INKS["ink"], size=14, weight="bold", pad=24, x=-0.28)
        axes.set_position((0.76, axes.get_position().y0, 0.225, axes.get_position().height))
    with warnings.catch_warnings():  # a name in a script that matplotlib's font lacks shows as boxes, and that is all
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")
