"""Whole runs in which the student writes answers itself."""

import json
import re

import pytest
import torch
from helpers.bad_requests import other_tokenizer
from helpers.places import ROOT
from helpers.programs import SHORT, summary_of, words
from transformers import AutoTokenizer

import run_kava
from kava_trainer import cli
from kava_trainer.distillation.rollouts.examples import Rollout
from kava_trainer.distillation.rollouts.files import write_rollouts
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.runs import pipeline
from kava_trainer.runs.rollouts import sample

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
    assert "of 40 training examples 0 are cut to 256 tokens, 0 dropped without room for an answer." in shown


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


def answers(folder, rows, *more, **changes):
    """Exit code of the command that writes a student's answers to `own.jsonl`, and the file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**SHORT, "dataset_name": file, "on_policy_max_new_tokens": 8, **changes}
    return cli.main(["rollouts", RECIPE, str(folder / "own.jsonl"), *words(options), *more]), folder / "own.jsonl"


def test_a_student_s_answers_are_written_once_and_trained_on_with_a_cache(tmp_path, capsys):
    rows = [{"question": f"What is {i}+{i + 2}?"} for i in range(40)]
    code, own = answers(tmp_path, rows, rollouts_from=tmp_path / "own.jsonl", teacher_cache_dir=tmp_path / "cache")
    assert code == 0
    shown = capsys.readouterr().out
    assert "40 training examples of 40: 0 cut to 256 tokens, 0 dropped because their prompt is empty or leaves" in shown
    lines = [json.loads(line) for line in own.read_text(encoding="utf-8").splitlines()]
    assert f"40 prompts, {len(lines)} answers of " in shown
    prompts = [line["prompt"] for line in lines]
    assert len(prompts) > 30
    assert prompts == [asked for row in rows if (asked := f"Question: {row['question']}\nAnswer:") in prompts]
    assert all(len(line["answer_ids"]) <= 8 and line["ended"] == (line["answer_ids"][-1] == 0) for line in lines)
    read = {"rollouts_from": own, "on_policy_fraction": 1, "save_strategy": "no", "max_steps": 2}
    losses = []
    for name, changes in (("online", {}), ("cached", {"teacher_cache_dir": tmp_path / "cache"})):
        assert run(tmp_path, rows, output_dir=tmp_path / name, **read, **changes) == 0
        assert f"Trained on: the {len(lines)} answers of a student from {own}" in capsys.readouterr().out
        log = json.loads((tmp_path / name / "log_history.json").read_text())
        losses.append(next(line["loss"] for line in log if "loss" in line))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


def test_data_and_answers_are_mixed_and_a_control_learns_from_the_data_for_as_many_steps(tmp_path, capsys):
    rows = [{"question": f"What is {i}+{i + 2}?", "answer": f"#### {2 * i + 2}"} for i in range(40)]
    _, own = answers(tmp_path, rows)
    (count,) = re.findall(r"38 prompts, (\d+) answers", capsys.readouterr().out)
    more = {"rollouts_from": own, "on_policy_fraction": 0.5, "run_control": True, "save_strategy": "no"}
    more |= {"max_steps": -1, "num_train_epochs": 1, "max_eval_samples": 2, "per_device_train_batch_size": 32}
    assert run(tmp_path, rows, **more) == 0
    shown = capsys.readouterr().out
    assert f"Trained on: 76 examples, 50 % of them the {count} answers" in shown
    summary = summary_of(tmp_path / "out")
    assert summary["global_step"] == 3
    assert summary["evaluation"]["control_sft"]["cross_entropy"] > 0
    assert summary["rollouts"] is None


def test_the_doctor_counts_the_answers_of_a_file(tmp_path, capsys, tokenizer):
    own = tmp_path / "own.jsonl"
    write_rollouts(own, [Rollout([301, 26], [9, token, 0], ended=True) for token in range(1, 61)], tokenizer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(40)))
    changes = {"dataset_name": rows, "output_dir": tmp_path / "out", "rollouts_from": own, "max_train_samples": 50}
    assert cli.main(["doctor", RECIPE, *words({**ROLLOUTS, **changes})]) == 0
    assert (
        f"Trained on: the 50 answers of a student from {own}, and nothing of the data set." in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (
            [{"text": "There are 2 apples."}] * 9,
            {},
            "The rows are plain text, which has no prompt that a student could",
        ),
        ([{"question": "2?"}] * 9, {"streaming": True, "max_steps": 1}, "streaming is true, but all prompts are read"),
        ([{"question": "2?"}] * 9, {"max_length": 4}, "No example has a prompt that leaves room for an answer within"),
    ],
)
def test_answers_that_cannot_be_written_are_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, rows, changes, told
):
    monkeypatch.setattr(sample, "_load_student", lambda *_: pytest.fail("a student was loaded"))
    code, own = answers(tmp_path, rows, **{"max_steps": 1, **changes})
    assert (code, own.exists()) == (2, False)
    assert told in capsys.readouterr().err


def test_a_file_that_is_there_is_not_replaced_and_its_name_must_be_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_tokenizers", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "own.jsonl").write_text("mine")
    assert answers(tmp_path, [{"question": "2?"}])[0] == 2
    assert (
        "own.jsonl is there already, and is not replaced; name another file, or delete it." in capsys.readouterr().err
    )
    assert (tmp_path / "own.jsonl").read_text() == "mine"
    for words_given in ([RECIPE], [RECIPE, "--max_steps", "1"], []):
        assert cli.main(["rollouts", *words_given]) == 2
        assert "The file to write is missing; write rollouts ARGS.json OUT.jsonl." in capsys.readouterr().err
    assert cli.main(["rollouts", RECIPE, str(tmp_path / "gone" / "own.jsonl")]) == 2
    assert "cannot be written; name a file in a folder that exists." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "line 1 was written for another tokenizer"),
        ({"rollouts_from": "nowhere.jsonl"}, "The rollouts nowhere.jsonl cannot be read: No such file"),
        ({"streaming": True}, "rollouts_from is a file that is read before the training, but streaming is true;"),
        ({"on_policy_fraction": 0}, "on_policy_fraction is 0, so nothing of rollouts_from"),
        (
            {"run_control": True, "on_policy_fraction": 1},
            "run_control is true, but the training rows are prompts alone",
        ),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, changes, told
):
    monkeypatch.setattr(pipeline, "load_pair", lambda *_: pytest.fail("models were loaded"))
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER if "run_control" in changes else other_tokenizer(tmp_path))
    write_rollouts(tmp_path / "own.jsonl", [Rollout([301], [9, 0], ended=True)], tokenizer)
    rows = [{"question": f"{i}+1?"} for i in range(40)]
    assert run(tmp_path, rows, **{"rollouts_from": tmp_path / "own.jsonl", **changes}) == 2
    assert told in capsys.readouterr().err


def test_where_memory_runs_out_fewer_prompts_are_answered_at_a_time(tmp_path, monkeypatch, capsys):
    sizes, original = [], sample.sample_answers

    def sampled(prompts, student, sampling):
        sizes.append((len(prompts), sampling.batch_size))
        if sampling.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(prompts, student, sampling)

    monkeypatch.setattr(sample, "sample_answers", sampled)
    rows = [{"question": f"What is {i}+{i + 2}?"} for i in range(10)]
    assert answers(tmp_path, rows, per_device_eval_batch_size=8)[0] == 0
    assert sizes == [(8, 8), (8, 4), (8, 2), (2, 2)]
    assert "Out of memory with answers to 8 prompts; from now on 4 are answered at a time." in capsys.readouterr().out
    (tmp_path / "own.jsonl").unlink()
    monkeypatch.setattr(sample, "sample_answers", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    assert answers(tmp_path, rows)[0] == 1
    assert "Out of memory while the student answered a single prompt. Lower on_policy_max_new_tokens (now 8)" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "own.jsonl").exists()


def test_the_student_of_a_finished_run_answers_as_that_sampled(tmp_path, capsys):
    rows = [{"question": f"What is {i}+{i + 2}?"} for i in range(12)]
    assert run(tmp_path, rows, max_steps=1, on_policy_temperature=0.01) == 0
    own = [tmp_path / name for name in ("folder.jsonl", "named.jsonl")]
    assert cli.main(["rollouts", str(tmp_path / "out"), str(own[0])]) == 0
    asked = {**SHORT, "dataset_name": tmp_path / "rows.jsonl", "on_policy_max_new_tokens": 8, "max_length": 256}
    asked |= {"on_policy_temperature": 0.01, "student_model_name_or_path": tmp_path / "out" / "final_student"}
    assert cli.main(["rollouts", RECIPE, str(own[1]), *words(asked)]) == 0
    assert own[0].read_text() == own[1].read_text()


def test_a_cache_serves_the_data_of_a_run_that_samples(tmp_path, capsys):
    rows = [{"question": f"What is {i}+{i + 2}?", "answer": f"#### {2 * i + 2}"} for i in range(40)]
    changes = {"on_policy_fraction": 0.5, "teacher_cache_dir": tmp_path / "cache", "run_control": True}
    assert run(tmp_path, rows, **changes, max_eval_samples=2) == 0
    shown = capsys.readouterr().out
    assert "40 of 40 examples are to be written" in shown
    assert "it reads the answers alone." in shown
    summary = summary_of(tmp_path / "out")
    assert summary["evaluation"]["control_sft"]["cross_entropy"] > 0
    assert len(summary["rollouts"]) == 10
