import copy
import math
import re

import pytest

from kava_trainer.reports.findings.alignment import AlignmentCourse, PairFigures, ProbeMark
from kava_trainer.reports.summary import Summary
from kava_trainer.reports.verdict import CONTROL_FAILED, TEACHER_AT_CHANCE, few_examples, judge
from kava_trainer.utils.console import apart, fixed, significant, size_text

GOOD = {
    "final": {"cos_sim": 0.96, "margin": 0.9},
    "evaluation": {
        "teacher": None,
        "student_before": {"perplexity": 500.0, "cross_entropy": 6.2, "exact_match": 0.0},
        "student_after": {"perplexity": 1.02, "cross_entropy": 0.02, "exact_match": 0.7},
        "control_sft": {"perplexity": 1.22, "cross_entropy": 0.2, "exact_match": 0.2},
    },
    "problems": [],
}

NONE = ", and a difference under 2 % counts as none"


def good(problems=(), **changes):
    content = copy.deepcopy(GOOD) | {"problems": list(problems)}
    for path, value in changes.items():
        group, name = path.split("__")
        content[group][name] = value
    return Summary.from_dict(content)


def verdict(collapse=None, supervised=True, broken=(), **changes):
    return judge(good(**changes), collapse, supervised, list(broken))


def test_a_sound_run_is_a_success_and_says_by_how_much_it_beat_the_control():
    result = verdict()
    assert (result.success, result.collapsed) == (True, False)
    text = " ".join(result.reasons)
    assert "CosSim on held-out examples is 0.9600, and on the probe it is 0.90 above that with other tokens'" in text
    assert "from 500 to 1.02" in text
    assert "0.10 times the control's (0.0200 against 0.2000 nats), its exact match 50.0 points higher." in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"collapse": "Because."}, "CosSim means nothing. Because."),
        ({"final__cos_sim": 0.9499}, "CosSim is 0.9499, below 0.95."),
        ({"final__cos_sim": float("nan")}, "CosSim is nan, below 0.95."),
        ({"supervised": False}, "never supervised"),
        ({"broken": ["out/checkpoint-5"]}, "not whole: out/checkpoint-5."),
        (
            {"evaluation__student_before": {"perplexity": 1.0, "cross_entropy": 0.01, "exact_match": None}},
            "perplexity rose from 1 to 1.02",
        ),
    ],
)
def test_each_failure_alone_ends_the_success_and_is_named(arguments, part):
    result = verdict(**arguments)
    assert result.success is False
    assert part in result.reasons[0]
    assert result.collapsed is ("collapse" in arguments)


def test_problems_during_training_end_the_success():
    result = verdict(problems=[{"step": 3, "kind": "nan", "action": "skipped"}])
    assert result.success is False
    assert result.reasons[0] == "Training was not stable: nan (see problems)."


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (90.0, 40.0, "Its steps took 2.2 times as long as the control's (90 against 40 s). One pair"),
        (90.0, None, "points higher. One pair"),
        (None, None, "points higher. One pair"),
    ],
)
def test_where_the_student_wrote_answers_the_seconds_stand_beside_the_control_s(ours, theirs, said):
    summary = good()
    summary.throughput.train_seconds, summary.throughput.control_train_seconds = ours, theirs
    assert said in " ".join(judge(summary, None, True, []).control)


def test_a_broken_control_is_said_and_takes_no_success_away():
    problem = {"step": None, "kind": CONTROL_FAILED, "action": "went on without the control"}
    result = verdict(problems=[problem], evaluation__control_sft=None)
    assert result.success is True
    assert result.reasons[-1] == "The control broke off, so there is nothing to compare with."


