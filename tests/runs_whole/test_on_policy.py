"""Whole runs in which the student writes answers itself."""

import json

import pytest
from helpers.places import ROOT
from helpers.programs import SHORT, summary_of, words

import run_kava
from kava_trainer import cli
from kava_trainer.runs import pipeline

RECIPE = str(ROOT / "training_args" / "quickstart.json")

ROLLOUTS = {
    **SHORT,
    "on_policy_fraction": 1,
    "on_policy_max_new_tokens": 8,
    "kd_weight": 1,
    "kd_beta": 1,
    "run_control": False,
    "evaluate_generation": False,
}


def run(folder, rows, **changes):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**ROLLOUTS, "dataset_name": file, "output_dir": folder / "out", **changes}
    return run_kava.main([RECIPE, *words(options)])


def test_a_student_learns_from_prompts_alone(tmp_path):
    assert run(tmp_path, [{"question": f"What is {i}+{i + 2}?"} for i in range(40)]) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["status"] == "completed"
    assert summary["evaluation"]["student_after"] is None
    assert len(summary["rollouts"]) == 10
    assert all("What is" in own["prompt"] for own in summary["rollouts"])
    assert any(own["first"] != own["last"] for own in summary["rollouts"])
    log = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert all(line["rollout_length"] > 0 for line in log if "loss" in line)
    assert (tmp_path / "out" / "final_student" / "model.safetensors").exists()


def test_a_stream_has_prompts_for_the_student_too(tmp_path):
    rows = [{"question": f"What is {i}+{i + 2}?", "answer": f"#### {2 * i + 2}"} for i in range(200)]
    assert run(tmp_path, rows, on_policy_fraction=0.5, streaming=True) == 0
    assert summary_of(tmp_path / "out")["status"] == "completed"


def test_the_doctor_looks_at_prompts_as_a_run_does(tmp_path, capsys):
    rows = [{"question": f"What is {i}+{i + 2}?"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**ROLLOUTS, "dataset_name": file, "output_dir": tmp_path / "out"}
    assert cli.main(["doctor", RECIPE, *words(options)]) == 0
    shown = capsys.readouterr().out
    assert "question + answer" in shown
    assert "none of the first" not in shown


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (
            [{"text": f"There are {i} apples."} for i in range(40)],
            {"on_policy_fraction": 0.5},
            "on_policy_fraction is 0.5, but the rows are plain text, which has no prompt that a student could answer;",
        ),
        (
            [{"question": f"{i}+1?"} for i in range(40)],
            {"run_control": True},
            "run_control is true, but the training rows are prompts alone",
        ),
    ],
)
def test_what_has_no_prompt_or_no_answer_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, rows, changes, told
):
    monkeypatch.setattr(pipeline, "load_pair", lambda *_: pytest.fail("models were loaded"))
    assert run(tmp_path, rows, **changes) == 2
    assert told in capsys.readouterr().err
