"""What is shown and written about a run: statuses, status lines, summary, commands."""

import io
import json
import os
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
import torch
from helpers.models import tiny_llama
from helpers.programs import QUICKSTART, SHORT, words

import run_kava
from kava_trainer.cli import main
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.launcher import resume_command
from kava_trainer.config.parser import parse_arguments
from kava_trainer.distillation.token_means import TokenMeans
from kava_trainer.reports.findings.alignment import PairFigures
from kava_trainer.reports.summary import ModelFigures, RunSummary, Verdict
from kava_trainer.runs.advice import slow_half_precision
from kava_trainer.runs.display import (
    MOST_PAIRS,
    show_figures,
    show_pairs,
    show_verdict,
    tell_alignment,
    tell_busy_cores,
    use_all_cores,
)
from kava_trainer.trainer.callbacks.status import StatusCallback
from kava_trainer.utils.before_imports import let_threads_sleep
from kava_trainer.utils.console import Console, can_show_emoji, status_text
from kava_trainer.utils.environment import describe_environment, device_name


class Terminal(io.StringIO):
    def __init__(self, encoding, is_terminal):
        super().__init__()
        self._encoding, self._is_terminal = encoding, is_terminal

    encoding = property(lambda self: self._encoding)

    def isatty(self):
        return self._is_terminal


@pytest.mark.parametrize(
    ("encoding", "is_terminal", "plain", "expected"),
    [
        ("utf-8", True, False, True),
        ("utf-8", True, True, False),
        ("utf-8", False, False, False),
        ("ascii", True, False, False),
    ],
)
def test_emoji_only_where_they_can_be_shown(monkeypatch, encoding, is_terminal, plain, expected):
    monkeypatch.setattr("sys.stdout", Terminal(encoding, is_terminal))
    assert can_show_emoji(plain) is expected


class State:
    is_world_process_zero, global_step, max_steps = True, 50, 100


def status_line(capsys, logs, emoji):
    callback = StatusCallback()
    callback._console.emoji = emoji
    callback.on_log(None, State(), None, logs=logs)
    return capsys.readouterr().out


def test_the_status_line(capsys):
    logs = {"loss": 0.45213, "cos_sim": 0.54791}
    assert status_line(capsys, logs, True) == "[Step 0050] Loss: 0.4521 | CosSim: 0.5479 📈 Learning\n"
    assert status_line(capsys, logs, False) == "[Step 0050] Loss: 0.4521 | CosSim: 0.5479 Learning\n"
    assert status_line(capsys, {"loss": 0.45213}, False) == "[Step 0050] Loss: 0.4521\n"
    assert status_line(capsys, {"eval_loss": 1.0}, False) == ""
    assert status_text("Collapsed", True) == "❌ Collapsed"


def test_other_ranks_print_nothing(capsys):
    state = State()
    state.is_world_process_zero = False
    StatusCallback().on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_token_means_add_up_and_start_anew():
    means = TokenMeans()
    assert means.drain(lambda sums: sums) == {}
    for total, count in ((3.0, 1), (5.0, 3)):
        means.add("a", torch.tensor(total), torch.tensor(count))
    means.add("nothing", torch.tensor(0.0), torch.tensor(0))
    assert means.drain(lambda sums: 2 * sums) == {"a": 2.0}
    assert means.drain(lambda sums: sums) == {}


ARGUMENTS = [
    *(
        "--teacher_model_name_or_path",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "--student_model_name_or_path",
        "Qwen/Qwen2.5-0.5B",
    ),
    *("--dataset_name", "openai/gsm8k", "--use_cpu", "--hub_token", "hf_planted", "--hub_model_id", "me/student"),
]


@pytest.fixture
def summary():
    summary = RunSummary(parse_arguments(ARGUMENTS).to_dict(), describe_environment(torch.device("cpu")))
    history = [{"loss": 1.0, "cos_sim": 0.2, "step": 50}, {"eval_loss": 3.0, "step": 50}, {"loss": 0.5, "step": 60}]
    summary.add_training(history, 60)
    summary.add_evaluation("student_after", {"perplexity": 3.25, "exact_match": None})
    return summary


def test_the_summary_reads_the_log_and_keeps_what_was_not_measured_null(summary, tmp_path):
    content = json.loads(summary.write(tmp_path, "completed").read_text())
    assert content["cos_sim_at"] == {"50": 0.2, "100": None, "200": None}
    assert content["final"]["loss"] == 0.5
    assert content["final"]["cos_sim"] is None
    assert content["evaluation"]["teacher"] is None
    assert content["environment"]["torch"] == torch.__version__
    assert "hf_planted" not in json.dumps(content)


