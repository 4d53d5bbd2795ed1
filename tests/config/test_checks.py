"""What several arguments say together, before anything is loaded."""

import pytest

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.checks import heaviest_alignment, usual_dropout
from kava_trainer.utils.errors import WrongArguments


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({"mercator_weight": 3.0, "mse_weight": 0.2}, "mercator_weight"),
        ({"mercator_weight": 0.0, "relative_mse_weight": 15.0}, "relative_mse_weight"),
        ({"mercator_weight": 0.0, "mse_weight": None}, "mercator_weight"),
        ({}, "mercator_weight"),
    ],
)
def test_advice_names_the_weight_that_there_is(weights, name):
    assert heaviest_alignment(weights) == name


@pytest.mark.parametrize(
    ("anchor", "init", "dropout"),
    [
        ("none", "least_squares", 0.0),
        ("pca", "random", 0.0),
        ("none", "random", 0.1),
        ("reconstruction", "random", 0.1),
    ],
)
def test_a_projector_that_starts_from_a_fit_has_no_dropout(anchor, init, dropout):
    assert usual_dropout(anchor, init) == dropout


BRIDGE = {"projector_direction": "teacher_to_student", "projector_anchor": "pca", "projector_rank": 8}

WRONG = {
    "rank of a trained projector": ({"projector_rank": 8}, "frozen bridge of .* but they are none and student_to_tea"),
    "rank of a decoded one": ({**BRIDGE, "projector_anchor": "reconstruction"}, "but they are reconstruction and teac"),
    "rank in one direction": ({**BRIDGE, "projector_direction": "student_to_teacher"}, "but they are pca and student_"),
    "rank of no projector": ({**BRIDGE, "projector_direction": "none"}, "but they are pca and none; write these two"),
    "rank from random weights": ({**BRIDGE, "projector_init": "random"}, "fits the student's side by least squares"),
    "rank of zero": ({**BRIDGE, "projector_rank": 0}, "projector_rank is 0; write a whole number above 0, or auto"),
    "rank below zero": ({**BRIDGE, "projector_rank": "-3"}, "projector_rank is -3; write a whole number above 0"),
    "rank in words": ({**BRIDGE, "projector_rank": "Auto"}, "projector_rank is Auto; write a whole number above 0"),
    "rank of truth": ({**BRIDGE, "projector_rank": True}, "projector_rank is True; write a whole number above 0"),
    "no term at first": (
        {"mercator_weight": 0.0, "lm_weight": 0.0, "kd_weight": 1.0, "kd_schedule": "linear"},
        "kd_schedule linear begins with a divergence of weight 0, and no other term has any; write constant",
    ),
    "no term in the first half": (
        {"mercator_weight": 0.0, "lm_weight": 0.0, "kd_weight": 1.0, "kd_schedule": "stage"},
        "kd_schedule stage begins with a divergence of weight 0",
    ),
    "no term in the second half": (
        {"lm_weight": 0.0, "alignment_schedule": "stage"},
        "alignment_schedule stage ends with the first half of the run, and no other term goes on then",
    ),
    "no term at first on its own answers": (
        {"mercator_weight": 0.0, "on_policy_fraction": 1.0, "kd_weight": 1.0, "kd_schedule": "cosine"},
        "kd_schedule cosine begins with a divergence of weight 0, and no other term has any; write constant, or raise "
        "mercator_weight",
    ),
    "no term at last on its own answers": (
        {"on_policy_fraction": 1.0, "alignment_schedule": "stage"},
        "and no other term goes on then; write constant, or raise kd_weight",
    ),
    "own answers without a term at first": (
        {"mercator_weight": 0.0, "on_policy_fraction": 0.5, "kd_weight": 1.0, "kd_schedule": "stage"},
        "kd_schedule stage leaves the student's own answers without a term in the first half of the run",
    ),
    "own answers without a term at last": (
        {"on_policy_fraction": 0.5, "alignment_schedule": "stage"},
        "alignment_schedule stage leaves the student's own answers without a term in the second half of the run",
    ),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_makes_no_sense_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(WrongArguments, match=said) as caught:
        KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("changes", [
    BRIDGE,
    {**BRIDGE, "projector_rank": "auto"},
    {"lm_weight": 0.0, "kd_weight": 1.0, "alignment_schedule": "stage", "kd_schedule": "stage"},
    {"mercator_weight": 0.0, "kd_weight": 1.0, "kd_schedule": "cosine"},
    {"on_policy_fraction": 1.0, "kd_weight": 1.0, "alignment_schedule": "stage", "kd_schedule": "stage"},
    {"mercator_weight": 0.0, "lm_weight": 0.0, "kd_weight": 1.0, "alignment_schedule": "stage"},
])  # fmt: skip
def test_what_makes_sense_is_taken(tmp_path, changes):
    training = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    assert all(getattr(training, name) == value for name, value in changes.items())
    assert training.projector_dropout == 0.0


def test_a_rank_from_a_command_line_is_a_number(tmp_path):
    training = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{**BRIDGE, "projector_rank": "16"})
    assert training.projector_rank == 16
