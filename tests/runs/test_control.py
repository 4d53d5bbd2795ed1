import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers.places import ROOT
from helpers.programs import SHORT, summary_of, words
from helpers.trainers import make_trainer
from transformers import TrainerCallback

import run_kava
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.loss_terms import LossTerms
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.runs import pipeline
from kava_trainer.runs.control import control_arguments
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.errors import RunFailed

RECIPE = str(ROOT / "training_args" / "quickstart.json")


@pytest.fixture
def steps(monkeypatch):
    """What each trainer started from and read, in the order in which the trainers were made."""
    seen: list[dict] = []
    known: dict[int, dict] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if torch.is_grad_enabled():
            if id(self) not in known:
                weights = {name: p.detach().clone() for name, p in self.student.named_parameters()}
                known[id(self)] = {"trainer": self, "weights": weights, "batches": [], "rates": []}
                seen.append(known[id(self)])
            known[id(self)]["batches"].append(inputs["input_ids"].clone())
            known[id(self)]["rates"].append(self.lr_scheduler.get_last_lr()[0])
        return original(self, model, inputs, return_outputs, num_items_in_batch)

    original = KavaTrainer.compute_loss
    monkeypatch.setattr(KavaTrainer, "compute_loss", compute_loss)
    return seen


def run(folder, *more, **changes):
    options = {**SHORT, "max_steps": 4, "save_steps": 2, "output_dir": folder, "run_control": True, **changes}
    return run_kava.main([RECIPE, *words(options), *more])


@pytest.mark.parametrize("schedule", ["linear", "stage"])
def test_a_control_has_its_next_token_loss_whatever_the_schedules_are(tmp_path, tokenizer, schedule):
    asked = {"kd_weight": 2.0, "kd_schedule": schedule, "alignment_schedule": schedule}
    trainer = make_trainer(tmp_path, tokenizer, **asked)
    terms = LossTerms(control_arguments(trainer.args), trainer.target, None, 512)
    assert [terms.weights(progress) for progress in (0.0, 0.3, 0.5, 1.0)] == [{"lm": 1.0}] * 4
    assert terms.full_weights == {"lm": 1.0}
    assert trainer.terms.full_weights == {"mercator": 1.0, "lm": 1.0, "kd": 2.0}


def test_the_control_differs_in_its_loss_alone(tmp_path, steps, capsys):
    assert run(tmp_path, projector_anchor="none") == 0  # its dropout draws random numbers that the control does not
    main, control = steps
    assert all(torch.equal(main["weights"][name], control["weights"][name]) for name in main["weights"])
    assert len(main["batches"]) == len(control["batches"]) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(main["batches"], control["batches"], strict=True))
    assert main["rates"] == control["rates"]
    names, own = (list(run["trainer"].terms.weights(0.0)) for run in (main, control))
    assert names != own == ["lm"]
    summary = summary_of(tmp_path)
    figures = summary["evaluation"]["control_sft"]
    assert figures["cross_entropy"] > 0
    assert figures["exact_match"] is not None
    assert figures != summary["evaluation"]["student_after"]
    assert "control" in summary["verdict"]["reasons"][-1]
    shown = capsys.readouterr().out
    assert shown.count("Control (next-token loss alone)") == 2
    assert {path.name for path in (tmp_path / "control").iterdir()} >= {"checkpoint-2", "checkpoint-4"}