def test_a_collapse_is_in_the_summary(summary):
    summary.add_final({"eval_loss": 1.0, "eval_cos_sim": 0.99, "eval_margin": 0.01})
    assert summary.content.final.margin == 0.01
    assert summary.content.final.cka is None


def test_a_summary_that_is_written_again_is_the_same(summary, tmp_path):
    first = summary.write(tmp_path, "completed").read_text()
    summary._started -= timedelta(hours=1)
    assert summary.write(tmp_path, "completed").read_text() == first
    assert summary.write(tmp_path, "failed").read_text() != first


@pytest.mark.parametrize(
    "argv",
    [
        ["a.json", "--max_steps", "3"],
        ["a.json", "--resume_from_checkpoint", "true", "--max_steps", "3"],
        ["a.json", "--resume-from-checkpoint=old", "--max_steps", "3"],
        ["--resume_from_checkpoint", "old/checkpoint-1", "a.json", "--max_steps", "3"],
    ],
)
def test_the_resume_command_keeps_everything_but_the_old_checkpoint(monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_kava.py", *argv])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    expected = "run_kava.py a.json --max_steps 3 --resume_from_checkpoint 'my runs/checkpoint-7'"
    assert resume_command(argv, "my runs/checkpoint-7") == f"accelerate launch {expected}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(argv, "my runs/checkpoint-7").startswith(
        "python -m torch.distributed.run --nproc-per-node 2 run"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert resume_command(argv, None).startswith(
        "python -m torch.distributed.run --nproc-per-node 1 --nnodes 2 --node-rank <RANK> --master-addr <ADDRESS> run"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert resume_command(argv, None).startswith(
        "accelerate launch --config_file training_args/accelerate/fsdp2.yaml --num_processes 2 run"
    )


@pytest.mark.parametrize(
    ("environment", "all_of_them"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2"}, False),
        ({"OMP_NUM_THREADS": "1"}, False),
    ],
)
def test_a_launched_process_uses_all_cores_unless_threads_are_limited(monkeypatch, tmp_path, environment, all_of_them):
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    use_all_cores(KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert asked == ([len(os.sched_getaffinity(0))] if all_of_them else [])


@pytest.mark.parametrize("busy", [0.2, 1.3])
def test_cores_that_other_processes_keep_busy_are_told(monkeypatch, tmp_path, capsys, busy):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    shares = [100 * busy / 2, 70.0, 100 * busy / 2]  # core 1 is not this process's
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: shares)
    tell_busy_cores(Console(plain=True), KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    said = "Other processes keep 1.3 of 2 cores busy, so this will take longer.\n"
    assert capsys.readouterr().out == (said if busy > 1 else "")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_threads_wait_asleep_unless_the_user_says_how(monkeypatch, given):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    let_threads_sleep()
    expected = given if "OMP_WAIT_POLICY" in given else {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0", **given}
    assert environment == expected


def test_the_program_settles_how_threads_wait_before_torch_is_loaded():
    code = (
        "import sys; from kava_trainer import cli; "
        "cli.exit_with(lambda: print('torch' in sys.modules, __import__('os').environ['GOMP_SPINCOUNT']) or 0)"
    )
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False 1000\n"


@pytest.mark.parametrize(("threads", "said"), [(1, ", 1 thread)"), (2, ", 2 threads)")])
def test_threads_are_counted_in_words_that_agree(monkeypatch, threads, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(said)


HALF, FULL = torch.bfloat16, torch.float32
QLORA = {"use_peft": True, "student_quantization": "4bit"}


@pytest.mark.parametrize(
    ("dtypes", "changes", "environment", "advice"),
    [
        ((HALF, HALF), {}, "no", "teacher_dtype float32, student_dtype float32"),
        ((HALF, FULL), {}, "no", "teacher_dtype float32"),
        ((torch.float16, FULL), {}, "no", "teacher_dtype float32"),
        ((FULL, HALF), {}, "no", "student_dtype float32"),
        ((FULL, FULL), {"teacher_quantization": "4bit"}, "no", "teacher_quantization none"),
        ((FULL, FULL), {"teacher_quantization": "8bit"}, "no", None),
        ((HALF, HALF), QLORA, "no", "teacher_dtype float32, student_quantization none, student_dtype float32"),
        ((FULL, FULL), {}, "no", None),
        ((FULL, FULL), {"bf16": True}, "no", "bf16 false"),
        ((FULL, FULL), {}, "bf16", "--mixed_precision no for accelerate launch"),
    ],
)
def test_half_precision_on_a_processor_that_is_slow_at_it_is_told(
    monkeypatch, tmp_path, dtypes, changes, environment, advice
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    if changes == QLORA:
        tiny_llama(32, 1).save_pretrained(tmp_path / "student")
        changes = {**changes, "student_model_name_or_path": tmp_path / "student", "student_config_name": ""}
    arguments = parse_arguments(words({**QUICKSTART, "output_dir": tmp_path, "use_cpu": True, **changes}))
    pair = [tiny_llama(32, 1).to(dtype) for dtype in dtypes]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    said = slow_half_precision(arguments, *pair)
    assert f" Write {advice}, where the memory suffices" in str(said) if advice else said is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert slow_half_precision(arguments, *pair) is None


def test_a_gpu_is_not_slow_at_half_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    arguments = parse_arguments(words({**QUICKSTART, "output_dir": tmp_path, "use_cpu": True}))
    pair = [tiny_llama(32, 1).to(HALF) for _ in range(2)]
    assert slow_half_precision(arguments, *pair)
    monkeypatch.setattr(KavaTrainingArguments, "device", torch.device("cuda"))
    assert slow_half_precision(arguments, *pair) is None


def test_a_run_and_doctor_warn_once_of_slow_half_precision(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    options = {**QUICKSTART, **SHORT, "student_dtype": "bfloat16", "max_steps": 1, "output_dir": tmp_path / "out"}
    assert main(["doctor", *words(options)]) == 0
    told = capsys.readouterr().out
    assert told.count("Warning     Student: PyTorch uses no AVX-512 on this processor,") == 1
    assert told.count(" Write student_dtype float32, where the memory suffices, or train on a GPU.") == 1
    assert run_kava.main(words(options)) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "AVX-512" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("Warning: PyTorch uses no AVX-512 on this processor,")
    assert warnings[0].endswith(" Write student_dtype float32, where the memory suffices, or train on a GPU.")


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ((0.5, 1.6487, 0.25), "perplexity 1.649     cross-entropy  0.5000   exact match  25.0 %"),
        ((None, 1.6487, 0.25), "perplexity 1.649       exact match  25.0 %"),
        ((0.5, 1.6487, None), "perplexity 1.649     cross-entropy  0.5000"),
        ((None, None, None), "not measured"),
    ],
)
def test_figures_that_an_older_summary_lacks_are_left_out(capsys, figures, shown):
    names = ("cross_entropy", "perplexity", "exact_match")
    measured = {"student_after": ModelFigures(**dict(zip(names, figures, strict=True)))}
    show_figures(Console(plain=True), measured)
    assert capsys.readouterr().out == f"{'Student after':<32} {shown}\n"


@pytest.mark.parametrize("given", [None, ""])
def test_no_final_dir_and_an_empty_one_are_the_output_dir(tmp_path, given):
    training = KavaTrainingArguments(output_dir=str(tmp_path), final_dir=given, use_cpu=True)
    assert training.final_dir == training.output_dir
    assert training.final_folder == tmp_path


def test_the_verdict_ends_with_what_to_try_next(capsys):
    summary = RunSummary({}, {})
    summary.content.verdict = Verdict(False, False, ["Because."], next_steps=["Do this.", "Do that."])
    show_verdict(Console(plain=True), summary)
    assert capsys.readouterr().out.endswith("No success.\n- Because.\nWhat to try next:\n- Do this.\n- Do that.\n")


def test_each_of_several_pairs_of_layers_has_a_line_and_of_many_the_worst(capsys):
    def pairs(count):
        return [
            PairFigures(student_layer=n, teacher_layer=2 * n, margin=n / 100, cos_sim=0.5, collapsed=n < 5)
            for n in range(1, count + 1)
        ]

    show_pairs(Console(plain=True), pairs(1))
    assert capsys.readouterr().out == ""
    show_pairs(Console(plain=True), pairs(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["2", "->", "4", "0.5000", "0.0200", "-", "-,", "-,", "-", "Collapsed"]
    show_pairs(Console(plain=True), pairs(30))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [str(n) for n in range(1, MOST_PAIRS + 1)]
    assert lines[-1] == "The margins of the other 18 are higher; the report has them all."


def test_a_mean_margin_that_hides_a_pair_is_told_with_it(capsys):
    metrics = {f"eval_{name}": 0.5 for name in ("cos_sim", "centred_cos_sim", "margin", "cka")}
    pairs = [PairFigures(student_layer=n, teacher_layer=n, margin=n / 10, collapsed=not n) for n in (0, 1)]
    tell_alignment(Console(plain=True), metrics, "Because.", pairs)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == (
        "Margin: it is the mean of 2 pairs of layers; the lowest is 0.0000, of layers 0 -> 0, and 1 of them collapsed."
    )