@pytest.mark.parametrize(
    ("ours", "theirs", "matches", "said"),
    [
        (6.1282, 6.1915, (0.0, 0.0), f"1.0 % below the control's (6.1282 against 6.1915 nats){NONE}; both have 0.0 % "),
        (
            6.1915,
            6.1282,
            (0.5, 0.47),
            f"1.0 % above the control's (6.1915 against 6.1282 nats){NONE}, its exact match 3.0",
        ),
        (1.0, 1.0, (None, 0.5), f"equal to the control's (1.0000 against 1.0000 nats){NONE}. One pair"),
        (2.0, 1.0, (None, None), "2.00 times the control's (2.0000 against 1.0000 nats). One pair"),
    ],
)
def test_a_small_difference_is_named_and_is_no_win(ours, theirs, matches, said):
    after, control = (
        {"perplexity": 1.02, "cross_entropy": loss, "exact_match": match}
        for loss, match in zip((ours, theirs), matches, strict=True)
    )
    before = {"perplexity": 9e9, "cross_entropy": 9.0, "exact_match": None}
    result = verdict(
        evaluation__student_before=before, evaluation__student_after=after, evaluation__control_sft=control
    )
    beginning = "KAVA did not beat the control at equal steps: its answer cross-entropy is "
    assert result.reasons[-1].startswith(beginning + said)


def test_few_held_out_examples_are_named_and_take_no_success_away():
    for count, said in ((1, "Only 1 example is held out"), (49, "Only 49 examples are held out")):
        result = judge(good(), None, True, [], examples=count)
        assert result.success is True
        assert any(reason.startswith(f"{said}, fewer than 50, so the figures tell") for reason in result.reasons)
    for count in (None, 50):
        assert "held out" not in " ".join(judge(good(), None, True, [], count).reasons[1:])
    assert "standard error of 7 points" in few_examples(49)
    assert few_examples(50) is few_examples(0) is None


def test_a_teacher_at_chance_ends_the_success_of_a_run_that_learned_from_it():
    problem = {"step": None, "kind": TEACHER_AT_CHANCE, "action": "went on"}
    result = verdict(problems=[problem])
    assert result.success is False
    assert result.reasons[0].startswith("The teacher was no better than chance on the answers")
    assert judge(good([problem]), None, True, [], taught=False).success is True


def test_the_edge_counts_as_reached():
    assert verdict(final__cos_sim=0.95).success is True


def test_a_control_that_is_better_is_said_so():
    better = {"perplexity": 1.01, "cross_entropy": 0.01, "exact_match": 0.9}
    text = verdict(evaluation__control_sft=better).reasons[-1]
    assert "KAVA did not beat the control" in text
    assert "2.00 times" in text
    assert "20.0 points lower" in text


def test_without_a_control_or_generation_there_is_no_such_figure():
    assert not any("control" in reason for reason in verdict(evaluation__control_sft=None).reasons)
    control = {"perplexity": 1.22, "cross_entropy": 0.2, "exact_match": None}
    assert "nats). One pair" in verdict(evaluation__control_sft=control).reasons[-1]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"evaluation__student_after": None}, "no held-out examples"),
        ({"final__cos_sim": None, "final__margin": None}, "No hidden states were aligned"),
        ({"final__margin": None}, "There was no probe"),
    ],
)
def test_what_was_not_measured_is_not_judged(changes, part):
    result = verdict(**changes)
    assert result.success is None
    assert any(part in reason for reason in result.reasons)
    assert result.collapsed is (None if "final__margin" in changes else False)


@pytest.mark.parametrize(("match", "said"), [(0.0, True), (0.01, False), (None, False)])
def test_a_teacher_without_a_single_exact_match_is_named_and_takes_no_success_away(match, said):
    result = verdict(evaluation__teacher={"perplexity": 1.5, "cross_entropy": 0.4, "exact_match": match})
    assert result.success is True
    assert any("The teacher's own answers matched none" in reason for reason in result.reasons) is said


def figures(cross_entropy, match=None):
    return {"perplexity": math.exp(min(cross_entropy, 700)), "cross_entropy": cross_entropy, "exact_match": match}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1e-5, 2e-5, "answer perplexity rose from 1.00001 to 1.00002."),
        (0.02, 0.020001, "answer perplexity rose from 1.020201 to 1.020202."),
        (6.2, 6.2000001, "answer perplexity rose from 492.749 to 492.7491."),
        (1e-17, 3e-17, "answer cross-entropy rose from 0.00000000000000001 to 0.00000000000000003 nats."),
        (800.0, 800.00001, "answer cross-entropy rose from 800.00000 to 800.00001 nats."),
    ],
)
def test_a_rise_is_told_with_figures_that_differ(before, after, said):
    result = verdict(evaluation__student_before=figures(before), evaluation__student_after=figures(after))
    assert result.success is False
    assert result.reasons[0].endswith(said)
    fall = verdict(evaluation__student_before=figures(after), evaluation__student_after=figures(before))
    first, last = re.search(r"from (\S+) to (\S+?)( nats)?\.$", said).groups()[:2]
    assert f"went from {last} to {first}" in " ".join(fall.reasons)


