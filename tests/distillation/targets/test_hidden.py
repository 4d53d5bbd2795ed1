import pytest
import torch
from helpers.models import tiny_llama

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.projector import PrincipalProjection, ProjectorConfig, build_projector, normalise
from kava_trainer.distillation.targets import HiddenStateTarget, build_target
from kava_trainer.utils.errors import BadRequest, WrongArguments

MASK = torch.tensor([[True, True, False]])


def inputs():
    generator = torch.Generator().manual_seed(0)
    student = {layer: torch.randn(1, 3, 6, generator=generator, requires_grad=True) for layer in (1, 2)}
    teacher = {layer: torch.randn(1, 3, 8, generator=generator) for layer in (1, 4)}
    return student, teacher


def make(direction, weights=None, anchor="none"):
    sizes = (8, 6) if direction == "teacher_to_student" else (6, 8)
    config = ProjectorConfig(*sizes, dropout=0.0, anchor=anchor)
    return HiddenStateTarget([(1, 1), (2, 4)], config, direction=direction, weights=weights)


def test_teacher_to_student_moves_the_target_and_leaves_the_student_as_it_is():
    student, teacher = inputs()
    target = make("teacher_to_student")
    pair = target(student, teacher)[1]
    assert pair.student is student[2]
    assert torch.equal(pair.target, target.projectors[1](teacher[4]))


def test_student_to_teacher_leaves_the_target_as_it_is():
    student, teacher = inputs()
    target = make("student_to_teacher")
    pair = target(student, teacher)[1]
    assert pair.target is teacher[4]
    assert torch.equal(pair.student, target.projectors[1](student[2]))
    assert target.student_size == 6
    target.align([pair], MASK, {"mercator"})[0].terms["mercator"].sum().backward()
    assert student[2].grad[MASK].abs().min() > 0


def test_pairs_are_weighted_by_proportion():
    target = make("teacher_to_student", weights=[1, 3])
    assert target.mean([torch.tensor(1.0), torch.tensor(5.0)]).item() == pytest.approx(4.0)
    assert make("teacher_to_student").mean([torch.tensor(1.0), torch.tensor(5.0)]).item() == pytest.approx(3.0)


def test_the_reconstruction_anchor_is_the_share_of_variance_that_is_lost():
    student, teacher = inputs()
    target = make("teacher_to_student", anchor="reconstruction")
    alignment = target.align(target(student, teacher), MASK, {"anchor"})[1]
    assert set(alignment.terms) == {"anchor"}
    rebuilt = target.decoders[1](target.projectors[1](teacher[4]))
    expected = ((rebuilt - normalise(teacher[4])) ** 2).mean(-1)
    torch.testing.assert_close(alignment.terms["anchor"][MASK], expected[MASK])
    with torch.no_grad():
        target.decoders[1].weight.zero_()
        target.decoders[1].bias.zero_()
    blind = target.align(target(student, teacher), MASK, {"anchor"})[1].terms["anchor"][MASK]
    torch.testing.assert_close(blind, torch.ones(2), rtol=1e-3, atol=0)
    gradients = torch.autograd.grad(alignment.terms["anchor"].sum(), list(student.values()), allow_unused=True)
    assert gradients == (None, None)


def test_the_pca_anchor_has_nothing_to_train():
    projector = build_projector(ProjectorConfig(8, 6, anchor="pca"))
    assert isinstance(projector, PrincipalProjection)
    assert not list(projector.parameters())
    assert set(projector.state_dict()) == {"weight", "bias"}


