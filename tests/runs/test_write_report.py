"""A training in a script leaves what a run of the command line does, where it asks for it."""

import json

import pytest
from helpers.library import make
from helpers.pages import Page, check_page

from kava_trainer import write_report
from kava_trainer.cli import main
from kava_trainer.evaluation.answers import answer_cross_entropy
from kava_trainer.reports.run_reader import read_run
from kava_trainer.utils.errors import BadRequest

pytestmark = pytest.mark.report


def summary_in(folder):
    return json.loads((folder / "run_summary.json").read_text(encoding="utf-8"))


def test_a_training_in_a_script_has_a_report(tmp_path, tokenizer, capsys):
    trainer = make(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    assert write_report(trainer) == tmp_path / "report.html"
    summary = summary_in(tmp_path)
    assert (summary["status"], summary["global_step"], summary["held_out_examples"]) == ("completed", 2, 7)
    assert summary["evaluation"]["teacher"] is summary["evaluation"]["control_sft"] is None
    measured = answer_cross_entropy(trainer.student, trainer.eval_dataset, trainer.data_collator, 3)
    assert summary["evaluation"]["student_after"]["cross_entropy"] == pytest.approx(measured, rel=1e-4)
    assert summary["final"]["cos_sim"] is not None
    assert summary["final"]["margin"] is not None
    assert summary["throughput"]["tokens_per_second"] > 0
    assert 0 < summary["duration_seconds"] < 600
    assert summary["arguments"]["teacher_model_name_or_path"] == "LlamaForCausalLM"
    assert summary["checkpoints"] == [str(tmp_path / "checkpoint-2")]
    assert summary["verdict"]["success"] is False
    assert not any("run_control" in step for step in summary["verdict"]["next_steps"])
    check_page((tmp_path / "report.html").read_text(encoding="utf-8"), summary)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_what_was_evaluated_is_not_evaluated_again(tmp_path, tokenizer, monkeypatch):
    trainer = make(tmp_path, tokenizer, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    monkeypatch.setattr(trainer, "evaluate", None)
    write_report(trainer, tmp_path / "elsewhere")
    summary = summary_in(tmp_path / "elsewhere")
    last = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert summary["final"]["loss"] == last["eval_loss"]
    before, after = (summary["evaluation"][who]["cross_entropy"] for who in ("student_before", "student_after"))
    assert before > after


def test_the_student_is_measured_as_it_is_and_not_as_it_was_at_the_last_step(tmp_path, tokenizer):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make(tmp_path, tokenizer, **every, **best)  # the worst is the first
    trainer.train()
    assert trainer.state.best_global_step == 1
    write_report(trainer)
    summary = summary_in(tmp_path)
    measured = answer_cross_entropy(trainer.student, trainer.eval_dataset, trainer.data_collator, 3)
    assert summary["evaluation"]["student_after"]["cross_entropy"] == pytest.approx(measured, rel=1e-4)
    assert summary["final"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("evaluated", [True, False])
def test_of_several_sets_the_first_is_reported(tmp_path, tokenizer, evaluated):
    alone = make(tmp_path / "alone", tokenizer)
    sets = {"near": alone.eval_dataset, "far": alone.eval_dataset.select([0, 1])}
    when = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True} if evaluated else {}
    trainer = make(tmp_path, tokenizer, {"eval_dataset": sets}, **when)
    trainer.train()
    write_report(trainer)
    summary = summary_in(tmp_path)
    assert summary["held_out_examples"] == len(alone.eval_dataset)
    measured = answer_cross_entropy(trainer.student, sets["near"], trainer.data_collator, 3)
    assert summary["evaluation"]["student_after"]["cross_entropy"] == pytest.approx(measured, rel=1e-4)
    assert (summary["evaluation"]["student_before"] is None) is not evaluated
    assert summary["final"]["margin"] is not None


def test_without_held_out_examples_there_is_no_verdict(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, {"eval_dataset": None})
    trainer.train()
    write_report(trainer)
    verdict = summary_in(tmp_path)["verdict"]
    assert verdict["success"] is False  # by the CosSim of the training
    assert "There were no held-out examples, so the student was not measured." in verdict["reasons"]
    assert verdict["next_steps"][-1] == "Give the trainer an eval_dataset, so that something is held out to measure on."


def test_before_a_training_there_is_nothing_to_report(tmp_path, tokenizer):
    with pytest.raises(BadRequest, match="There was no training yet, so there is nothing to report; call"):
        write_report(make(tmp_path, tokenizer))
    assert not list(tmp_path.iterdir())


def test_a_training_that_wrote_none_is_shown_by_its_checkpoint_with_how_to(tmp_path, tokenizer, capsys):
    make(tmp_path, tokenizer, save_strategy="steps", save_steps=2).train()
    assert main(["report", str(tmp_path)]) == 0
    assert read_run(tmp_path).note.startswith(
        "The training ended at step 2, and left no run_summary.json: in a script kava_trainer.write_report writes it."
    )
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts["h2"][0] == "Not judged"