def test_what_did_not_change_is_told_so():
    result = verdict(evaluation__student_before=figures(0.02), evaluation__student_after=figures(0.02))
    assert result.success is True
    assert "The student's answer perplexity stayed at 1.02." in result.reasons


@pytest.mark.parametrize(("cos_sim", "shown"), [(0.94999, "0.94999"), (0.9499999999, "0.9499999999"), (0.5, "0.5000")])
def test_a_cos_sim_below_the_edge_does_not_look_like_it(cos_sim, shown):
    assert verdict(final__cos_sim=cos_sim).reasons[0] == f"CosSim is {shown}, below 0.95."


@pytest.mark.parametrize(
    ("ours", "theirs", "matches", "said"),
    [
        (1e-6, 2e-5, (0.5, 0.50001), "0.05 times the control's (0.00000 against 0.00002 nats), its exact match 0.001 "),
        (1e-7, 2e-3, (None, None), "0.00005 times the control's (0.0000 against 0.0020 nats). One"),
        (1.00001, 1.0, (None, None), "0.001 % above the control's (1.00001 against 1.00000 nats), and a difference"),
        (0.0, 0.0, (None, None), "equal to the control's (0.0000 against 0.0000 nats), and a difference"),
        (3000.0, 1.0, (None, None), "3,000.00 times the control's"),
    ],
)
def test_what_differs_from_the_control_does_not_look_equal(ours, theirs, matches, said):
    pair = (figures(loss, match) for loss, match in zip((ours, theirs), matches, strict=True))
    after, control = pair
    result = verdict(evaluation__student_after=after, evaluation__control_sft=control)
    assert said.replace("0.00005", "5e-05") in result.control[0]


@pytest.mark.parametrize(
    ("first", "second", "digits", "text", "shown"),
    [
        (2_640_000_000, 2_638_000_000, 2, size_text, ("2.640 GB", "2.638 GB")),
        (5_010_000, 5_000_000, 2, size_text, ("5.01 MB", "5.00 MB")),
        (1.0, 1.0, 4, significant, ("1", "1")),
        (float("nan"), 0.95, 4, fixed, ("nan", "0.9500")),
        (1e-300, 2e-300, 4, fixed, ("1e-300", "2.0000000000000001e-300")),
    ],
)
def test_two_numbers_that_differ_are_told_apart(first, second, digits, text, shown):
    assert apart(first, second, digits, text) == shown


def test_the_parts_of_the_verdict_are_all_reasons_in_order():
    result = judge(good(), None, True, [], examples=20)
    assert result.reasons == [*result.why(), *result.caveats, *result.control]
    assert [len(part) for part in (result.why(), result.caveats, result.control)] == [2, 1, 1]
    assert not set(result.next_steps) & set(result.reasons)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Do it again with other seeds"),
        ({"evaluation__control_sft": None}, "Set run_control to true"),
        ({"final__cos_sim": 0.9}, "If CosSim was still rising"),
        ({"supervised": False}, "Set lm_weight to 1"),
        ({"collapse": "Because.", "supervised": False}, "Set lm_weight above 0"),
        ({"collapse": "Because."}, "Lower mercator_weight, or align another layer"),
        ({"broken": ["out/checkpoint-5"]}, "Delete the checkpoints"),
        ({"problems": [{"step": 3, "kind": "nan", "action": ""}]}, "Lower learning_rate and projector_learning_rate."),
        ({"problems": [{"step": None, "kind": TEACHER_AT_CHANCE, "action": ""}]}, "Look at the teacher's weights"),
        ({"evaluation__student_after": None}, "Name a dataset_test_split"),
        ({"evaluation__student_after": figures(7.0)}, "Lower learning_rate or mercator_weight"),
        ({"evaluation__control_sft": figures(0.001)}, "A student that was trained before rarely gains"),
    ],
)
def test_each_verdict_says_what_to_try_next(arguments, said):
    assert verdict(**arguments).next_steps[0].startswith(said)


