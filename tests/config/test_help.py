"""What every argument is for, and that the document of it is the one that the code makes."""

import json
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version

import pytest
from helpers.argument_table import table
from helpers.places import ROOT
from transformers import TrainingArguments

from kava_trainer.cli import main
from kava_trainer.config import argument_table, help
from kava_trainer.config.alignment.teacher_arguments import SeveralTeachersArguments
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.help import INHERITED, NOTES, all_arguments, as_markdown, find_arguments, short_help
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.utils.errors import BadRequest

OWN = {field.name for owner in (ModelArguments, DataArguments) for field in fields(owner)}
OWN |= set(KavaTrainingArguments.__annotations__) | {field.name for field in fields(SeveralTeachersArguments)}


def test_the_document_is_what_the_code_says():
    assert (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8") == as_markdown(), (
        "run python -m kava_trainer explain --markdown > docs/arguments.md"
    )


MADE_OF = json.loads(argument_table.TABLE.read_text(encoding="utf-8"))["made_of"]
of_this_transformers = pytest.mark.skipif(
    MADE_OF["transformers"] != version("transformers"), reason="the table was made of another transformers"
)


@of_this_transformers
def test_the_table_that_explain_reads_is_what_the_code_says():
    assert argument_table.TABLE.read_text(encoding="utf-8") == table(), "run python tests/helpers/argument_table.py"
    assert all_arguments() == help.read_fields()


@of_this_transformers
def test_a_table_of_another_transformers_or_of_other_arguments_is_not_read(tmp_path, monkeypatch):
    assert argument_table.read_table() is not None
    with monkeypatch.context() as patch:
        patch.setattr(argument_table, "version", lambda name: "5.0")
        assert argument_table.read_table() is None
        assert all_arguments() == help.read_fields()
    for name in (*argument_table._SOURCES, argument_table.TABLE.name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((argument_table.TABLE.parent / name).read_bytes())
    monkeypatch.setattr(argument_table, "TABLE", tmp_path / argument_table.TABLE.name)
    assert argument_table.read_table() is not None
    source = (tmp_path / "data_arguments.py").read_text(encoding="utf-8")
    (tmp_path / "data_arguments.py").write_text(f"{source}\n\ndef another():\n    pass\n", encoding="utf-8")
    assert argument_table.read_table() is not None
    (tmp_path / "data_arguments.py").write_text(source.replace("Longest example", "Shortest example"), encoding="utf-8")
    assert argument_table.read_table() is None


@of_this_transformers
@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["explain", "mercator_weight", "adam_beta1"], 0),
        (["explain"], 0),
        (["explain", "xyzzy"], 2),
        (["train", "--help"], 0),
        (["push", "no/such/folder", "me/name"], 2),
        (["report", "no/such/folder"], 2),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(argv, code):
    program = (
        "import sys\nfrom kava_trainer.cli import main\ntry: code = main(sys.argv[1:])\n"
        "except SystemExit as ended: code = ended.code\n"
        "print([name for name in ('torch', 'datasets', 'accelerate') if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == f"[] {code}"


def test_every_argument_is_explained_and_own_ones_come_first():
    arguments = all_arguments()
    names = [argument.name for argument in arguments]
    assert len(set(names)) == len(names)
    assert {argument.name for argument in arguments if argument.group != INHERITED} == OWN
    assert set(names) == OWN | {field.name for field in fields(TrainingArguments) if field.init}
    assert names[: len(OWN)] == [argument.name for argument in arguments if argument.group != INHERITED]
    for argument in arguments:
        assert argument.effect, argument.name
        assert "\n" not in argument.effect


def test_the_notes_are_on_arguments_that_are_as_in_transformers():
    inherited = {argument.name: argument for argument in all_arguments() if argument.group == INHERITED}
    for name, (unit, effect) in NOTES.items():
        assert (inherited[name].unit, inherited[name].effect) == (unit, effect)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("max_length", "max_length = 512 tokens"),
        ("teacher-quantization", 'teacher_quantization = "none" (one of none, 8bit, 4bit)'),
        ("save_steps", "save_steps = 200 optimizer steps"),
        ("warmup_steps", "warmup_steps = 0 optimizer steps"),
        ("max_tokens_per_batch", "max_tokens_per_batch = null tokens"),
        ("projector_dropout", "projector_dropout = null share from 0 to below 1"),
        ("lora_modules_to_save", "lora_modules_to_save = []"),
    ],
)
def test_one_argument_is_told_with_default_and_unit(capsys, name, line):
    assert main(["explain", name]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == line
    assert shown[2].startswith("    ")


def test_a_part_of_names_finds_all_of_them():
    found = ["kd_weight", "kd_tokens", "kd_temperature", "kd_beta", "kd_schedule"]
    assert [argument.name for argument in find_arguments(["kd_"])] == found
    assert len(find_arguments(["kd_", "kd_beta"])) == 5


def test_an_unknown_name_is_refused_with_the_nearest_one(capsys):
    with pytest.raises(BadRequest, match=r"^There is no argument 'max_lenght'; did you mean 'max_length'\?$"):
        find_arguments(["max_lenght"])
    assert main(["explain", "max_lenght", "xyzzy"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: There is no argument 'max_lenght'; did you mean 'max_length'?",
        "There is no argument 'xyzzy'.",
    ]


def test_without_names_all_are_told_by_group(capsys):
    assert main(["explain"]) == 0
    shown = capsys.readouterr().out
    for group in ("Model", "Data", "Distillation", "Projector", "Training and output", "TrainingArguments"):
        assert shown.count(f"== {group}\n") == 1
    assert "\nlearning_rate = 5e-05\n    Learning rate of the student" in shown
    assert main(["explain", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown()


def test_help_has_one_line_for_each_own_argument_and_no_more(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    lines = short_help("python run_kava.py").splitlines()
    assert {line.split()[0].lstrip("-") for line in lines if line.startswith("  --")} == OWN
    assert len(lines) < len(OWN) + 25
    assert all(len(line) <= 120 for line in lines)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "\nProjector:\n" in shown
    assert "Every field of transformers.TrainingArguments works too" in shown
    assert "--adam_beta1" not in shown


def test_a_reader_that_goes_away_ends_it_quietly():
    command = f"{sys.executable} -m kava_trainer explain | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip()
    assert result.stderr == ""
