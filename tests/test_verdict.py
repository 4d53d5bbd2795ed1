import copy

import pytest

from kava_trainer.verdict import CONTROL_FAILED, judge

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


def verdict(collapse=None, supervised=True, broken=(), **changes):
    summary = copy.deepcopy(GOOD)
    for path, value in changes.items():
        group, name = path.split("__")
        summary[group][name] = value
    return judge(summary, collapse, supervised, list(broken))


def test_a_sound_run_is_a_success_and_says_by_how_much_it_beat_the_control():
    result = verdict()
    assert (result["success"], result["collapsed"]) == (True, False)
    text = " ".join(result["reasons"])
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
    assert result["success"] is False
    assert part in result["reasons"][0]
    assert result["collapsed"] is ("collapse" in arguments)


def test_problems_during_training_end_the_success():
    summary = {**copy.deepcopy(GOOD), "problems": [{"step": 3, "kind": "nan", "action": "skipped"}]}
    result = judge(summary, None, True, [])
    assert result["success"] is False
    assert result["reasons"][0] == "Training was not stable: nan (see problems)."


def test_a_broken_control_is_said_and_takes_no_success_away():
    problem = {"step": None, "kind": CONTROL_FAILED, "action": "went on without the control"}
    summary = {**copy.deepcopy(GOOD), "problems": [problem]}
    summary["evaluation"]["control_sft"] = None
    result = judge(summary, None, True, [])
    assert result["success"] is True
    assert result["reasons"][-1] == "The control broke off, so there is nothing to compare with."


def test_a_tie_is_no_win():
    equal = {"perplexity": 1.02, "cross_entropy": 0.0201, "exact_match": None}
    assert "KAVA did not beat the control" in verdict(evaluation__control_sft=equal)["reasons"][-1]


def test_the_edge_counts_as_reached():
    assert verdict(final__cos_sim=0.95)["success"] is True


def test_a_control_that_is_better_is_said_so():
    better = {"perplexity": 1.01, "cross_entropy": 0.01, "exact_match": 0.9}
    text = verdict(evaluation__control_sft=better)["reasons"][-1]
    assert "KAVA did not beat the control" in text
    assert "2.00 times" in text
    assert "20.0 points lower" in text


def test_without_a_control_or_generation_there_is_no_such_figure():
    assert not any("control" in reason for reason in verdict(evaluation__control_sft=None)["reasons"])
    control = {"perplexity": 1.22, "cross_entropy": 0.2, "exact_match": None}
    assert "nats). One pair" in verdict(evaluation__control_sft=control)["reasons"][-1]


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
    assert result["success"] is None
    assert any(part in reason for reason in result["reasons"])
    assert result["collapsed"] is (None if "final__margin" in changes else False)
