import pytest

from kava_trainer.reports.findings.alignment import (
    AlignmentCourse,
    PairFigures,
    ProbeMark,
    below_start,
    course_of,
    told_of_pairs,
)


def probe(step, margin, prefix="probe", **others):
    figures = {"cos_sim": 0.5, "centred_cos_sim": 0.4, "margin": margin, "cka": 0.3, "collapsed": 0.0, **others}
    return {"step": step, **{f"{prefix}_{name}": value for name, value in figures.items()}}


@pytest.mark.parametrize("prefix", ["eval", "eval_a_set", "eval_pair0"])
def test_a_course_has_the_probe_at_the_start_at_its_best_and_at_last(prefix):
    training = [{"step": step, "loss": 1.0, "collapsed": 0.0} for step in (1, 2)]
    pairs = {f"{prefix}_pair0_margin": 9.0}
    lines = [
        probe(0, 0.129),
        *training,
        probe(3, 0.2, prefix, **{"pair0_margin": 9.0}),
        probe(6, 0.069, prefix) | pairs,
    ]
    course = course_of(lines)
    assert [(mark.step, mark.margin) for mark in course.marks().values()] == [(0, 0.129), (3, 0.2), (6, 0.069)]
    assert course.start.cka == 0.3


def test_what_was_not_measured_is_none_and_no_number_is_no_best():
    assert course_of([{"step": 1, "loss": 1.0, "collapsed": 1.0}]) == AlignmentCourse()
    course = course_of([probe(4, float("nan"), collapsed=1.0)])
    assert (course.start, course.best) == (None, None)
    assert (course.last.margin, course.last.collapsed) == (None, True)


def course(start, best, last, step=10):
    marks = {name: None if margin is None else ProbeMark(step=number, margin=margin)
             for name, number, margin in (("start", 0, start), ("best", 5, best), ("last", step, last))}  # fmt: skip
    return AlignmentCourse(**marks)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (course(0.129, 0.129, 0.069), "margin 0.069 on the probe, 0.129 before the first step."),
        (course(0.129, 0.2, 0.069), "0.129 before the first step, and 0.200 at its best, after step 5."),
        (course(0.129, 0.129, 0.12), None),
        (course(0.1, 0.9, 0.9), None),
        (course(None, 0.9, 0.1), None),
        (course(0.5, 0.5, None), None),
        (course(0.5, 0.5, 0.1, step=0), None),
    ],
)
def test_an_alignment_that_ended_below_its_start_is_told(found, said):
    told = below_start(found)
    assert (told is None) is (said is None)
    assert told is None or (
        told.startswith("The alignment ended below its start: margin 0.069") and told.endswith(said)
    )


def pair(student, teacher, margin, collapsed=False):
    return PairFigures(student_layer=student, teacher_layer=teacher, margin=margin, collapsed=collapsed)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], ""),
        ([pair(1, 2, 0.3)], ""),
        ([pair(1, 2, 0.3), pair(2, 4, 0.2)], "the mean of 2 pairs of layers; the lowest is 0.2000, of layers 2 -> 4."),
        ([pair(12, 14, -0.002, True), pair(2, 4, 0.5)], "is -0.0020, of layers 12 -> 14, and 1 of them collapsed."),
        ([pair(1, 2, 0.3), pair(2, 4, None, True)], "is no finite number, of layers 2 -> 4, and 1 of them collapsed."),
    ],
)
def test_a_mean_margin_is_told_with_its_lowest_pair(pairs, said):
    assert told_of_pairs(pairs).endswith(said)
    assert bool(told_of_pairs(pairs)) is bool(said)
