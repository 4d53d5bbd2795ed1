"""The rows of a report on the course of an alignment, and on each pair of layers."""

from ..summary import Summary
from ..tables import FINAL, Figure, figure_at
from .alignment import PairFigures

_MARKED = {"step": "Step", **{name: FINAL[name] for name in ("cos_sim", "centred_cos_sim", "margin", "cka")}}

PAIRED = {
    "cos_sim": "CosSim",
    "centred_cos_sim": "Centred",
    "shuffled_cos_sim": "Shuffled",
    "margin": "Margin",
    "cka": "CKA",
    "student_effective_rank": "Rank, student",
    "target_effective_rank": "Rank, targets",
    "teacher_effective_rank": "Rank, teacher",
}
"""The figures of a pair of layers, with short names for the head of a table."""

_COURSE = {"start": "before the first step", "best": "at its best", "last": "at last"}
"""The marks of `AlignmentCourse` in words."""


def course_rows(summary: Summary) -> list[tuple[str, list[Figure]]]:
    """For each of start, best and last that was measured, in words: the step and the figures of the probe."""
    return [
        (
            _COURSE[name].capitalize(),
            [Figure(f"alignment.{name}.{key}", label, getattr(mark, key)) for key, label in _MARKED.items()],
        )
        for name, mark in summary.alignment.marks().items()
    ]


def course_figures(summary: Summary) -> list[Figure]:
    """The margins that `course_rows` has, but for the last, which is a final figure."""
    return [
        Figure(f"alignment.{name}.margin", f"Margin {_COURSE[name]}", figure_at(summary, f"alignment.{name}.margin"))
        for name in ("start", "best")
    ]


def pair_rows(summary: Summary) -> list[tuple[PairFigures, list[Figure]]]:
    """Each pair of layers with its figures; none of a single pair, whose figures are the final ones."""
    pairs = summary.final.pairs or []
    return [
        (pair, [Figure(f"final.pairs.{n}.{key}", label, getattr(pair, key)) for key, label in PAIRED.items()])
        for n, pair in enumerate(pairs if len(pairs) > 1 else [])
    ]
