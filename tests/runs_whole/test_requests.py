"""What goes wrong, provoked: signals, bad requests, broken files. Nothing may be lost, and the message must help."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STUDENT_SIZE, tiny_llama
from test_end_to_end import QUICKSTART, SHORT, words
from transformers import AutoTokenizer, LlamaConfig, T5Config

import run_kava
from kava_trainer.distillation.projector import ElasticBottleneck, ProjectorConfig
from kava_trainer.distillation.projector_files import load_projectors, save_projectors
from kava_trainer.models.loading import model_folder
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import write_manifest
from kava_trainer.utils.files import missing_path

SCRIPT = ROOT / "tests/helpers/signal_run.py"
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    ("number", "code", "program"),
    [
        (signal.SIGINT, 130, ["-m", "kava_trainer", "train"]),
        pytest.param(signal.SIGTERM, 143, ["run_kava.py"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_printed_command_resumes(tmp_path, number, code, program):
    options = {**SHORT, "max_train_samples": 640, "max_steps": 60, "logging_steps": 2, "output_dir": tmp_path / "out"}
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
    again = subprocess.run([sys.executable, *argv[1:]], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"Resuming from {tmp_path / 'out' / f'checkpoint-{step}'}" in again.stdout
    assert json.loads((tmp_path / "out" / "run_summary.json").read_text())["global_step"] == 60


def signal_run(tmp_path, name, times=1, rank=0, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(SCRIPT), str(tmp_path / "out"), name, str(times), str(rank)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_same_signal_twice_leaves_at_once(tmp_path):
    assert signal_run(tmp_path, "SIGINT", times=2).returncode == 130
    assert not list((tmp_path / "out").glob("*"))


def test_all_ranks_stop_at_the_same_step_when_one_gets_the_signal(tmp_path):
    result = signal_run(tmp_path, "SIGTERM", rank=1, ranks=2)
    for rank in (0, 1):
        assert f"rank {rank} of 2 stopped at step 3" in result.stdout
    assert "exitcode  : 143" in result.stderr
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


def write_dataset(folder, text, name="data.jsonl"):
    (folder / name).write_text(text)
    return folder / name


def other_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tiny_llama(32, 1).config.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    (folder / "other" / "tokenizer.json").write_text(json.dumps(content))
    return folder / "other"


def config_of(folder, **changes):
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    LlamaConfig(**{**sizes, **heads, **changes}).save_pretrained(folder / "config")
    return folder / "config"


def t5_config(folder):
    T5Config(vocab_size=512, d_model=32, num_layers=1).save_pretrained(folder / "config")
    return folder / "config"


def corrupted_teacher(folder):
    copy = folder / "broken"
    copy.mkdir()
    for file in TEACHER_FOLDER.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    return copy


def foreign_checkpoint(folder):
    checkpoint = folder / "checkpoint-1"
    tiny_llama(STUDENT_SIZE, 2).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, checkpoint / name)
    save_projectors(torch.nn.ModuleList([ElasticBottleneck(ProjectorConfig(7, 5))]), checkpoint / "projector.pth")
    write_manifest(checkpoint, None)
    return checkpoint


def student(path):
    return {"student_model_name_or_path": None, "student_config_name": path}


def damaged_checkpoint(folder, name):
    checkpoint = folder / "checkpoint-1"
    options = {**QUICKSTART, **SHORT, "max_steps": 1, "save_steps": 1, "max_length": 128, "output_dir": folder}
    assert run_kava.main(words(options)) == 0
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:100])
    return checkpoint


BAD_REQUESTS = {
    "missing teacher": (
        lambda f: {"teacher_model_name_or_path": f / "gone"},
        "teacher_model_name_or_path names the folder .*gone, which does not exist",
    ),
    "hub teacher offline": (lambda f: {"teacher_model_name_or_path": "nobody/nothing"}, "'nobody/nothing' cannot be"),
    "corrupted teacher": (
        lambda f: {"teacher_model_name_or_path": corrupted_teacher(f)},
        "teacher '.*' cannot be loaded",
    ),
    "missing student": (
        lambda f: student(f / "gone"),
        "student_config_name names the folder .*gone, which does not exist",
    ),
    "missing data": (lambda f: {"dataset_name": f / "gone.jsonl"}, "gone.jsonl, which does not exist"),
    "empty data": (lambda f: {"dataset_name": write_dataset(f, "")}, "is empty"),
    "broken data": (
        lambda f: {"dataset_name": write_dataset(f, '{"text": "a"}\n{"te\n')},
        "cannot be loaded: line 2 is",
    ),
    "unknown columns": (lambda f: {"dataset_name": write_dataset(f, '{"x": "a"}\n' * 3)}, "has the columns x"),
    "unknown split": (lambda f: {"dataset_train_split": "dev"}, "has no split 'dev'"),
    "other tokenizer": (lambda f: {"student_model_name_or_path": other_tokenizer(f)}, "differ in 2 tokens: 'A' is"),
    "small vocabulary": (lambda f: student(config_of(f, vocab_size=300)), "embeddings for 300 tokens only"),
    "short context": (lambda f: student(config_of(f, max_position_embeddings=64)), "the student reads 64 tokens"),
    "mapping": (lambda f: {"layer_mapping": "[[3, 9]]"}, r"names the pair \[3, 9\]"),
    "too many pairs": (lambda f: {"layer_mapping": "uniform:4"}, "asks for 4 pairs"),
    "teacher layers": (
        lambda f: {**student(config_of(f, hidden_size=64)), "student_init": "teacher_layers"},
        "All widths must agree|missing in the teacher",
    ),
    "checkpoint": (lambda f: {"resume_from_checkpoint": f / "gone"}, "is not a folder"),
    "foreign checkpoint": (
        lambda f: {**student(config_of(f)), "resume_from_checkpoint": foreign_checkpoint(f)},
        "does not fit this run",
    ),
    "damaged weights": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "model.safetensors")},
        "cannot be resumed: model.safetensors has 100 bytes in place of",
    ),
    "damaged optimizer": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "optimizer.pt")},
        "cannot be resumed: optimizer.pt has 100 bytes in place of",
    ),
    "damaged projector": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "projector.pth")},
        "cannot be resumed: projector.pth has 100 bytes in place of",
    ),
    "damaged state": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "trainer_state.json")},
        "cannot be resumed: trainer_state.json has 100 bytes in place of",
    ),
    "unknown tracker": (lambda f: {"report_to": "tensorbord"}, "Trainer cannot be set up with these arguments"),
    "hub offline": (lambda f: {"push_to_hub": "true"}, "push_to_hub true needs the hub, which cannot be reached"),
    "wrong kind of student": (lambda f: student(t5_config(f)), "student of type 't5' cannot be loaded"),
    "student is a file": (
        lambda f: {"final_dir": write_dataset(f, "x", "final_student").parent},
        "is a file, but the student's folder goes there",
    ),
    "output is a file": (lambda f: {"output_dir": write_dataset(f, "x", "file")}, "output_dir .* cannot be made"),
    "eval without data": (
        lambda f: {"dataset_name": write_dataset(f, '{"text": "a b c"}\n'), "eval_strategy": "steps"},
        "no held-out examples",
    ),
}


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
