import pytest
import torch
from helpers.models import tiny_llama

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.pairing import pair_up
from kava_trainer.distillation.targets import RelationsTarget, build_target
from kava_trainer.distillation.targets.relations import relation_errors
from kava_trainer.distillation.targets.rows import example_parts
from kava_trainer.evaluation.diagnostics import collapse_reason
from kava_trainer.evaluation.sample import Sample
from kava_trainer.utils.errors import WrongArguments

LENGTHS = (5, 7, 1)


def states(width, count=13, seed=0):
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def naive(student, teacher, mask, lengths):
    """The errors and correlations with plain loops over pairs of tokens, in float64."""
    errors, agreement = torch.zeros(len(student), dtype=torch.float64), torch.zeros(len(student))
    start = 0
    for length in lengths:
        places = [i for i in range(start, start + length) if mask[i]]
        for i in places:
            rest = [j for j in places if j != i]
            if not rest:
                continue
            own, due = (
                torch.stack([torch.cosine_similarity(side[i].double(), side[j].double(), dim=0) for j in rest])
                for side in (student, teacher)
            )
            errors[i] = ((own - due) ** 2).mean()
            if len(rest) > 1:
                agreement[i] = torch.corrcoef(torch.stack([own.detach(), due.detach()]))[0, 1]
        start += length
    return errors, agreement


def compare(student, teacher, mask, lengths=LENGTHS):
    target = RelationsTarget([(1, 2)])
    (pair,) = target({1: student}, {2: teacher})
    (found,) = target.align([pair], mask, {"relations"}, lengths)
    return found


def test_value_and_gradient_are_those_of_plain_loops():
    student, teacher = states(6), states(9, seed=1).detach()
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.bool)
    mask[0, 3] = False
    found = compare(student, teacher, mask)
    errors, agreement = naive(student[0], teacher[0], mask[0], LENGTHS)
    torch.testing.assert_close(found.terms["relations"][0].double(), errors)
    torch.testing.assert_close(found.cosine[0], agreement.float())
    (own,) = torch.autograd.grad(found.terms["relations"].sum(), student)
    (expected,) = torch.autograd.grad(errors.sum(), student)
    torch.testing.assert_close(own, expected)
    assert not own[0, 3].any()
    assert not own[0, -1].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_change_nothing(rows):
    student, teacher = states(6)[0], states(9, seed=1)[0].detach()
    mask = torch.arange(len(student)) % 4 > 0
    whole, parts = (relation_errors(student, teacher, mask, size) for size in (2**20, 4 * len(mask) * rows))
    torch.testing.assert_close(parts, whole)
    gradients = [torch.autograd.grad(errors.sum(), student)[0] for errors, _ in (whole, parts)]
    torch.testing.assert_close(*gradients)


def test_a_packed_row_is_its_examples_padded():
    student, teacher = states(6), states(9, seed=1).detach()
    packed = compare(student, teacher, torch.ones(1, sum(LENGTHS), dtype=torch.bool))
    padded, mask = [torch.full((3, 7, side.shape[-1]), torch.nan) for side in (student, teacher)], torch.zeros(3, 7)
    for row, at in enumerate(example_parts(mask, LENGTHS)):
        own = at[1]
        for into, side in zip(padded, (student, teacher), strict=True):
            into[row, : own.stop - own.start] = side[0, own].detach()
        mask[row, : own.stop - own.start] = 1
    padded[0].requires_grad_()
    found = compare(*padded, mask.bool(), None)
    torch.testing.assert_close(found.terms["relations"][mask.bool()], packed.terms["relations"][0])
    torch.testing.assert_close(found.cosine[mask.bool()], packed.cosine[0])
    found.terms["relations"].sum().backward()
    assert padded[0].grad.isfinite().all()  # what stands in the padding has no part in it


def test_rotations_and_scale_of_the_states_are_the_same_relations():
    teacher = states(6, seed=1).detach()
    turn, _ = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(3)))
    found = compare(3 * teacher @ turn.T, teacher, torch.ones(1, sum(LENGTHS), dtype=torch.bool))
    assert found.terms["relations"].max() < 1e-10
    assert found.cosine[0, :-1].min() > 0.999


