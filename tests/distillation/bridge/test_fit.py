import numpy as np
import pytest
import torch

from kava_trainer.distillation.bridge.agreement import Agreement, measure_agreement
from kava_trainer.distillation.bridge.fit import decide_rank, tell_agreement
from kava_trainer.distillation.calibration import RIDGE, Moments
from kava_trainer.distillation.projector import LowRankBridge, ProjectorConfig, normalise
from kava_trainer.utils.errors import BadRequest


def states(rank, teacher_width=24, student_width=16, count=600, rest=1.0, seed=0):
    """Student and teacher states that have `rank` directions in common, beside others of the teacher alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    common = draw(count, rank)
    axes = torch.linalg.qr(draw(teacher_width, teacher_width)).Q
    teacher = common @ axes[:rank] + rest * draw(count, teacher_width - rank) @ axes[rank:]
    return common @ draw(rank, student_width), teacher


def fit_to(student, teacher):
    both = torch.cat([normalise(teacher), normalise(student)], dim=1)
    moments = Moments(both.shape[1], 0)
    for rows in torch.arange(len(both)).tensor_split(3):
        moments.add(both[rows], both[rows, :0])
    return moments.bridge(teacher.shape[1])


def normalised(x):
    x = x.double().numpy()
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(("widths", "rank"), [((24, 16), 5), ((12, 20), 12), ((24, 16), 1)])
def test_the_maps_are_those_of_pca_and_least_squares(widths, rank):
    student, teacher = states(4, *widths, rest=0.3)
    fit, bridge = fit_to(student, teacher), LowRankBridge(ProjectorConfig(*widths, anchor="pca", rank=rank))
    fit.give_to(bridge)
    x, y = normalised(student), normalised(teacher)
    axes = np.linalg.svd(y - y.mean(0), full_matrices=False)[2][:rank]
    axes *= np.sign((axes * bridge.teacher.weight.numpy()).sum(1, keepdims=True))  # which way an axis points is free
    coordinates = (y - y.mean(0)) @ axes.T
    np.testing.assert_allclose(bridge(teacher).numpy(), coordinates, atol=2e-4)
    centred = x - x.mean(0)
    penalty = np.sqrt(RIDGE * centred.var(0).mean() * len(x)) * np.eye(x.shape[1])  # as rows of a plain least squares
    found = np.linalg.lstsq(np.vstack([centred, penalty]), np.vstack([coordinates, np.zeros((x.shape[1], rank))]))[0]
    np.testing.assert_allclose(bridge.student(student).numpy(), centred @ found, atol=2e-4)


def test_a_lower_rank_is_the_beginning_of_a_higher_one():
    student, teacher = states(4)
    fit = fit_to(student, teacher)
    low, high = (LowRankBridge(ProjectorConfig(24, 16, anchor="pca", rank=rank)) for rank in (3, 9))
    for bridge in (low, high):
        fit.give_to(bridge)
    torch.testing.assert_close(low(teacher), high(teacher)[:, :3])
    torch.testing.assert_close(low.student(student), high.student(student)[:, :3])


@pytest.mark.parametrize(("rank", "rest"), [(1, 0.7), (2, 0.75), (3, 0.85)])
def test_auto_takes_the_rank_that_both_sides_have_in_common(rank, rest):
    """Of the next axis the student knows nothing: the cosine falls to sqrt(rank / (rank + rest ** 2)) or less."""
    student, teacher = states(rank, count=4000, rest=rest)
    fit = fit_to(student[:3000], teacher[:3000])
    found = measure_agreement(*fit.coordinates(student[3000:], teacher[3000:]), lambda sums: sums)
    bridge, lines = LowRankBridge(ProjectorConfig(24, 16, anchor="pca", rank="auto")), []
    assert (bridge.rank, bridge.rank_is_open) == (16, True)
    tell_agreement(bridge, (2, 4), found, lines.append)
    decide_rank(bridge, (2, 4), found)
    fit.give_to(bridge)
    assert (bridge.rank, bridge.config.rank) == (rank, rank)
    assert [line.split()[0] for line in lines if line.endswith("<- taken")] == [str(rank)]
    assert lines[0] == "Agreement of layers (2, 4) (student, teacher) by rank of the bridge, on 1000 held-back tokens:"


def test_axes_without_variance_are_none():
    """The teacher lives in 6 dimensions of 24, all of which the student has: no rank beyond them tells anything."""
    student, teacher = states(6, rest=0.0)
    fit = fit_to(student, teacher)
    assert fit.axes == 6
    found = measure_agreement(*fit.coordinates(student, teacher), lambda sums: sums)
    assert (found.full, found.highest()) == (6, 6)


def test_where_no_rank_agrees_auto_is_refused_and_a_number_is_not():
    lines, poor = [], Agreement([0.3, 0.5, 0.4], [0.3, 0.5, 0.4], [0.0, 0.0, 0.0], 9)
    bridge = LowRankBridge(ProjectorConfig(4, 3, anchor="pca", rank="auto"))
    tell_agreement(bridge, (2, 4), poor, lines.append)
    assert (len(lines), "taken" in "".join(lines)) == (5, False)
    said = r"no rank at which layers \(2, 4\) .* centred CosSim of 0.9 or more; the highest is 0.500, at rank 2"
    with pytest.raises(BadRequest, match=said):
        decide_rank(bridge, (2, 4), poor)
    asked = LowRankBridge(ProjectorConfig(4, 3, anchor="pca", rank=2))
    decide_rank(asked, (2, 4), poor)
    assert asked.rank == 2
