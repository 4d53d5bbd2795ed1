"""The subcommands as a user starts them: their help, and those that need no training."""

import enum
import json
import logging
import re
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
from helpers.data import write_dataset
from helpers.models import LORA
from helpers.places import ROOT
from helpers.programs import ENVIRONMENT, MEMORY, QUICKSTART, SHORT, summary_of, words

from kava_trainer import cli
from kava_trainer.cli import COMMANDS, main
from kava_trainer.config.launcher import resume_command, started_as
from kava_trainer.runs import measure, setup
from kava_trainer.utils import distributed
from kava_trainer.utils.errors import Interrupted

RECIPE = str(ROOT / "training_args" / "quickstart.json")
TINY = {**SHORT, "max_steps": 1, "max_length": 128, "run_control": "false"}


@pytest.fixture(scope="module", autouse=True)
def _no_estimate():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "estimate_memory", lambda arguments: MEMORY)
        yield


def figures_of(shown, stage):
    """The table below a heading, as (name, cross-entropy)."""
    table = shown.split(f"== {stage}\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^(\w[\w ]*?)  +perplexity .* cross-entropy +([\d.]+)", table, re.M))


def test_the_bare_command_and_help_are_short_and_fast(capsys):
    assert next(iter(COMMANDS)) == "doctor"
    for argv in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(re.search(rf"^    {name} ", shown, re.M) for name in COMMANDS)
        assert len(shown.splitlines()) < 25
    for name in COMMANDS:
        if name != "train":
            with pytest.raises(SystemExit):
                main([name, "--help"])
            assert f"python -m kava_trainer {name}" in capsys.readouterr().out


