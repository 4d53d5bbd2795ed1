"""How long a run will take, by what its passes take."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.programs import SHORT
from helpers.trainers import make_trainer

import run_kava
from kava_trainer.runs import time_estimate
from kava_trainer.runs.time_estimate import Plan, about, clock, describe, estimate, plan_of
from kava_trainer.runs.timing.passes import Rates
from kava_trainer.utils.console import Console

RATES = Rates(
    step=1e-3, teacher=2e-4, terms=4e-4, teacher_read=3e-4, student_read=1e-4, plain_step=5e-4, optimizer=0.1, ranks=2.0
)
PLAN = Plan(steps=100, step_tokens=1000)


def test_the_steps_are_their_tokens_and_their_optimizer():
    assert estimate(PLAN, RATES) == pytest.approx({"steps": 100 * (1000 * 1e-3 + 0.1)})


@pytest.mark.parametrize(("changes", "part", "seconds"), [
    ({"held_out": 10_000}, "evaluations", 3 + 4 + 1 + 1),
    ({"held_out": 10_000, "retained": 10_000}, "evaluations", 3 + 4 + 1 + 1 + 3 + 1 + 1),
    ({"held_out": 10_000, "evaluations": 5}, "evaluations", 3 + 4 + 1 + 1 + 5 * 4),
    ({"held_out": 10_000, "retained": 10_000, "evaluations": 5}, "evaluations", 3 + 4 + 1 + 1 + 3 + 1 + 1 + 5 * 4),
    ({"held_out": 10_000, "control": True}, "evaluations", 3 + 4 + 1 + 1 + 1),
    ({"held_out": 10_000, "evaluations": 5, "control": True}, "control", 100 * (0.5 + 0.1) + 5),
    ({"control": True, "checkpointing": True}, "control", 100 * (0.5 + 0.2 + 0.1)),
    ({"checkpointing": True}, "steps", 100 * (1 + 0.2 + 0.1)),
    ({"calibration": 5000}, "calibration", 2),
    ({"cached": 20_000}, "teacher cache", 4),
    ({"cached": 0, "calibration": 5000}, "calibration", 1),
    ({"cached": 0}, "steps", 100 * (0.8 + 0.1)),
    ({"cached": 0, "held_out": 10_000}, "evaluations", 3 + 2 + 1 + 1),
    ({"probe": 2000, "gradient": 3000}, "probe", 2 * (0.8 + 2 + 3)),
    ({"probe": 2000, "gradient": 3000, "saves": 1, "evaluations": 2}, "probe", 5 * (0.8 + 2 + 3)),
    ({"probe": 2000, "gradient": 3000, "saves": 1, "gradients_at_the_start_alone": True}, "probe", 3 * 2.8 + 3),
    ({"gradient": 3000}, "probe", None),
])  # fmt: skip
def test_each_stage_is_what_it_reads_times_what_that_takes(changes, part, seconds):
    assert estimate(replace(PLAN, **changes), RATES).get(part) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 100 * (1 + 0.1)),
    ({"without_divergence": 50}, 100 * (1 + 0.1) - 50 * 0.25),
    ({"without_divergence": 100, "cached": 0}, 100 * (0.8 + 0.1) - 100 * 0.25),
])  # fmt: skip
def test_steps_that_hold_the_divergence_back_take_less(changes, expected):
    rates = replace(RATES, divergence=2.5e-4)
    assert estimate(replace(PLAN, **changes), rates)["steps"] == pytest.approx(expected)


def test_answers_take_time_too():
    rates = replace(RATES, teacher_token=0.5, student_token=0.25)
    parts = estimate(replace(PLAN, batches=2, answer=40, longest=80, control=True), rates)
    assert parts["evaluations"] == pytest.approx(2 * (0.5 * 40 + 0.25 * (80 + 40 + 40)))


def test_times_are_told_as_people_say_them():
    assert [clock(seconds) for seconds in (0.4, 20, 59.6, 570, 3599.7, 3725)] == [
        "0:00", "0:20", "1:00", "9:30", "1:00:00", "1:02:05",
    ]  # fmt: skip
    assert [about(seconds) for seconds in (0.2, 50, 100, 1000, 5399, 9000)] == [
        "1 s", "50 s", "2 min", "17 min", "90 min", "2.5 h",
    ]  # fmt: skip


def test_the_line_names_the_stages_that_there_are():
    parts = {"calibration": 20.0, "evaluations": 100.0, "steps": 570.0, "control": 310.0}
    plan = replace(PLAN, steps=600, control=True)
    assert describe(plan, parts) == (
        "Time estimate: calibration 0:20, evaluations 1:40 (teacher, before, after, control), 600 steps 9:30, "
        "control 5:10; in all about 17 min"
    )
    assert describe(replace(PLAN, steps=1), {"steps": 3.0}) == "Time estimate: 1 step 0:03; in all about 3 s"


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run of 16 training and 7 held-out examples."""

    def make(**changes):
        trainer = make_trainer(tmp_path, tokenizer, **{"eval_strategy": "no", **changes})
        data = SimpleNamespace(
            train=trainer.train_dataset, evaluation=trainer.eval_dataset, collator=trainer.data_collator,
            retention=trainer.train_dataset.select(range(3)),
        )  # fmt: skip
        return SimpleNamespace(
            training=trainer.args, data=data, trainer=trainer, caches={}, checkpoint=None, tokenizer=tokenizer,
            models=SimpleNamespace(
                teacher=trainer.teacher.model, teachers=[trainer.teacher.model], student=trainer.student
            ),
            console=Console(plain=True),
        )  # fmt: skip

    return make