@pytest.mark.slow
def test_an_interrupted_control_goes_on_where_it_stopped(tmp_path, steps, monkeypatch, capsys):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def stop_at_two(trainer, resume):
        trainer.add_callback(Stop())
        original(trainer, resume)

    original = pipeline.train_control
    monkeypatch.setattr(pipeline, "train_control", stop_at_two)
    assert run(tmp_path) == 143
    assert summary_of(tmp_path)["status"] == "interrupted"
    shown = capsys.readouterr().out
    assert f"Saved after step 2: {tmp_path / 'control' / 'checkpoint-2'}" in shown
    assert re.search(rf"^Resume with: .*--resume_from_checkpoint {tmp_path / 'checkpoint-4'}$", shown, re.M)
    assert len(steps[1]["batches"]) == 2
    monkeypatch.setattr(pipeline, "train_control", original)
    assert run(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-4")) == 0
    assert f"The control goes on from {tmp_path / 'control' / 'checkpoint-2'}." in capsys.readouterr().out
    assert len(steps) == 3
    assert len(steps[2]["batches"]) == 2
    resumed = summary_of(tmp_path)["evaluation"]["control_sft"]
    assert run(tmp_path / "whole") == 0
    assert summary_of(tmp_path / "whole")["evaluation"]["control_sft"] == pytest.approx(resumed)


def test_the_control_of_a_cached_run_starts_from_the_same_teacher_layers(tmp_path, steps, capsys):
    changes = {"student_init": "teacher_layers", "run_control": True, "kd_weight": 1.0, "lm_weight": 0.5}
    config = json.loads((TEACHER_FOLDER / "config.json").read_text()) | {"num_hidden_layers": 2}
    config["layer_types"] = (config.get("layer_types") or [])[:2] or None
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    recipe = json.loads(Path(RECIPE).read_text())
    del recipe["student_model_name_or_path"]
    recipe["student_config_name"] = str(tmp_path / "student")
    (tmp_path / "args.json").write_text(json.dumps(recipe))
    options = {**SHORT, "output_dir": tmp_path / "out", "teacher_cache_dir": tmp_path / "cache", **changes}
    assert run_kava.main([str(tmp_path / "args.json"), *words(options)]) == 0
    main, control = steps
    assert all(torch.equal(main["weights"][name], control["weights"][name]) for name in main["weights"])
    assert summary_of(tmp_path / "out")["evaluation"]["control_sft"]["cross_entropy"] > 0


@pytest.mark.slow
def test_a_run_that_trains_again_gets_a_new_control(tmp_path, steps):
    assert run(tmp_path) == 0
    (tmp_path / "control" / "checkpoint-4").rename(tmp_path / "control" / "checkpoint-999")
    assert run(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")) == 0
    assert [len(seen["batches"]) for seen in steps] == [4, 4, 2, 4]
    assert not (tmp_path / "control" / "checkpoint-999").exists()


@pytest.mark.slow
def test_what_is_no_control_s_in_its_folder_is_left_alone(tmp_path, capsys):
    notes = tmp_path / "control" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert run(tmp_path, max_steps=2) == 0
    assert (tmp_path / "control" / "checkpoint-2").is_dir()
    assert run(tmp_path, max_steps=2, run_control=False) == 0
    assert not (tmp_path / "control" / "checkpoint-2").exists()
    assert notes.read_text() == "mine"
    other = {"output_dir": tmp_path / "else" / "control", "run_control": False}
    assert run(tmp_path, **other, max_steps=2) == 0
    capsys.readouterr()
    assert run(tmp_path / "else") == 2
    assert "checkpoint-2 is of another run, but the control's checkpoints go to" in capsys.readouterr().err
    assert (tmp_path / "else" / "control" / "checkpoint-2").is_dir()


def test_a_control_that_breaks_leaves_the_run_whole(tmp_path, monkeypatch, capsys):
    def break_off(self, *arguments, **named):
        if list(self.terms.weights(0.0)) == ["lm"]:
            raise RunFailed("It broke.")
        return original(self, *arguments, **named)

    original = KavaTrainer.compute_loss
    monkeypatch.setattr(KavaTrainer, "compute_loss", break_off)
    assert run(tmp_path) == 0
    summary = summary_of(tmp_path)
    assert summary["status"] == "completed"
    assert summary["evaluation"]["control_sft"] is None
    assert summary["problems"][0]["kind"] == "control_failed"
    assert not any("stable" in reason for reason in summary["verdict"]["reasons"])
    assert summary["verdict"]["reasons"][-1] == "The control broke off, so there is nothing to compare with."
    assert "The control broke off, so there is nothing to compare with: It broke." in capsys.readouterr().out
    assert (tmp_path / "final_student" / "README.md").exists()


def test_the_controls_arguments_keep_it_apart(tmp_path):
    args = KavaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, lm_weight=0.0, kd_weight=2.0, report_to=["tensorboard", "trackio"]
    )
    control = control_arguments(args)
    assert (control.mercator_weight, control.mse_weight, control.kd_weight, control.lm_weight) == (0, 0, 0, 1)
    assert control.metric_for_best_model is None
    assert control.output_dir == str(tmp_path / "control")
    assert control.report_to == ["tensorboard"]
    assert args.kd_weight == 2.0
    assert args.output_dir == str(tmp_path)


def test_the_verdict_stands_in_the_summary_of_a_run_that_failed(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RunFailed("no")

    monkeypatch.setattr(KavaTrainer, "compute_loss", fail)
    assert run(tmp_path) == 1
    verdict = json.loads((tmp_path / "run_summary.json").read_text())["verdict"]
    assert verdict["success"] is False
    assert verdict["reasons"] == ["The run did not complete."]


@pytest.mark.slow
def test_the_control_of_a_run_with_adapters_has_the_same_adapters_on_the_same_student(tmp_path, steps):
    changes = {"use_peft": True, "lora_r": 4, "projector_anchor": "none", "student_model_name_or_path": TEACHER_FOLDER}
    assert run(tmp_path, **changes) == 0
    main, control = steps
    assert any("lora_A" in name for name in main["weights"])
    assert main["weights"].keys() == control["weights"].keys()
    assert all(torch.equal(main["weights"][name], control["weights"][name]) for name in main["weights"])
    assert summary_of(tmp_path)["evaluation"]["control_sft"]["exact_match"] is not None