def test_a_bridge_brings_both_sides_together_and_the_student_alone_learns():
    config = ProjectorConfig(8, 6, anchor="pca", rank=3)
    target = HiddenStateTarget([(1, 2)], config, 1.0, 0.01)
    (bridge,) = target.bridges
    generator = torch.Generator().manual_seed(0)
    for buffer in target.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    student = torch.randn(1, 3, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(1, 3, 8, generator=generator)
    (pair,) = target({1: student}, {2: teacher})
    naive = []
    for states, side in ((student, bridge.student), (teacher, bridge.teacher)):
        rows = (states - states.mean(-1, keepdim=True)) / (states.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        naive.append(rows @ side.weight.T + side.bias)
    torch.testing.assert_close(pair.student, naive[0])
    torch.testing.assert_close(pair.target, naive[1])
    (found,) = target.align([pair], MASK, {"mercator", "mse"})
    cosine = torch.cosine_similarity(*naive, dim=-1)
    lengths = (naive[0].norm(dim=-1).log() - naive[1].norm(dim=-1).log()).square()
    expected = (1 - cosine + 0.01 * lengths + (naive[0] - naive[1]).square().mean(-1))[MASK].sum()
    total = (found.terms["mercator"] + found.terms["mse"])[MASK].sum()
    torch.testing.assert_close(total, expected)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs)
    assert not any(tensor.requires_grad for tensor in (pair.target, *target.buffers()))
    assert not list(target.parameters())
    assert (target.widths, target.most_dimensions(0)) == ("8 -> 3 <- 6", 3)


@pytest.mark.parametrize("direction", ["student_to_teacher", "none"])
def test_a_bridge_in_another_direction_is_refused(direction):
    with pytest.raises(ValueError, match="A bridge is given the sizes of direction='teacher_to_student'"):
        HiddenStateTarget([(1, 2)], ProjectorConfig(8, 6, anchor="pca", rank=3), direction=direction)


@pytest.mark.parametrize("rank", [17, 32])
def test_a_bridge_wider_than_either_side_is_refused(rank):
    asked = arguments(projector_anchor="pca", projector_init="least_squares", projector_rank=rank)
    said = rf"projector_rank is {rank}, but the teacher's states are 32 wide and the student's 16; write 16 at most"
    with pytest.raises(BadRequest, match=said):
        build_target(asked, tiny_llama(16, 2), tiny_llama(32, 4))


def test_a_bridge_is_made_as_the_arguments_ask():
    for rank, widths in ((16, "32 -> 16 <- 16"), ("auto", "32 -> auto <- 16")):
        asked = arguments(projector_anchor="pca", projector_init="least_squares", projector_rank=rank)
        target = build_target(asked, tiny_llama(16, 2), tiny_llama(32, 4))
        assert (target.widths, target.most_dimensions(0)) == (widths, 16)


def arguments(**changes):
    defaults = {"projector_direction": "teacher_to_student", "projector_init": "random"}
    return KavaTrainingArguments(output_dir="unused", use_cpu=True, **{**defaults, **changes})


def test_the_arguments_decide_the_target():
    models = (tiny_llama(16, 2), tiny_llama(32, 4))
    target = build_target(arguments(layer_mapping="uniform:2", layer_weights=[1, 4]), *models)
    assert target.pairs == [(1, 1), (2, 4)]
    assert target.shares == [0.2, 0.8]
    config = (
        build_target(
            arguments(projector_direction="student_to_teacher", projector_anchor="none", projector_mlp_ratio=2.0),
            *models,
        )
        .projectors[0]
        .config
    )
    assert (config.input_size, config.output_size, config.mlp_ratio) == (16, 32, 2.0)


def test_as_many_weights_as_pairs_are_asked_for():
    with pytest.raises(BadRequest, match=r"layer_weights has 3 numbers, but layer_mapping uniform:2 gives 2 pairs"):
        build_target(
            arguments(layer_mapping="uniform:2", layer_weights=[1, 1, 1]), tiny_llama(16, 2), tiny_llama(32, 4)
        )


@pytest.mark.parametrize(
    ("mapping", "pairs"),
    [
        ("inherited", [(1, 2), (2, 2), (3, 6)]),
        ("last", [(3, 6)]),
        ("all", [(1, 2), (2, 4), (3, 6)]),
        ("[[1, 5], [3, 5]]", [(1, 5), (3, 5)]),
    ],
)
def test_without_a_projector_the_states_themselves_are_compared(mapping, pairs):
    student, teacher = tiny_llama(16, 3), tiny_llama(16, 6, seed=1)
    asked = arguments(projector_direction="none", layer_mapping=mapping, projector_anchor="none")
    target = build_target(asked, student, teacher, [2, 2, 4])
    assert target.pairs == pairs
    assert (list(target.state_dict()), list(target.parameters()), target.student_size) == ([], [], 16)
    assert target.widths == "16 wide"
    generator = torch.Generator().manual_seed(0)
    own = {layer: torch.randn(1, 3, 16, generator=generator, requires_grad=True) for layer in (1, 2, 3)}
    theirs = {layer: torch.randn(1, 3, 16, generator=generator) for layer in range(1, 7)}
    brought = target(own, theirs)
    for (left, right), pair in zip(pairs, brought, strict=True):
        assert (pair.student is own[left], pair.target is theirs[right]) == (True, True)
    found = target.align(brought, MASK, {"relative_mse", "mse"})
    left, right = own[pairs[0][0]], theirs[pairs[0][1]]
    expected = (left - right).square().sum(-1) / right.square().sum(-1)
    torch.testing.assert_close(found[0].terms["relative_mse"][MASK], expected[MASK])
    assert set(found[0].terms) == {"relative_mse", "mse"}


@pytest.mark.parametrize("mapping", ["last", "inherited"])
def test_states_of_two_widths_need_a_projector(mapping):
    asked = arguments(projector_direction="none", layer_mapping=mapping)
    with pytest.raises(BadRequest, match=r"the teacher's are 32 wide and the student's 16; write projector_direction"):
        build_target(asked, tiny_llama(16, 2), tiny_llama(32, 4), [1, 4])


@pytest.mark.parametrize(
    ("inherited", "told"),
    [(None, "not cut out of the teacher; write student_init"), ([1], "2 layers"), ([0, 4], "1 to 4"), ([1, 5], "5")],
)
def test_inherited_layers_are_one_for_each_layer_of_the_student(inherited, told):
    with pytest.raises(BadRequest, match=told):
        build_target(arguments(layer_mapping="inherited"), tiny_llama(16, 2), tiny_llama(16, 4), inherited)


@pytest.mark.parametrize("anchor", ["none", "reconstruction"])
def test_pairs_share_one_projector(anchor):
    student, teacher = inputs()
    config = ProjectorConfig(8, 6, dropout=0.0, anchor=anchor)
    target = HiddenStateTarget([(1, 1), (2, 4)], config, sharing="all")
    assert len(target.projectors) == 1
    assert len(target.decoders) == (1 if anchor == "reconstruction" else 0)
    for pair, layer in zip(target(student, teacher), (1, 4), strict=True):
        assert torch.equal(pair.target, target.projectors[0](teacher[layer]))
    assert target.use == {"direction": "teacher_to_student", "pairs": [[1, 1], [2, 4]], "sharing": "all"}
    own = HiddenStateTarget([(1, 1)], config)
    assert own.use == {"direction": "teacher_to_student", "pairs": [[1, 1]]}


def test_a_bridge_is_not_shared():
    config = ProjectorConfig(8, 6, anchor="pca", rank=3)
    with pytest.raises(ValueError, match="cannot be shared"):
        HiddenStateTarget([(1, 1), (2, 4)], config, sharing="all")


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment_target": "relations"},
        {"projector_direction": "none"},
        {"projector_rank": 4, "projector_anchor": "pca", "projector_direction": "teacher_to_student"},
        {"alignment_target": "kv"},
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, changes):
    with pytest.raises(WrongArguments) as caught:
        KavaTrainingArguments(str(tmp_path), use_cpu=True, projector_sharing="all", **changes)
    assert [problem.argument for problem in caught.value.problems] == ["projector_sharing"]