def test_a_plan_is_that_of_the_arguments(run):
    changes = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 2}
    plan = plan_of(run(**changes))
    lengths = [len(row["input_ids"]) for row in run().data.train]
    assert (plan.steps, plan.step_tokens) == (10, pytest.approx(8 * sum(lengths) / 16))
    assert (plan.evaluations, plan.saves) == (2, 2)  # after 4 and 8; after 2 and 6, for 10 is the end
    assert plan.held_out == pytest.approx(sum(lengths[:7]))
    assert plan.retained == pytest.approx(sum(lengths[:3]))
    assert plan.probe == pytest.approx(sum(lengths[:7]))
    assert plan.gradient == pytest.approx(2 * sum(lengths[:7]))
    assert (plan.calibration, plan.cached, plan.control, plan.batches) == (0, None, False, 0)


@pytest.mark.parametrize(("changes", "steps", "evaluations"), [
    ({"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch"}, 6, 3),
    ({"max_steps": 20, "eval_strategy": "steps", "eval_steps": 0.25}, 20, 4),
    ({"max_steps": 20, "save_strategy": "epoch"}, 20, 0),
])  # fmt: skip
def test_steps_and_evaluations_are_counted_as_trainer_does(run, changes, steps, evaluations):
    plan = plan_of(run(**changes))
    assert (plan.steps, plan.evaluations) == (steps, evaluations)


@pytest.mark.parametrize(("schedule", "steps", "done", "without"), [
    ("stage", 5, 0, 3), ("stage", 4, 0, 2), ("stage", 1, 0, 1), ("stage", 5, 2, 1), ("stage", 5, 4, 0),
    ("linear", 5, 0, 0), ("constant", 5, 0, 0),
])  # fmt: skip
def test_a_plan_knows_the_steps_without_the_divergence(run, tmp_path, schedule, steps, done, without):
    there = run(kd_weight=1.0, kd_schedule=schedule, max_steps=steps)
    if done:
        (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": done}))
        there.checkpoint = tmp_path
    weights = [there.trainer.terms.weights(step / steps)["kd"] for step in range(done, steps)]
    assert plan_of(there).without_divergence == without
    assert schedule != "stage" or weights.count(0.0) == without


def test_the_projectors_are_fitted_to_no_more_than_there_is(run):
    plan = plan_of(run(projector_init="least_squares"))
    assert plan.calibration == pytest.approx(sum(len(row["input_ids"]) for row in run().data.train))
    assert plan_of(run(projector_init="least_squares", calibration_tokens=50)).calibration == 50


def test_memory_that_runs_out_is_told(run, monkeypatch, capsys):
    class Broken:
        def __init__(self, run):
            pass

        def rates(self):
            raise time_estimate.torch.OutOfMemoryError("none left")

    monkeypatch.setattr(time_estimate, "Stopwatch", Broken)
    time_estimate.tell_time(run())
    assert capsys.readouterr().out == "No time estimate: memory ran out in a pass that was to be timed.\n"


@pytest.mark.estimate
def test_a_short_run_says_how_long_it_takes_and_on_how_many_examples_it_measures(tmp_path, capsys):
    options = {name: value for name, value in SHORT.items() if name != "max_eval_samples"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 96}
    options |= {"logging_steps": 1, "run_control": False, "plain_output": True}
    names = dict.fromkeys(("teacher_model_name_or_path", "student_model_name_or_path", "dataset_name"), "quickstart")
    arguments = tmp_path / "args.json"
    arguments.write_text(json.dumps({**names, **options, "output_dir": str(tmp_path / "out")}))
    assert run_kava.main([str(arguments)]) == 0
    shown = capsys.readouterr().out
    told = "The run trains on 12 examples alone, so 64 of the 500 held-out ones are measured on. For all of them write"
    assert f"\n{told} max_eval_samples 500.\n" in shown
    assert "alone, so the projectors are fitted to 1024. For more write calibration_tokens, such as 32768.\n" in shown
    before, after = shown.split("Time estimate: calibration 0:0", 1)
    assert before.index("Memory estimate") < before.index("Teacher's cross-entropy") < len(before)
    assert "(teacher, before, after), " in after.split("\n")[0]
    lines = [line for line in shown.split("\n") if line.endswith(" ...")]
    assert "Measuring on 64 held-out examples: teacher ..." in lines
    assert "Measuring on 64 held-out examples: student before ..." in lines
    assert "Measuring on 64 held-out examples: student after ..." in lines
    assert sum(line.startswith("Measuring the alignment on ") for line in lines) == 1  # of two measurements
    assert sum(line.startswith("Calibrating the projectors on 1") for line in lines) == 1
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["held_out_examples"] == summary["arguments"]["max_eval_samples"] == 64
    assert summary["arguments"]["calibration_tokens"] == 1024
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    shares = [line["step"] for line in history if any(name.endswith("_gradient_share") for name in line)]
    assert shares == [0]


@pytest.mark.parametrize("sparing", [False, True])
def test_where_they_are_spared_gradients_are_measured_at_the_start_alone(run, sparing):
    made = run()
    assert made.trainer.probe.sparing is False  # a trainer in a script spares none
    made.trainer.probe.sparing = sparing
    assert plan_of(made).gradients_at_the_start_alone is sparing
    assert made.trainer.probe.measure(made.trainer.model, 0.0).gradient_shares.keys() == {"mercator", "lm"}
    assert bool(made.trainer.probe.measure(made.trainer.model, 1.0).gradient_shares) is not sparing
