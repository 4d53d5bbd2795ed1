"""What the probe showed of an alignment: in each pair of layers, and before the first step, at its best and at last."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from ...utils.console import apart, fixed

Measured = int | float | None
"""A figure; None where it was not measured."""

MUCH_LOWER = 0.02
"""A margin that ends so far below its start is told of."""

_MARKED = ("cos_sim", "centred_cos_sim", "margin", "cka")


@strict
@dataclass(kw_only=True)
class PairFigures:
    """What the probe shows of one pair of layers, named as in `diagnostics.Diagnostics`; layers count as in
    `hidden_states`."""

    student_layer: int
    teacher_layer: int
    part: str | None = None
    """What of the layers is compared, where there are several parts."""
    cos_sim: Measured = None
    centred_cos_sim: Measured = None
    shuffled_cos_sim: Measured = None
    margin: Measured = None
    cka: Measured = None
    student_effective_rank: Measured = None
    target_effective_rank: Measured = None
    teacher_effective_rank: Measured = None
    collapsed: bool | None = None

    @property
    def layers(self) -> str:
        """Its layers, the student's first."""
        return f"{self.student_layer} -> {self.teacher_layer}{f' {self.part}' if self.part else ''}"


@strict
@dataclass(kw_only=True)
class ProbeMark:
    """What the probe showed at one step, as means over the pairs of layers."""

    step: int
    cos_sim: Measured = None
    centred_cos_sim: Measured = None
    margin: Measured = None
    cka: Measured = None
    collapsed: bool | None = None


@strict
@dataclass
class AlignmentCourse:
    """How an alignment went; None where the probe was not measured."""

    start: ProbeMark | None = None
    """Before the first step."""
    best: ProbeMark | None = None
    """With the highest margin, the start included."""
    last: ProbeMark | None = None

    def marks(self) -> dict[str, ProbeMark]:
        """Those that were measured, by their names."""
        return {name: mark for name, mark in vars(self).items() if mark is not None}


def course_of(history: Iterable[dict[str, Any]]) -> AlignmentCourse:
    """The course of an alignment, from the log lines of the whole training, those of earlier sessions included."""
    marks = [mark for line in history if (mark := _mark(line)) is not None]
    with_margin = [mark for mark in marks if mark.margin is not None]
    return AlignmentCourse(
        start=next((mark for mark in marks if mark.step == 0), None),
        best=max(with_margin, key=lambda mark: mark.margin or 0.0, default=None),
        last=marks[-1] if marks else None,
    )


def _mark(line: dict[str, Any]) -> ProbeMark | None:
    """What a log line tells of the probe; None where it is none of a probe, whatever its set of examples is called."""
    flag = next((name for name in line if name.endswith("_collapsed")), None)
    if flag is None or not isinstance(line.get("step"), int):
        return None
    prefix = flag.removesuffix("collapsed")
    figures = {name: _finite(line.get(f"{prefix}{name}")) for name in _MARKED}
    return ProbeMark(step=line["step"], collapsed=bool(line[flag]), **figures)


def _finite(value: Any) -> Measured:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def below_start(course: AlignmentCourse) -> str | None:
    """The sentence for an alignment that ended below its start; None for any other, and where it is not known."""
    start, best, last = course.start, course.best, course.last
    if start is None or last is None or start.margin is None or last.margin is None or last.step == start.step:
        return None
    if start.margin - last.margin < MUCH_LOWER:
        return None
    ended, began = apart(last.margin, start.margin, 3, fixed)
    found = f"The alignment ended below its start: margin {ended} on the probe, {began} before the first step"
    if best is not None and best.margin is not None and best.margin - start.margin >= MUCH_LOWER:
        found += f", and {best.margin:.3f} at its best, after step {best.step}"
    return f"{found}."


def worst_first(pairs: Iterable[PairFigures]) -> list[PairFigures]:
    """The pairs by their margins, the lowest first; one that is no finite number is the worst of all."""
    return sorted(pairs, key=lambda pair: -math.inf if pair.margin is None else pair.margin)


def told_of_pairs(pairs: Sequence[PairFigures]) -> str:
    """What a mean margin does not tell: the lowest one, and how many pairs collapsed; empty for a single pair."""
    if len(pairs) < 2:
        return ""
    worst = worst_first(pairs)[0]
    lowest = "no finite number" if worst.margin is None else f"{worst.margin:.4f}"
    collapsed = sum(bool(pair.collapsed) for pair in pairs)
    found = f"It is the mean of {len(pairs)} pairs of layers; the lowest is {lowest}, of layers {worst.layers}"
    return f"{found}, and {collapsed} of them collapsed." if collapsed else f"{found}."
