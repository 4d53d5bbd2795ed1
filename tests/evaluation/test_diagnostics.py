import math
from dataclasses import replace

import pytest
import torch

from kava_trainer.evaluation.diagnostics import (
    Circumstances,
    alignment_status,
    centred_cosine,
    collapse_reason,
    collapse_remedy,
    diagnose,
    effective_rank,
    linear_cka,
    mean_cosine,
    shuffled_cosine,
)


def states(count=40, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("cos_sim", "status"),
    [
        (-1.0, "Adapting"),
        (0.4999, "Adapting"),
        (0.5, "Learning"),
        (0.6999, "Learning"),
        (0.7, "Good"),
        (0.9, "Great"),
        (0.9499, "Great"),
        (0.95, "Excellent"),
        (1.0, "Excellent"),
    ],
)
def test_statuses_have_inclusive_lower_edges(cos_sim, status):
    assert alignment_status(cos_sim) == status
    assert alignment_status(cos_sim, collapsed=True) == "Collapsed"


def naive_cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_cosines_equal_the_naive_reference():
    s, t = states() + 3, states(seed=1) - 1
    pairs = range(len(s))
    assert mean_cosine(s, t) == pytest.approx(sum(naive_cosine(s[i], t[i]) for i in pairs) / len(s), abs=1e-5)
    centred = [naive_cosine(s[i] - s.mean(0), t[i] - t.mean(0)) for i in pairs]
    assert centred_cosine(s, t) == pytest.approx(sum(centred) / len(s), abs=1e-5)
    others = [naive_cosine(s[i], t[j]) for i in pairs for j in pairs if i != j]
    assert shuffled_cosine(s, t) == pytest.approx(sum(others) / len(others), abs=1e-5)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(8, rel=1e-5)
    direction = states(1, 6)
    assert effective_rank(states(40, 1) @ direction) == pytest.approx(1, abs=1e-2)
    assert effective_rank(direction.expand(40, 6)) == 0
    assert math.isnan(effective_rank(torch.full((4, 3), float("nan"))))
    values = torch.linalg.svdvals(states() - states().mean(0))
    shares = values / values.sum()
    assert effective_rank(states()) == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-5)


def test_cka_is_one_under_rotation_and_scale_and_small_for_unrelated_states():
    x = states(500)
    rotation = torch.linalg.qr(states(6, 6, seed=2)).Q
    assert linear_cka(x, 7 * x @ rotation + 3) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, states(500, 9, seed=3)) < 0.1
    assert linear_cka(x, torch.ones(500, 4)) == 0


def test_cka_equals_the_kernel_form():
    x, y = states(), states(40, 9, seed=1)
    centring = torch.eye(40) - 1 / 40
    k, m = (centring @ z @ z.T @ centring for z in (x, y))
    assert linear_cka(x, y) == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item(), rel=1e-4)


TEACHER = states(300, 32, seed=5)
HEALTHY = TEACHER[:, :16] + 0.1 * states(300, 16, seed=6)
NOISE = 1e-3 * states(300, 16, seed=7)
CONSTANT = torch.ones(300, 16)
RANK_ONE = states(300, 1, seed=8) @ states(1, 16, seed=9)


@pytest.mark.parametrize(
    ("student", "target", "part"),
    [
        (CONSTANT, CONSTANT, "another token"),
        (CONSTANT + NOISE, CONSTANT + NOISE, "another token"),
        (CONSTANT, HEALTHY, "another token"),
        (HEALTHY, CONSTANT, "another token"),
        (RANK_ONE + NOISE, RANK_ONE, "possible dimensions"),
    ],
)
def test_a_planted_collapse_is_called(student, target, part):
    assert part in collapse_reason(diagnose(student, target, student, TEACHER), 16)


def test_a_healthy_alignment_is_not_called():
    figures = diagnose(HEALTHY, TEACHER[:, :16], HEALTHY, TEACHER)
    assert collapse_reason(figures, 16) is None
    assert figures.margin == pytest.approx(figures.cos_sim - figures.shuffled_cos_sim)
    assert figures.cka > 0.4
    assert set(figures.to_dict()) >= {"centred_cos_sim", "cka", "teacher_effective_rank"}


LOOSE = Circumstances(direction="teacher_to_student", anchor="none", supervised=True, step=500)
FIXED = replace(LOOSE, direction="student_to_teacher", cos_sim=0.607)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (replace(LOOSE, supervised=False, step=3), "Set lm_weight above 0"),
        (LOOSE, "Write projector_anchor pca or reconstruction"),
        (replace(LOOSE, anchor="reconstruction"), "Raise anchor_weight"),
        (replace(LOOSE, anchor="pca"), "Lower mercator_weight, or align another layer"),
        (FIXED, "Lower mercator_weight, or align another layer"),
        (replace(FIXED, weight="relative_mse_weight"), "Lower relative_mse_weight, or align another layer"),
        (replace(FIXED, cos_sim=0.04), "The student has not learned its targets: train longer"),
        (replace(FIXED, cos_sim=math.nan), "Lower learning_rate"),
        (replace(FIXED, step=10), "After 10 steps it is too early to tell"),
        (replace(LOOSE, step=1), "After 1 step it is too early to tell"),
        (replace(FIXED, step=10, whole_before=True), "It was whole before the first step, and the training undid it"),
        (replace(LOOSE, step=10, whole_before=True), "Write projector_anchor pca or reconstruction"),
    ],
)
def test_a_remedy_fits_the_case(case, said):
    assert collapse_remedy(case).startswith(said)


def test_where_nothing_projects_no_projector_is_advised():
    for case in (replace(FIXED, direction="none", whole_before=whole, cos_sim=own) for whole in (True, False)
                 for own in (0.02, 0.6)):  # fmt: skip
        assert "projector" not in collapse_remedy(case)
