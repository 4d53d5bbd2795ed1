"""Timing the passes of a run leaves it what it was."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.runs.timing import passes
from kava_trainer.runs.timing.passes import Stopwatch


@pytest.fixture
def make(tmp_path, tokenizer):
    """A run, as far as its passes are timed."""

    def run(**changes):
        trainer = make_trainer(tmp_path, tokenizer, **{"projector_dropout": 0.3, **changes})
        train, held_out = trainer.train_dataset, trainer.eval_dataset
        rows = [{"prompt_length": 2, **row} for row in held_out]
        evaluation = type(held_out).from_list(rows)
        data = SimpleNamespace(train=train, evaluation=evaluation, collator=trainer.data_collator)
        models = SimpleNamespace(teacher=trainer.teacher.model, student=trainer.student)
        return SimpleNamespace(training=trainer.args, data=data, trainer=trainer, models=models, tokenizer=tokenizer)

    return run


@pytest.mark.parametrize("changes", [
    {},
    {"max_tokens_per_batch": 0},
    {"kd_weight": 0.5},
    {"run_control": True},
    {"projector_direction": "student_to_teacher"},
    {"kd_weight": 0.5, "kd_schedule": "linear", "alignment_schedule": "linear"},
])  # fmt: skip
def test_every_pass_takes_time(make, changes):
    run = make(**changes)
    rates = Stopwatch(run).rates()
    taken = asdict(rates)
    asked = {"plain_step"} if changes.get("run_control") else set()
    nothing = {"plain_step", "divergence", "teacher_token", "student_token"} - asked
    assert all((taken[name] == 0) == (name in nothing) for name in taken)
    assert rates.step < 1  # of one token


@pytest.mark.parametrize("aligned", [1.0, 0.0])
def test_what_a_stage_saves_is_the_step_without_the_divergence(make, monkeypatch, aligned):
    """Each term of a pass takes a second, and so does the teacher; a stage without alignment needs it only for that."""
    run = make(mercator_weight=aligned, kd_weight=0.5, kd_schedule="stage")
    watch = Stopwatch(run)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(passes, "time", clock)

    def forward(row, weights):
        clock.now += len(weights) + (len(weights.keys() - {"lm"}) > 0)
        return next(run.trainer.model.parameters()).sum()

    def states(row):
        clock.now += 1.0

    monkeypatch.setattr(watch, "_forward", forward)
    monkeypatch.setattr(run.trainer.terms, "teacher_states", states)
    rates = watch.rates()
    assert rates.divergence == pytest.approx(rates.teacher)  # one second a pass, whichever else is saved


def test_answers_are_timed_where_some_are_written(make):
    rates = Stopwatch(make(evaluate_generation=True)).rates()
    assert rates.teacher_token >= 0
    assert rates.student_token >= 0
    assert rates.teacher_token + rates.student_token > 0


KV = {"alignment_target": "kv", "projector_direction": "teacher_to_student"}


@pytest.mark.parametrize(("changes", "widths"), [
    ({}, [32, 32, 64]),
    ({"projector_direction": "student_to_teacher", "layer_mapping": "uniform:2"}, [32, 64, 64] * 2),
    ({**KV, "layer_mapping": "all"}, [2 * 16, 2 * 16, 4 * 32] * 2),
    ({**KV, "layer_mapping": "uniform:2", "kv_shape": "headwise"}, [16, 16, 32] * 4),
    ({"alignment_target": "attention"}, [2 * 16, 2 * 32, 2 * 32]),
    ({"alignment_target": "relations"}, [32, 64, 64]),
])  # fmt: skip
def test_ranks_are_timed_of_what_a_probe_measures(make, monkeypatch, changes, widths):
    timed = []
    monkeypatch.setattr(passes, "effective_rank", lambda wave: timed.append(wave.shape))
    monkeypatch.setattr(passes, "_seconds", lambda device, work, agree: (work(), 1.0)[1])
    watch = Stopwatch(make(**changes))
    assert watch._probed_widths() == widths
    assert watch._ranks() == len(widths)
    assert sorted(timed) == [(passes.PROBE_TOKENS, width) for width in sorted(set(widths))]


def test_a_rank_takes_longer_the_wider_the_states_and_is_timed_once(make, monkeypatch):
    watch, tokens, timed = Stopwatch(make()), passes.PROBE_TOKENS, []
    monkeypatch.setattr(watch, "_rank", lambda width: (timed.append(width), 2.0)[1])
    monkeypatch.setattr(watch, "_probed_widths", lambda: [tokens, 2 * tokens, 3 * tokens])
    assert watch._ranks() == 12.0
    assert timed == [tokens]


def test_no_ranks_are_timed_where_nothing_is_aligned(make):
    assert Stopwatch(make(mercator_weight=0.0, kd_weight=0.5))._ranks() == 0.0


def test_a_training_is_the_same_with_and_without_them(make):
    plain, timed = make(), make()
    frozen = [parameter.clone() for parameter in timed.models.teacher.parameters()]
    before = torch.get_rng_state()
    Stopwatch(timed).rates()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in timed.trainer.model.parameters())
    for run in (plain, timed):
        torch.manual_seed(5)
        run.trainer.train()
    assert loss_lines(plain.trainer) == loss_lines(timed.trainer)
    states = (run.trainer.model.state_dict() for run in (plain, timed))
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))
    assert all(torch.equal(*pair) for pair in zip(frozen, timed.models.teacher.parameters(), strict=True))


def test_gradients_and_modes_stay(make):
    run = make()
    model = run.trainer.model.eval()
    first = next(model.student.parameters())
    first.grad = torch.full_like(first, 2.0)
    Stopwatch(run).rates()
    assert not any(module.training for module in model.modules())
    assert torch.equal(first.grad, torch.full_like(first, 2.0))


@pytest.mark.parametrize(("seconds", "count"), [(0.01, 3), (0.5, 1)])
def test_quick_work_is_timed_more_often_and_its_shortest_time_counts(monkeypatch, seconds, count):
    now, done = [0.0], []

    def work():
        done.append(None)
        now[0] += seconds * (1 + (len(done) == 1) * 0.1)

    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    assert passes._seconds(torch.device("cpu"), work) == pytest.approx(seconds if count > 1 else 1.1 * seconds)
    assert len(done) == count