def test_autocast_changes_no_similarity():
    student, teacher = states(6), states(9, seed=1)
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.bool)
    plain = compare(student, teacher, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compare(student, teacher, mask).terms["relations"], plain.terms["relations"])


def diagnose(student, teacher, lengths=(40, 60)):
    """The diagnostics of a pair in a padded batch of two examples, measured as two batches of one are."""
    target, sample = RelationsTarget([(1, 2)]), Sample(within_examples=True)
    for row, length in enumerate(lengths):
        own, due = student[row : row + 1], teacher[row : row + 1]
        mask = torch.arange(60).unsqueeze(0) < length
        (pair,) = target({1: own}, {2: due})
        sample.add(target.sides(0, pair, {1: own}, {2: due}, mask))
    return sample.diagnose()


def batch(width, seed, common=0.0):
    return torch.randn(2, 60, width, generator=torch.Generator().manual_seed(seed)) + common


@pytest.mark.parametrize("common", [0.0, 3.0])
def test_a_collapse_is_called_and_agreement_is_not(common):
    teacher = batch(32, 0, common)
    healthy = diagnose(teacher @ torch.linalg.qr(batch(32, 1)[0, :32])[0], teacher)
    assert healthy.margin > 0.5
    assert healthy.cka > 0.99
    assert collapse_reason(healthy, 1) is None
    for collapsed in (torch.ones(2, 60, 16), torch.ones(2, 60, 16) + 1e-6 * batch(16, 2), 5 * torch.ones(2, 60, 1)):
        figures = diagnose(collapsed, teacher)
        assert abs(figures.cos_sim) < 0.05
        assert "another token" in collapse_reason(figures, 1)


def test_there_is_nothing_to_train_and_widths_need_not_agree(tmp_path):
    args = KavaTrainingArguments(str(tmp_path), alignment_target="relations", use_cpu=True, layer_weights=[1.0, 3.0],
                                 layer_mapping="uniform:2")  # fmt: skip
    target = build_target(args, tiny_llama(32, 2), tiny_llama(64, 4))
    assert isinstance(target, RelationsTarget)
    assert not list(target.parameters())
    assert target.shares == [0.25, 0.75]
    assert args.aligns
    assert not args.calibrates
    assert not args.projects


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mse_weight": 0.2}, "mse_weight"),
        ({"relative_mse_weight": 1.0}, "relative_mse_weight"),
        ({"projector_anchor": "pca", "projector_direction": "teacher_to_student"}, "projector_anchor"),
        ({"relations_weight": -1.0}, "relations_weight"),
    ],
)
def test_what_relations_do_not_have_is_refused(tmp_path, changes, name):
    with pytest.raises(WrongArguments) as caught:
        KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target="relations", **changes)
    assert [problem.argument for problem in caught.value.problems] == [name]


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(WrongArguments, match="alignment_target"):
        KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target="logits")


def test_without_its_weight_nothing_is_aligned_whatever_the_weights_of_other_targets_are(tmp_path):
    args = KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target="relations", relations_weight=0.0)
    assert not args.aligns
    assert args.mercator_weight > 0
    assert not KavaTrainingArguments(str(tmp_path), use_cpu=True, mercator_weight=0.0).aligns


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("relations", {"mercator_weight": 0.0}),
        ("hidden", {"alignment_target": "relations", "relations_weight": 0.0}),
    ],
)
def test_a_target_of_another_kind_is_refused_where_its_own_weight_is_above_0(tmp_path, kind, changes):
    student, teacher = tiny_llama(32, 2), tiny_llama(32, 2, seed=1)
    own = KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target=kind)
    args = KavaTrainingArguments(str(tmp_path), use_cpu=True, kd_weight=1.0, **changes)
    target = build_target(own, student, teacher)
    with pytest.raises(ValueError, match=f"write alignment_target='{kind}'"):
        pair_up(args, student, teacher, target)
