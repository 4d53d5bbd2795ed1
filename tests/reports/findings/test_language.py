import pytest

from kava_trainer.reports.findings.language import Language
from kava_trainer.reports.summary import ModelFigures, Summary
from kava_trainer.reports.verdict import judge

CHANCE = {"source": "the held-out prompts", "texts": 3, "tokens": 9, "chance": 10.8}


def summary_of(teacher=2.68, before=8.37, after=3.93, control=5.24, answers=(1.74, 1.83), **asked):
    summary = Summary(arguments=asked, retention=CHANCE)
    kept = {"teacher": teacher, "student_before": before, "student_after": after, "control_sft": control}
    losses = {"teacher": 1.5, "student_before": 6.9, "student_after": answers[0], "control_sft": answers[1]}
    for who, value in kept.items():
        if value is not None or who != "control_sft":
            figures = {"cross_entropy": losses[who], "perplexity": 2.0, "exact_match": None}
            setattr(summary.evaluation, who, ModelFigures(**figures, retention_cross_entropy=value))
    summary.final.cos_sim, summary.final.margin = 0.96, 0.9
    return summary


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {},
            "8.37 before the training), the teacher 2.68, the control 5.24: it kept more of the teacher's language",
        ),
        ({"after": 5.5}, "it is better at the answers and kept less of the teacher's language than the control."),
        ({"after": 5.5, "answers": (2.0, 1.8)}, "the control 5.24: it kept less of the teacher's language than the"),
        ({"after": 5.25}, "it kept as much of the teacher's language as the control, for under 2 % counts as none."),
        ({"student_init": "random"}, "it learned more of the teacher's language than the control."),
    ],
)
def test_the_verdict_says_what_was_kept_beside_the_control(figures, said):
    result = judge(summary_of(**figures), None, True, [])
    assert len(result.control) == 2
    assert result.control[1].startswith("On text that the answers are not, the student has ")
    assert said in result.control[1]
    assert result.success is True


def test_without_a_control_it_is_a_reason_and_what_was_forgotten_is_told():
    result = judge(summary_of(control=None, before=3.0), None, True, [])
    assert result.why()[-2:] == [
        "On text that the answers are not, the student has 3.93 nats (3.00 before the training), the teacher 2.68.",
        "The training cost the student language that it had before.",
    ]
    assert not result.control


def test_a_text_that_the_teacher_does_not_know_tells_nothing():
    result = judge(summary_of(teacher=13.37), None, True, [])
    assert result.caveats == [
        "The teacher does not know the held-out prompts: it has 13.37 nats there, where chance has 10.80, so nothing "
        "tells what was kept of its language. Name a retention_dataset_name that it knows, or none."
    ]
    assert "language" not in " ".join([*result.control, *result.next_steps])


def test_what_was_not_measured_is_not_told():
    summary = summary_of(teacher=None, before=None, after=None, control=None)
    assert "On text" not in " ".join(judge(summary, None, True, []).reasons)
    assert Language.of(Summary()).is_lost is False


@pytest.mark.parametrize(
    ("figures", "asked", "said"),
    [
        ({"after": 5.5}, {"kd_weight": 0.0}, "Set kd_weight to 1 with kd_tokens all"),
        ({"after": 5.5}, {"kd_weight": 1.0}, "Write kd_tokens all"),
        ({"after": 5.5}, {"kd_weight": 1.0, "kd_tokens": "answers"}, "Write kd_tokens all"),
        ({"after": 3.93}, {"kd_weight": 0.0}, "Set kd_weight to 1 with kd_tokens all"),
        ({"after": 3.93}, {"kd_weight": 1.0, "kd_tokens": "all"}, None),
        ({"after": 3.93, "before": 3.0}, {"kd_weight": 1.0, "kd_tokens": "all"}, "Raise kd_weight, or lower"),
        ({"after": 2.7}, {"kd_weight": 0.0}, None),
        ({"after": 3.93}, {"kd_weight": 0.0, "student_init": "random"}, None),
        ({"after": 5.5}, {"kd_weight": 0.0, "student_init": "random"}, "Set kd_weight to 1 with kd_tokens all"),
    ],
)
def test_what_keeps_the_language_is_advised_where_it_was_lost(figures, asked, said):
    steps = judge(summary_of(**figures, **asked), None, True, []).next_steps
    assert any(step.startswith(said) for step in steps) if said else "kd_" not in " ".join(steps)


@pytest.mark.parametrize(("alignment", "lost"), [(None, True), ({"tokens": 9, "left_out": 0.0}, False)])
def test_nats_of_other_tokens_are_not_compared_with_the_teachers(alignment, lost):
    summary = summary_of(control=None, student_init="pretrained")
    summary.token_alignment = alignment
    assert Language.of(summary).is_lost is lost
    result = judge(summary, None, True, [])
    own = " ".join(result.why())
    assert ("the teacher 2.68 a token of its own" in own) is not lost
    caveats = " ".join(result.caveats)
    assert ("Teacher and student were each measured in their own tokens" in caveats) is not lost
