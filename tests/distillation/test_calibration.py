import pytest
import torch
from helpers.models import TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.distillation.bridge.agreement import hold_back
from kava_trainer.distillation.calibration import Moments, check_enough_tokens, inputs_of_fit
from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.utils.errors import BadRequest


def tokens(count, size, seed, mix=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator)
    return x @ torch.randn(size, size, generator=generator) + 3 if mix else x


def filled(parts, x, y):
    moments = Moments(x.shape[1], y.shape[1])
    for rows in torch.arange(len(x)).tensor_split(parts):
        moments.add(x[rows], y[rows])
    return moments


@pytest.mark.parametrize("parts", [1, 7])
def test_ridge_equals_the_closed_form_on_all_tokens_at_once(parts):
    x, y = tokens(200, 6, 0), tokens(200, 4, 1)
    weight, bias = filled(parts, x, y).ridge(penalty=0.1)
    a, b = (z.double() - z.double().mean(0) for z in (x, y))
    damping = 0.1 * (a * a).mean() * len(a)
    expected = torch.linalg.solve(a.T @ a + damping * torch.eye(6, dtype=torch.float64), a.T @ b).T
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(bias, y.double().mean(0) - expected @ x.double().mean(0))


def test_a_linear_relation_is_found():
    x = tokens(500, 6, 0)
    y = x @ tokens(6, 4, 1, mix=False) + 2
    weight, bias = filled(3, x, y).ridge(penalty=1e-9)
    torch.testing.assert_close(x.double() @ weight.T + bias, y.double(), rtol=1e-4, atol=1e-4)


def projected_on_principal_axes(x, weight):
    axes = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False).Vh[: len(weight)]
    return weight[: len(axes)] @ axes.T


@pytest.mark.parametrize("size", [3, 8])
def test_the_principal_map_keeps_the_largest_axes_and_their_proportions(size):
    x, y = tokens(400, 6, 0), tokens(400, size, 1)
    weight, bias = filled(5, x, y).principal(turn=False)
    along = projected_on_principal_axes(x, weight)
    torch.testing.assert_close(along, along.diagonal().diag(), rtol=0, atol=1e-5)
    projected = x.double() @ weight.T + bias
    torch.testing.assert_close(projected.mean(0), torch.zeros(size, dtype=torch.float64), rtol=0, atol=1e-5)
    assert projected.square().sum().item() == pytest.approx(((y - y.mean(0)) ** 2).sum().item(), rel=1e-4)
    kept = min(size, 6)
    ratios = torch.linalg.svdvals(projected)[:kept] / torch.linalg.svdvals(x.double() - x.double().mean(0))[:kept]
    torch.testing.assert_close(ratios, ratios[0].expand(kept), rtol=1e-4, atol=0)


def test_the_principal_map_is_turned_towards_states_that_mean_something():
    x = tokens(400, 6, 0)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
    rotation = torch.linalg.qr(tokens(4, 4, 2, mix=False)).Q
    y = 7 * (x - x.mean(0)) @ axes.T @ rotation + 1
    weight, bias = filled(3, x, y).principal(turn=True)
    torch.testing.assert_close(x.double() @ weight.T + bias, y.double() - 1, rtol=1e-3, atol=1e-3)