def test_the_help_of_commands_imports_nothing_heavy():
    code = "import sys\nfrom kava_trainer.cli import main\ntry: main(['{}', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    for name in ("doctor", "evaluate"):
        assert subprocess.run([sys.executable, "-c", code.format(name)], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.slow  # test_help has a shorter one
def test_a_command_says_nothing_of_what_libraries_log_on_import():
    command = [sys.executable, "-m", "kava_trainer", "explain", "mercator_weight"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mercator_weight = 3.0" in result.stdout


class Extension(enum.Enum):
    """Stands for one that torchao registers."""


@pytest.mark.parametrize(
    ("name", "message", "about", "shown"),
    [
        ("torchao", "Failed to load /a/_C.so: it is of another device", (), False),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version", (), False),
        ("torchao", "The weights are broken", (), True),
        ("bitsandbytes.backends.cpu.ops", "Failed to load %s", ("gemm from kernels-community: no 'kernels'",), False),
        ("bitsandbytes.backends.cpu.ops", "The weights are broken", (), True),
        ("torch.utils._pytree", "%s is an Enum subclass and is now natively supported", (Extension,), False),
        ("torch.utils._pytree", "%s is an Enum subclass and is now natively supported", (signal.Signals,), True),
    ],
)
def test_nothing_else_that_the_libraries_log_is_left_out(monkeypatch, name, message, about, shown):
    monkeypatch.setattr(Extension, "__module__", "torchao.somewhere")
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, message, about, None)
    assert bool(logging.getLogger(name).filter(record)) is shown


@pytest.mark.parametrize(("code", "disconnects"), [(0, True), (143, True), (2, True), (1, False)])
def test_a_program_ends_its_connections_before_it_exits_unless_it_failed(monkeypatch, code, disconnects):
    done = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(distributed, "disconnect", lambda: done.append("disconnected"))
    with pytest.raises(SystemExit) as left:
        cli.exit_with(lambda: done.append("main") or code)
    assert left.value.code == code
    assert done == ["main", "disconnected"][: 1 + disconnects]


def test_ctrl_c_while_libraries_are_imported_is_told_and_needs_no_ranks(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "kava_trainer.utils.distributed")
    with pytest.raises(SystemExit) as left:
        cli.exit_with(interrupted)
    assert left.value.code == 130
    assert capsys.readouterr().err.startswith("Interrupted before the first step")
    assert "kava_trainer.utils.distributed" not in sys.modules


GOES_ON = """
import sys, time
from pathlib import Path
from kava_trainer.cli import exit_with

def main():
    for number in range(20_000):
        print("line", number)
        print("line", number, file=sys.stderr)
    Path(sys.argv[1]).write_text("to the end")
    return 3

exit_with(main)
"""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_work_goes_on_where_nobody_reads_what_it_prints(tmp_path, unbuffered):
    command = [sys.executable, *unbuffered, "-c", GOES_ON, str(tmp_path / "file")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "file").read_text() == "to the end"


@pytest.mark.parametrize("argv", ["--help", "train --help", "explain", "explain --markdown", "push none me/x 2>&1"])
def test_a_reader_that_leaves_sees_no_traceback(argv):
    command = f"{{ {sys.executable} -m kava_trainer {argv}; echo code $? >&2; }} | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == f"code {2 if 'push' in argv else 0}\n"


def test_an_interruption_before_anything_was_saved_is_told(monkeypatch, capsys):
    def interrupted():
        raise Interrupted(signal.SIGTERM)

    assert cli.exit_code_of(interrupted) == 143
    assert capsys.readouterr().err.startswith("Interrupted before the first step")


def test_the_module_names_itself_in_commands(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "kava_trainer" / "__main__.py"), "train"])
    assert started_as() == ["-m", "kava_trainer", "train"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resume_command(["a.json"], "out/checkpoint-3") == (
        "accelerate launch -m kava_trainer train a.json --resume_from_checkpoint out/checkpoint-3"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(["a.json"], None) == (
        "python -m torch.distributed.run --nproc-per-node 2 -m kava_trainer train a.json"
    )


@pytest.mark.slow
def test_the_printed_command_resumes_a_launched_run_of_the_module(tmp_path):  # without launcher: test_requests
    options = {**SHORT, "max_train_samples": 640, "max_steps": 40, "logging_steps": 2, "output_dir": tmp_path / "out"}
    options |= {"run_control": "false", "max_length": 128, "evaluate_generation": "false"}
    options |= {"per_device_train_batch_size": 8}
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "-m", "kava_trainer", "train", RECIPE, *words(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[Step 0002]"):
            (trainer,) = psutil.Process(process.pid).children()
            trainer.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 1  # that of accelerate for any code but 0
    argv = shlex.split(re.search(r"^Resume with: (.*)$", "".join(lines), re.M).group(1))
    assert argv[:5] == ["accelerate", "launch", "-m", "kava_trainer", "train"]
    result = subprocess.run([*launcher, *argv[2:]], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "Resuming from" in result.stdout
    assert summary_of(tmp_path / "out")["global_step"] == 40


def test_the_cache_is_filled_for_a_later_run_and_nothing_else_is_left(tmp_path, capsys):
    options = {**TINY, "teacher_cache_dir": tmp_path / "cache", "output_dir": tmp_path / "new" / "out"}
    options["evaluate_generation"] = "false"
    assert main(["cache", RECIPE, *words(options)]) == 0
    assert "72 of 72 examples are to be written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert main(["cache", RECIPE, *words(options)]) == 0
    assert "0 of 72 examples are to be written" in capsys.readouterr().out
    assert main(["train", RECIPE, *words(options)]) == 0
    assert "0 of 72 examples are to be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "teacher_cache_dir is missing, so there is no cache to fill; write the name of a folder."),
        ({"mercator_weight": 0, "teacher_cache_dir": "cache"}, "No loss term reads the teacher's states"),
    ],
)
def test_a_cache_of_nothing_is_refused(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", RECIPE, *words({**TINY, "output_dir": "out", **changes})]) == 2
    assert f"Error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_the_filling_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise Interrupted(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_caches", interrupted)
        options = {**TINY, "teacher_cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out"}
        assert main(["cache", RECIPE, *words(options)]) == 138
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a run, and its options."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    options = {**TINY, "max_steps": 3, "output_dir": folder}
    assert main(["train", RECIPE, *words(options)]) == 0
    return folder, options


def test_a_finished_run_is_measured_as_it_measured_itself(tmp_path, capsys, finished):
    folder, _ = finished
    files = {str(path) for path in folder.rglob("*")}
    output = tmp_path / "figures.json"
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--output", str(output), "--use_cpu"]) == 0
    shown = capsys.readouterr().out
    summary, written = summary_of(folder)["evaluation"], json.loads(output.read_text())
    assert written["student"] == str(folder / "final_student")
    for own, theirs in (("teacher", "teacher"), ("student", "student_after")):
        for name, value in summary[theirs].items():
            assert written["evaluation"][own][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    table = figures_of(shown, "In the run's summary")
    assert set(table) == {"Teacher", "Student before", "Student after"}
    assert figures_of(shown, "Measured")["Student"] == table["Student after"]
    assert {str(path) for path in folder.rglob("*")} == files
    output.write_text(output.read_text().replace('"student"', '"student" '))
    assert main(["evaluate", str(folder), "--output", str(output), "--use_cpu"]) == 0  # its own file is replaced
    assert json.loads(output.read_text()) == written
    assert '"student" ' not in output.read_text()


def test_arguments_are_measured_before_the_training(tmp_path, capsys, finished):
    folder, options = finished
    capsys.readouterr()
    assert main(["evaluate", RECIPE, *words(options)]) == 0
    shown = capsys.readouterr().out
    before = f"{summary_of(folder)['evaluation']['student_before']['cross_entropy']:.4f}"
    assert figures_of(shown, "Measured")["Student"] == before
    assert f"For the finished one add --student_model_name_or_path {folder / 'final_student'}" in shown
    options = {**options, "student_model_name_or_path": folder / "final_student", "evaluate_generation": "false"}
    assert main(["evaluate", RECIPE, *words(options)]) == 0
    shown = capsys.readouterr().out
    assert "For the finished one" not in shown
    assert not re.search(r"exact match +\d", shown)
    assert figures_of(shown, "Measured")["Student"] != before


def test_an_exported_adapter_is_measured_on_its_base(tmp_path, capsys, finished):
    folder, _ = finished
    options = {**QUICKSTART, **TINY, **LORA, "use_peft": "true", "merge_adapter": "false", "learning_rate": 0.1}
    options |= {"student_model_name_or_path": folder / "final_student", "output_dir": tmp_path / "out", "max_steps": 2}
    assert main(["train", *words(options)]) == 0
    assert (tmp_path / "out" / "final_student" / "adapter_config.json").is_file()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    table = figures_of(shown, "In the run's summary")
    assert figures_of(shown, "Measured")["Student"] == table["Student after"] != table["Student before"]


def test_what_cannot_be_measured_is_refused(tmp_path, capsys, finished):
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty")]) == 2
    assert "has no run_summary.json; name the output_dir of a run that has ended." in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    content = {**summary_of(finished[0]), "status": "interrupted", "final_checksums": None}
    content["arguments"] |= {"output_dir": str(tmp_path / "broken"), "final_dir": str(tmp_path / "broken")}
    (tmp_path / "broken" / "run_summary.json").write_text(json.dumps(content))
    assert main(["evaluate", str(tmp_path / "broken")]) == 2
    assert "was interrupted at step 3, before its student was finished. Go on" in capsys.readouterr().err
    data = write_dataset(tmp_path, '{"text": "a b c"}\n')
    assert main(["evaluate", *words({**QUICKSTART, **TINY, "dataset_name": data, "output_dir": tmp_path / "out"})]) == 2
    assert "has no held-out examples to measure on; name a dataset_test_split" in capsys.readouterr().err
    assert main(["evaluate", RECIPE, "--output", str(tmp_path / "gone" / "x.json"), *words(TINY)]) == 2
    assert "x.json cannot be written; name a file in a folder that exists." in capsys.readouterr().err
    (tmp_path / "notes.json").write_text('{"evaluation": "my own"}')
    (tmp_path / "link.json").symlink_to(tmp_path / "gone.json")
    for name, said in (
        ("notes.json", "is there already, and this command did not write it"),
        ("link.json", "is no plain file"),
        ("/dev/null", "is no plain file"),
    ):
        assert main(["evaluate", str(finished[0]), "--output", str(tmp_path / name)]) == 2
        assert f"{name} {said}" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"evaluation": "my own"}'
    assert not (tmp_path / "out").exists()