@pytest.mark.parametrize(("start", "said"), [("random", "Train longer"), ("pretrained", "A student that was trained")])
def test_what_a_lost_comparison_advises_fits_the_students_start(start, said):
    summary = good(evaluation__control_sft=figures(0.001))
    summary.arguments["student_init"] = start
    assert judge(summary, None, True, []).next_steps[0].startswith(said)


def test_few_examples_are_a_caveat_with_what_to_do():
    assert any(step.startswith("Hold out 50 examples") for step in judge(good(), None, True, [], 20).next_steps)
    assert "run_control" not in " ".join(
        judge(good(evaluation__control_sft=None), None, True, [], taught=False).next_steps
    )


PAIRS = [
    PairFigures(student_layer=1, teacher_layer=2, margin=0.45, cos_sim=0.9, collapsed=False),
    PairFigures(student_layer=12, teacher_layer=14, margin=-0.002, cos_sim=0.607, collapsed=True),
]


def test_a_collapse_of_one_of_several_pairs_is_no_collapse_of_all():
    summary = good(final__margin=0.23)
    summary.final.pairs = PAIRS
    result = judge(summary, "1 of 2 pairs of layers collapsed, layers 12 -> 14: Because.", True, [])
    assert (result.success, result.collapsed) == (False, True)
    assert result.reasons[0] == (
        "The alignment collapsed in part, so its mean CosSim means little. "
        "1 of 2 pairs of layers collapsed, layers 12 -> 14: Because."
    )


def test_an_alignment_that_ended_below_its_start_is_a_reason_and_no_failure():
    summary = good()
    summary.alignment = AlignmentCourse(ProbeMark(step=0, margin=0.95), None, ProbeMark(step=60, margin=0.9))
    result = judge(summary, None, True, [])
    said = "The alignment ended below its start: margin 0.900 on the probe, 0.950 before the first step."
    assert (result.success, said in result.why()) == (True, True)


def test_after_a_few_steps_it_is_too_early_and_that_is_said_once():
    summary = good(final__cos_sim=0.2, evaluation__control_sft=figures(0.001))
    summary.arguments |= {"student_init": "random", "mercator_weight": 30.0}
    summary.global_step = 10
    for collapse in (None, "Because."):
        steps = judge(summary, collapse, True, []).next_steps
        assert [step.startswith("After 10 steps it is too early to tell: train longer") for step in steps] == [True]
    summary.global_step = 600
    assert judge(summary, None, True, []).next_steps[1].startswith("Train longer")


@pytest.mark.parametrize(
    ("init", "step", "said"),
    [
        ("pretrained", 10, "After 10 steps it is too early to tell whether the teacher helps"),
        ("teacher_layers", 600, "A student cut out of its teacher gains most from the teacher's predictions"),
        ("pretrained", 600, "A student that was trained before rarely gains"),
        ("random", 10, "Train longer"),
    ],
)
def test_a_lost_comparison_is_advised_on_by_start_and_steps(init, step, said):
    summary = good(evaluation__control_sft=figures(0.001))
    summary.arguments["student_init"], summary.global_step = init, step
    assert judge(summary, None, True, []).next_steps[0].startswith(said)


def test_an_alignment_that_the_training_undid_is_not_advised_to_be_pulled_harder():
    summary = good(final__cos_sim=0.3)
    summary.arguments |= {"projector_direction": "none", "mercator_weight": 3.0}
    summary.global_step = 100
    summary.alignment = AlignmentCourse(ProbeMark(step=0, margin=0.3), None, ProbeMark(step=100, margin=0.1))
    said = "The training undid the start of the alignment: lower learning_rate, or raise warmup_steps."
    assert judge(summary, None, True, []).next_steps[0] == said