def test_ranks_add_up():
    x, y = tokens(50, 3, 0), tokens(50, 2, 1)
    whole, first, second = filled(1, x, y), filled(1, x[:20], y[:20]), filled(1, x[20:], y[20:])
    parts = iter([second._inputs, second._squares])
    first.reduce(lambda sums: sums + next(parts), "cpu")
    for ours, theirs in zip(first.ridge(), whole.ridge(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_the_least_squares_start_agrees_better_and_changes_the_last_layer_alone(tmp_path, tokenizer, direction):
    changes = {"projector_direction": direction, "projector_anchor": "none", "layer_mapping": "uniform:2"}
    trainer = make_trainer(tmp_path, tokenizer, count=60, projector_init="least_squares", **changes)
    before = trainer.run_probe()
    names = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    generator = torch.get_rng_state()
    trainer.calibrate()
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainer.model.training
    after = trainer.run_probe()
    for first, second in zip(before.pairs, after.pairs, strict=True):
        assert second.cos_sim > first.cos_sim + 0.2
        assert second.margin > first.margin
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(names[name], parameter)}
    assert changed == {f"target.projectors.{i}.down.{part}" for i in range(2) for part in ("weight", "bias")}


def test_a_shared_projector_is_fitted_to_the_tokens_of_all_pairs(tmp_path, tokenizer):
    settings = {"layer_mapping": "uniform:2", "projector_sharing": "all", "projector_init": "least_squares"}
    trainer = make_trainer(tmp_path, tokenizer, projector_dropout=0.0, calibration_tokens=10**6, **settings)
    trainer.calibrate()
    (projector,), sides = trainer.target.projectors, []
    trainer.model.eval()
    with torch.no_grad():
        for example in trainer.train_dataset:
            ids = {"input_ids": torch.tensor([example["input_ids"]]), "output_hidden_states": True}
            student, teacher = (m(**ids).hidden_states for m in (trainer.student, trainer.teacher.model))
            sides += [(projector.hidden(teacher[of][0]), student[own][0]) for own, of in trainer.target.pairs]
        x, y = (torch.cat(parts) for parts in zip(*sides, strict=True))
        weight, bias = filled(1, x, y).ridge()
    torch.testing.assert_close(projector.down.weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(projector.down.bias.double(), bias, rtol=1e-3, atol=1e-4)


def test_the_pca_targets_are_the_teachers_principal_subspace_and_never_move(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, count=60, projector_anchor="pca", max_steps=3)
    trainer.calibrate()
    first = {name: buffer.clone() for name, buffer in trainer.target.named_buffers()}
    assert all(buffer.abs().sum() > 0 for buffer in first.values())
    trainer.train()
    for name, buffer in trainer.target.named_buffers():
        assert torch.equal(buffer, first[name]), name
    assert trainer.probe.last is None
    assert trainer.evaluate()["eval_target_effective_rank"] > 8


def test_a_resumed_run_is_not_calibrated_again(tmp_path, tokenizer, monkeypatch):
    changes = {"projector_anchor": "pca", "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "count": 60}
    trainer = make_trainer(tmp_path, tokenizer, **changes)
    trainer.train()
    final = trainer.target.state_dict()
    again = make_trainer(tmp_path, tokenizer, **changes)
    monkeypatch.setattr(again, "calibrate", lambda: pytest.fail("calibrated again"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in again.target.state_dict().items():
        assert torch.equal(tensor, final[name]), name


BRIDGE = {"projector_anchor": "pca", "projector_init": "least_squares", "count": 60, "layer_mapping": "uniform:2"}


def test_a_bridge_holds_both_sides_and_never_moves(tmp_path, tokenizer, capsys):
    trainer = make_trainer(tmp_path, tokenizer, projector_rank=8, max_steps=3, mse_weight=0.5, **BRIDGE)
    trainer.calibrate()
    printed = capsys.readouterr().out
    assert [printed.count(f"Agreement of layers {pair}") for pair in ((1, 1), (2, 4))] == [1, 1]
    assert printed.count("<- taken") == 2
    first = {name: buffer.clone() for name, buffer in trainer.target.named_buffers()}
    widths = {"teacher": 64, "student": 32}
    shapes = {f"projectors.{i}.{side}": {(8, width), (8,)} for i in range(2) for side, width in widths.items()}
    assert {name.rpartition(".")[0]: set() for name in first}.keys() == shapes.keys()
    assert all(tuple(buffer.shape) in shapes[name.rpartition(".")[0]] for name, buffer in first.items())
    assert all(buffer.abs().sum() > 0 for buffer in first.values())
    assert not list(trainer.target.parameters())
    start = {name: weight.clone() for name, weight in trainer.student.named_parameters()}
    trainer.train()
    for name, buffer in trainer.target.named_buffers():
        assert torch.equal(buffer, first[name]), name
    assert any(not torch.equal(weight, start[name]) for name, weight in trainer.student.named_parameters())
    assert all(weight.grad is None for weight in trainer.teacher.model.parameters())
    assert trainer.target.widths == "64 -> 8 <- 32"
    assert trainer.evaluate()["eval_target_effective_rank"] <= 8


def test_the_held_back_examples_are_not_fitted_to(tmp_path, tokenizer):
    """The first maps are those of the pass without the last examples, whatever these are."""
    trainer = make_trainer(tmp_path, tokenizer, projector_rank=4, **BRIDGE)
    trainer.calibrate()
    expected = {name: buffer.clone() for name, buffer in trainer.target.named_buffers()}
    fitted_to, held_back = hold_back(trainer.calibration_examples())
    other = [{**example, "input_ids": example["input_ids"][::-1]} for example in held_back]
    trainer.calibration_examples = lambda: [*fitted_to, *other]
    trainer.calibrate()
    for name, buffer in trainer.target.named_buffers():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("rank", [5, "auto"])
def test_a_resumed_run_has_the_bridge_of_its_checkpoint_bit_for_bit(tmp_path, tokenizer, rank):
    """The student is a copy of the teacher, so that `auto` finds a rank, which the new trainer has from the file."""
    changes = {
        **BRIDGE, "projector_rank": rank, "layer_mapping": "[[2, 2], [4, 4]]", "save_strategy": "steps",
        "save_steps": 2, "max_steps": 4, "kd_weight": 0.5, "alignment_schedule": "linear", "kd_schedule": "linear",
        "model": lambda *_, **__: tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1),
    }  # fmt: skip
    straight = make_trainer(tmp_path, tokenizer, **changes)
    straight.train()
    again = make_trainer(tmp_path, tokenizer, **changes)
    again.calibrate = lambda: pytest.fail("calibrated again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ranks = {bridge.rank for bridge in again.target.bridges}
    assert ranks == {5} if rank == 5 else min(ranks) > 16
    assert loss_lines(again) == loss_lines(straight)
    for ours, theirs in ((again.target, straight.target), (again.student, straight.student)):
        there = theirs.state_dict()
        assert all(torch.equal(tensor, there[name]) for name, tensor in ours.state_dict().items())
    saved = load_projectors(tmp_path / "checkpoint-2" / "projector.pth")
    assert [bridge.config.rank for bridge in saved] == [bridge.rank for bridge in straight.target.bridges]


def test_auto_is_refused_where_the_sides_agree_at_no_rank(tmp_path, tokenizer, capsys):
    trainer = make_trainer(tmp_path, tokenizer, projector_rank="auto", **BRIDGE)
    with pytest.raises(BadRequest, match=r"auto found no rank at which layers \(1, 1\)"):
        trainer.train()
    assert capsys.readouterr().out.count("Agreement of layers") == 2
    assert trainer.state.global_step == 0


def test_a_bridge_needs_more_tokens_than_its_wider_side_beside_those_held_back(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, projector_rank=4, **BRIDGE)
    assert inputs_of_fit(trainer.target) == TEACHER_SIZE
    check_enough_tokens(trainer.target, 75)
    with pytest.raises(BadRequest, match="would see 64 tokens, and a fit of 64 inputs needs more"):
        check_enough_tokens(trainer.target, 73)


def test_too_few_tokens_are_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, projector_anchor="pca", calibration_tokens=8)
    with pytest.raises(BadRequest, match="raise calibration_tokens"):
        trainer.train()
