"""What is aligned with several teachers."""

import copy

import pytest
import torch
from helpers.library import arguments, new_student
from helpers.models import tiny_llama

from kava_trainer.distillation.targets import SeveralTargets, build_target, build_targets
from kava_trainer.models.attention.capture import OfTeacher, of_teacher, states_of_teacher

KINDS = {
    "hidden": {"projector_direction": "teacher_to_student"},
    "none": {"projector_direction": "student_to_teacher", "layer_mapping": "uniform:2"},
    "anchored": {"projector_direction": "teacher_to_student", "projector_anchor": "reconstruction"},
    "relations": {"alignment_target": "relations", "layer_mapping": "uniform:2"},
}
WEIGHTS = '[{"weight": 1}, {"weight": 3}]'


def both(tmp_path, **changes):
    args = arguments(tmp_path, teachers=WEIGHTS, **changes)
    teachers = [tiny_llama(64, 4, seed=1), tiny_llama(48, 3, seed=5)]
    torch.manual_seed(0)
    target = build_targets(args, new_student(), teachers)
    student = {layer: torch.randn(2, 6, 32, requires_grad=True) for layer in (1, 2)}
    states = {layer: torch.randn(2, 6, 64) for layer in range(1, 5)}
    states |= {of_teacher(1, layer): torch.randn(2, 6, 48) for layer in range(1, 4)}
    return args, target, student, states


def terms_of(target, args):
    named = [*target.terms, *(["anchor"] if target.decoders else [])]
    return [name for name in named if getattr(args, f"{name}_weight") > 0]


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_several_targets_are_the_weighted_mean_of_their_parts(tmp_path, changes):
    args, target, student, states = both(tmp_path, **changes)
    mask, names = torch.ones(2, 6, dtype=torch.bool), terms_of(target, args)
    mask[1, 4:] = False
    found = target.align(target(student, states), mask, names)
    alone = [
        part.align(part(student, states_of_teacher(states, number)), mask, names)
        for number, part in enumerate(target.parts)
    ]
    for name in names:
        expected = sum(
            share * part.mean([own.terms[name] for own in kept])
            for share, part, kept in zip((0.25, 0.75), target.parts, alone, strict=True)
        )
        value = target.mean([own.terms[name] for own in found], target.token_shares(found, mask))
        torch.testing.assert_close(value, expected)
        if name == "anchor":  # which pulls on the projectors alone
            continue
        wanted = torch.autograd.grad(expected.sum(), student[2], retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(value.sum(), student[2], retain_graph=True)[0], wanted)
    assert sum(target.shares) == pytest.approx(1.0)
    assert len(target.comparisons) == len(set(target.comparisons)) == len(target.shares) == len(found)


def test_where_a_teacher_leaves_a_token_out_the_other_takes_its_share(tmp_path):
    _, target, student, states = both(tmp_path)
    masks = torch.ones(2, 2, 6, dtype=torch.bool)
    masks[1, :, 3:] = False
    states[of_teacher(1, 3)][:, 3:] = 0.0
    found = target.align(target(student, states), masks, ["mercator"])
    value = target.mean([own.terms["mercator"] for own in found], target.token_shares(found, masks))
    first, second = (own.terms["mercator"] for own in found)
    torch.testing.assert_close(value[:, :3], 0.25 * first[:, :3] + 0.75 * second[:, :3])
    torch.testing.assert_close(value[:, 3:], first[:, 3:])
    (gradient,) = torch.autograd.grad(value.sum(), student[2])
    assert gradient.isfinite().all()


def test_a_router_gives_a_token_to_the_closer_teacher_and_leaves_cos_sim_alone(tmp_path):
    _, target, student, states = both(tmp_path, teacher_routing="agreement", teacher_routing_temperature=0.01)
    mask = torch.ones(2, 6, dtype=torch.bool)
    found = target.align(target(student, states), mask, ["mercator"])
    shares = target.token_shares(found, mask)
    cosines = torch.stack([own.cosine.detach() for own in found])
    expected = (torch.tensor([0.25, 0.75]).log().view(2, 1, 1) + cosines / 0.01).softmax(dim=0)
    torch.testing.assert_close(torch.stack(list(shares)), expected)
    assert target.token_shares(found, mask, routed=False) == target.shares
    figures = target.figures(found, mask)
    total, count = figures["teacher_routing_entropy"]
    torch.testing.assert_close(total, torch.special.entr(expected).sum())
    assert count == 12
    assert {"teacher1_cos_sim", "teacher2_cos_sim"} <= figures.keys()


def test_projectors_are_saved_once_and_copied_with_their_parts(tmp_path):
    _, target, _, _ = both(tmp_path, layer_mapping="uniform:2")
    assert len(target.projectors) == 4
    assert target.owners == [0, 1, 2, 3]
    names = [name for name, _ in target.named_parameters()]
    assert len(names) == len(target.state_dict()) == 4 * len({name.split(".", 2)[2] for name in names})
    twin = copy.deepcopy(target)
    assert twin.parts[1].projectors[0] is twin.projectors[2]
    assert twin.parts[1].projectors[0] is not target.projectors[2]
    assert twin.use == {"teachers": [part.use for part in target.parts]}


def test_each_teacher_may_have_layers_of_its_own(tmp_path):
    args = arguments(tmp_path, teachers=[{"layers": "all"}, {"layers": [[1, 3]]}], layer_mapping="last")
    target = build_targets(args, new_student(), [tiny_llama(64, 4), tiny_llama(48, 3)])
    assert [part.pairs for part in target.parts] == [[(1, 2), (2, 4)], [(1, 3)]]
    assert target.told_layers == "teacher 1: (1, 2), (2, 4); teacher 2: (1, 3)"
    assert target.comparisons[-1] == (1, 3, "teacher 2")


def test_what_makes_no_targets_of_several_is_refused(tmp_path):
    args = arguments(tmp_path)
    part = build_target(args, new_student(), tiny_llama(64, 4))
    with pytest.raises(ValueError, match="one target for each"):
        SeveralTargets([part])
    other = build_target(arguments(tmp_path, alignment_target="relations"), new_student(), tiny_llama(64, 4))
    with pytest.raises(ValueError, match="one kind"):
        SeveralTargets([part, other])
    with pytest.raises(ValueError, match="weight above 0"):
        SeveralTargets([part, copy.deepcopy(part)], [1.0, 0.0])
    with pytest.raises(ValueError, match="3 teachers, but teachers has 2"):
        build_targets(arguments(tmp_path, teachers=WEIGHTS), new_student(), [tiny_llama(64, 4)] * 3)


def test_features_of_another_teacher_are_told_apart():
    states = {2: torch.zeros(1), of_teacher(1, 2): torch.ones(1)}
    assert of_teacher(0, 2) == 2
    assert of_teacher(1, 2) == OfTeacher(1, 2)
    assert states_of_teacher(states, 0)[2] == 0
    assert states_of_teacher(states, 1)[2] == 1
