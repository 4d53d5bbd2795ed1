"""What goes wrong, provoked: signals, bad requests, broken files. Nothing may be lost, and the message must help."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import signal_run
from helpers.bad_requests import BAD_REQUESTS
from helpers.models import tiny_llama
from helpers.places import ROOT
from helpers.processes import Run, launch
from helpers.programs import ENVIRONMENT, QUICKSTART, SHORT, words
from transformers import AutoTokenizer

import run_kava
from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.models.loading import model_folder
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.files import missing_path


@pytest.mark.parametrize(
    ("number", "code", "program"),
    [
        (signal.SIGINT, 130, ["-m", "kava_trainer", "train"]),
        pytest.param(signal.SIGTERM, 143, ["run_kava.py"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_printed_command_resumes(tmp_path, monkeypatch, capsys, number, code, program):
    options = {**SHORT, "max_steps": 60, "logging_steps": 2, "output_dir": tmp_path / "out", "run_control": False}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "calibration_tokens": 600}
    command = [sys.executable, *program, "training_args/quickstart.json", *words(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[Step 0002]"):
            process.send_signal(number)
    assert process.wait(timeout=120) == code
    resume = re.search(r"^Resume with: (.*)$", "".join(lines), re.M).group(1)
    step = int(re.search(r"Saved after step (\d+)", "".join(lines)).group(1))
    assert 2 <= step < 60
    assert load_projectors(tmp_path / "out" / "emergency_projector.pth")
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert (summary["status"], summary["global_step"]) == ("interrupted", step)
    assert not (tmp_path / "out" / "final_student").exists()
    argv = shlex.split(resume)
    assert argv[: 1 + len(program)] == ["python", *program]
    monkeypatch.chdir(ROOT)
    assert run_kava.main(argv[1 + len(program) :]) == 0
    assert f"Resuming from {tmp_path / 'out' / f'checkpoint-{step}'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run_summary.json").read_text())["global_step"] == 60


def test_the_same_signal_twice_leaves_at_once(tmp_path):
    run = Run(signal_run.main, tmp_path / "logs", str(tmp_path / "out"), "SIGINT", "2", "0")
    assert run.wait() == [130], run.output()
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_ranks_stop_at_the_same_step_when_one_gets_the_signal(tmp_path, launched):
    if launched:
        result = launch("helpers.signal_run", tmp_path / "out", "SIGTERM", 1, 1, ranks=2)
        shown = result.stdout
        assert "exitcode  : 143" in result.stderr
    else:
        run = Run(signal_run.main, tmp_path / "logs", str(tmp_path / "out"), "SIGTERM", "1", "1", ranks=2)
        assert run.wait() == [143, 143], run.output()
        shown = run.output()
    for rank in (0, 1):
        assert f"rank {rank} of 2 stopped at step 3" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("checkpoint-3", "proj_step_3.pth", "emergency_projector.pth")
    }


@pytest.mark.slow
def test_a_launcher_that_dies_alone_does_not_leave_an_orphan_training(tmp_path):
    options = {**SHORT, "max_train_samples": 640, "max_steps": 500, "logging_steps": 2, "output_dir": tmp_path / "out"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "run_kava.py", "training_args/quickstart.json"]
    process = subprocess.Popen(
        [*launcher, *words(options)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    lines = []
    for line in process.stdout:  # ends when the orphan does: it holds the other end of the pipe
        lines.append(line)
        if line.startswith("[Step 0002]"):
            process.kill()
    process.wait(timeout=120)
    assert any(line.startswith("Resume with: accelerate launch run_kava.py") for line in lines)
    assert json.loads((tmp_path / "out" / "run_summary.json").read_text())["status"] == "interrupted"


def test_ctrl_c_before_training_touches_nothing_and_shows_no_traceback(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_summary.json").write_text("of an earlier run")
    options = {**QUICKSTART, **SHORT, "output_dir": tmp_path / "out"}
    command = [sys.executable, "run_kava.py", *words(options)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    for line in process.stdout:
        if line.startswith("== Data"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "out" / "run_summary.json").read_text() == "of an earlier run"


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_ends_with_one_clear_error_and_exit_code_2(tmp_path, capsys, case):
    make_changes, message = BAD_REQUESTS[case]
    options = {**QUICKSTART, **SHORT, "max_length": 128, "output_dir": tmp_path / "out", **make_changes(tmp_path)}
    options = {name: value for name, value in options.items() if value is not None}
    assert run_kava.main(words(options)) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^Error: .*({message})", error, re.M), error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "out").is_dir() or case.startswith("damaged")


def test_a_refused_request_leaves_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "mine").mkdir()
    folders = {"output_dir": tmp_path / "runs" / "new" / "out", "final_dir": tmp_path / "mine"}
    options = {**QUICKSTART, **SHORT, "dataset_train_split": "dev", **folders}
    assert run_kava.main(words(options)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_missing_paths_are_listed_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "teacher_model_name_or_path": "./gone",
        "student_model_name_or_path": "a/b/c",
        "dataset_name": "../x.jsonl",
    }
    assert run_kava.main(words({**names, "output_dir": "out"})) == 2
    end = ", which does not exist; write the path of one that is there, or an id on the hub."
    assert capsys.readouterr().err.splitlines() == [
        f"Error: teacher_model_name_or_path names the folder ./gone{end}",
        f"student_model_name_or_path names the folder a/b/c{end}",
        f"dataset_name names the file ../x.jsonl{end}",
    ]


def test_a_folder_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_llama(32, 1).save_pretrained(tmp_path / "student")
    assert missing_path("student_model_name_or_path", "~/student") is None
    assert model_folder("~/student", "student") == tmp_path / "student"
    assert missing_path("student_model_name_or_path", "~/gone")


@pytest.mark.slow  # in one process: test_parser
def test_wrong_arguments_end_with_exit_code_2_before_anything_is_loaded(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "run_kava.py", "training_args/quickstart.json", "--learning_rat", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("There is no argument 'learning_rat'; did you mean 'learning_rate'?")
    assert time.monotonic() - started < 60


def test_bitsandbytes_is_only_needed_where_it_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = {**QUICKSTART, **SHORT, "output_dir": tmp_path}
    assert run_kava.main(words({**options, "teacher_quantization": "4bit"})) == 2
    assert "needs bitsandbytes, which cannot be imported" in capsys.readouterr().err
    assert run_kava.main(words({**options, "max_steps": 1})) == 0


def test_a_teacher_no_better_than_chance_is_a_warning(tmp_path, capsys):
    teacher = tiny_llama(64, 2)
    with torch.no_grad():
        teacher.get_input_embeddings().weight.zero_()
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(tmp_path / "teacher")
    options = {**QUICKSTART, **SHORT, "teacher_model_name_or_path": tmp_path / "teacher", "max_length": 120}
    assert run_kava.main(words({**options, "max_steps": 1, "output_dir": tmp_path / "out"})) == 0
    assert "Warning: The teacher is no better than chance" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert [problem["kind"] for problem in summary["problems"]] == ["teacher_at_chance"]
    assert summary["verdict"]["success"] is False
    reasons = " ".join(summary["verdict"]["reasons"])
    assert "The teacher was no better than chance" in reasons
    assert "Only 8 examples are held out" in reasons


def test_a_run_that_breaks_ends_with_exit_code_1_and_a_summary(tmp_path, capsys):
    options = {**QUICKSTART, **SHORT, "learning_rate": 1e30, "max_grad_norm": 0, "logging_steps": 1, "max_steps": 8}
    options["max_nonfinite_steps"] = 3
    assert run_kava.main(words({**options, "output_dir": tmp_path, "optim": "sgd"})) == 1
    assert "were no finite numbers for 3 steps in a row" in capsys.readouterr().err
    assert json.loads((tmp_path / "run_summary.json").read_text())["status"] == "failed"
