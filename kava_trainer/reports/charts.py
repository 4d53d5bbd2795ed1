"""Which curves a report shows, and their points, read from the log lines of a training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.diagnostics import MINIMUM_MARGIN
from .verdict import REQUIRED_COS_SIM

MOST_POINTS = 1000
"""A curve with more points is thinned out: nobody sees more, and the page would grow with the length of the run."""

TERMS = {
    "mercator": "Mercator",
    "mse": "squared difference",
    "relative_mse": "relative squared error",
    "anchor": "anchor",
    "lm": "next token",
    "kd": "KD",
    "smoothing": "label smoothing",
}

_RAISED = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_text(value: float) -> str:
    """A number for people, to four digits; one that is tiny as `5.489 × 10⁻⁶`."""
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:.4g}"
    factor, exponent = f"{value:.3e}".split("e")
    return f"{float(factor):g} \N{MULTIPLICATION SIGN} 10{str(int(exponent)).translate(_RAISED)}"


Points = list[tuple[int, float]]


@dataclass(frozen=True)
class _Kind:
    """A chart to be: for each curve a label and the names in log lines that hold its values, the last one first."""

    name: str
    title: str
    sources: dict[str, tuple[str, ...]]
    options: dict[str, Any] = field(default_factory=dict)


def _held_out(name: str) -> tuple[str, str]:
    return f"eval_{name}", f"probe_{name}"


KINDS = (
    _Kind(
        "cos_sim",
        "CosSim",
        {
            "training": ("cos_sim",),
            "held out": _held_out("cos_sim"),
            "centred": _held_out("centred_cos_sim"),
            "shuffled": _held_out("shuffled_cos_sim"),
        },
        {
            "note": "Centred should rise as well, and shuffled, against other tokens' targets, stay far below.",
            "guide": (REQUIRED_COS_SIM, "success"),
        },
    ),
    _Kind(
        "margin",
        "Margin",
        {"held out": _held_out("margin")},
        {"note": "CosSim above that with other tokens' targets.", "guide": (MINIMUM_MARGIN, "collapse below")},
    ),
    _Kind(
        "terms",
        "Loss terms, raw",
        {label: (f"{term}_loss",) for term, label in TERMS.items()},
        {"logarithmic": True, "note": "On training batches, before their weights."},
    ),
    _Kind(
        "loss",
        "Loss, weighted sum",
        {"training": ("loss",), "held out": ("eval_loss",)},
        {"logarithmic": True, "note": "A held-out loss has the weights of the first step."},
    ),
    _Kind(
        "cka",
        "CKA to the teacher",
        {"held out": _held_out("cka")},
        {"note": "Of raw states: no projector can raise it."},
    ),
    _Kind(
        "ranks",
        "Effective ranks",
        {side: _held_out(f"{side}_effective_rank") for side in ("student", "target", "teacher")},
        {"note": "A target far below the teacher has thrown most of it away."},
    ),
    _Kind(
        "shares",
        "Share of the student's gradient",
        {label: _held_out(f"{term}_gradient_share") for term, label in TERMS.items()},
        {"note": "What each weighted term does to the student."},
    ),
    _Kind("rates", "Learning rates", {"student": ("learning_rate",), "projector": ("projector_learning_rate",)}),
    _Kind(
        "speed",
        "Tokens a second",
        {"all processes": ("tokens_per_second",)},
        {"note": "Between log lines, with evaluations and saves.", "from_zero": True},
    ),
    _Kind(
        "memory",
        "Measured peak memory so far",
        {"this process": ("peak_memory_bytes",)},
        {"unit": "GB", "from_zero": True},
    ),
)

_SCALES = {"memory": 1e-9}


def points(history: Iterable[dict[str, Any]], names: Iterable[str], scale: float = 1.0) -> Points:
    """Step and value of every log line that has a finite number under one of the names, the earlier name first."""
    names, found = list(names), {}
    for line in history:
        for name in names:
            value = line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(line.get("step"), int):
                found[line["step"]] = scale * value
                break
    return sorted(found.items())


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its label, and its points as step and value by rising step."""

    label: str
    points: Points


@dataclass(frozen=True)
class Chart:
    """One picture of a report."""

    name: str
    title: str
    curves: list[Curve]
    """Those that were measured."""
    unit: str = ""
    note: str = ""
    """What to look for, as one sentence."""
    logarithmic: bool = False
    from_zero: bool = False
    """Whether the axis of the values begins at 0."""
    guide: tuple[float, str] | None = None
    """A value that matters and what it is."""

    def describe(self) -> str:
        """The chart in words, for those who do not see it."""
        unit = f" {self.unit}" if self.unit else ""
        parts = [
            f"{curve.label} from {number_text(curve.points[0][1])} at step {curve.points[0][0]} to "
            f"{number_text(curve.points[-1][1])} at step {curve.points[-1][0]}"
            for curve in self.curves
            if curve.points
        ]
        parts += [f"{curve.label} not measured" for curve in self.curves if not curve.points]
        return f"{self.title}{unit and ' in'}{unit}: {'; '.join(parts)}."


def thin_out(found: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points, give or take the last: of every stretch its smallest and its largest stay."""
    if len(found) <= most:
        return found
    size = math.ceil(2 * len(found) / most)
    kept: set[tuple[int, float]] = {found[0], found[-1]}
    for start in range(0, len(found), size):
        stretch = found[start : start + size]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def charts_of(history: list[dict[str, Any]]) -> tuple[list[Chart], list[str]]:
    """The charts of one run, and the titles of those that have nothing to show."""
    made, empty = [], []
    for kind in KINDS:
        read = {label: points(history, names, _SCALES.get(kind.name, 1)) for label, names in kind.sources.items()}
        curves = [Curve(label, thin_out(found)) for label, found in read.items() if found]
        if curves:
            made.append(Chart(kind.name, kind.title, curves, **kind.options))
        else:
            empty.append(kind.title)
    return made, empty


COMPARED = {
    "cos_sim": ("CosSim, held out", _held_out("cos_sim")),
    "training_cos_sim": ("CosSim, training", ("cos_sim",)),
    "centred": ("Centred CosSim", _held_out("centred_cos_sim")),
    "margin": ("Margin", _held_out("margin")),
    "cka": ("CKA to the teacher", _held_out("cka")),
    "student_rank": ("Student's effective rank", _held_out("student_effective_rank")),
    "mercator": ("Mercator term, raw", ("mercator_loss",)),
    "lm": ("Next-token term, raw", ("lm_loss",)),
    "kd": ("KD term, raw", ("kd_loss",)),
    "rate": ("Learning rate", ("learning_rate",)),
    "speed": ("Tokens a second", ("tokens_per_second",)),
    "memory": ("Measured peak memory so far", ("peak_memory_bytes",)),
}
"""The charts that lay one curve of each run over the others': title, and names in log lines."""


def compared_charts(histories: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """One chart for each figure that any of the runs has logged, with a curve for each; log lines are by run name."""
    made = []
    for name, (title, names) in COMPARED.items():
        read = {run: points(history, names, _SCALES.get(name, 1)) for run, history in histories.items()}
        curves = [Curve(run, thin_out(found)) for run, found in read.items()]
        if any(curve.points for curve in curves):
            made.append(
                Chart(
                    name,
                    title,
                    curves,
                    unit="GB" if name == "memory" else "",
                    logarithmic=name in ("mercator", "lm", "kd"),
                    from_zero=name in ("speed", "memory"),
                )
            )
    return made
