"""The commands of the documents: the same in both languages, and all of them parse."""

import csv
import json
import re
import shlex
import sys
import warnings

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM

import run_kava
from kava_trainer import optimizers
from kava_trainer.parsing import parse_arguments

sys.path.insert(0, str(ROOT / "benchmarks"))
import bf16_table
import effectiveness
import performance
import scaling

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.zh-CN.md"))


def blocks(text, language):
    return [block.strip() for block in re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.M | re.S)]


COMMANDS = [line for block in blocks(README, "bash") for line in block.replace("\\\n", " ").splitlines()]
RUNS = [command.split("run_kava.py ", 1)[1] for command in COMMANDS if "run_kava.py " in command]


@pytest.mark.parametrize("language", ["python", "json"])
def test_both_languages_show_the_same_code(language):
    assert blocks(README, language) == blocks(CHINESE, language)


def test_the_code_of_the_library_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kava_trainer").symlink_to(ROOT / "kava_trainer")
    (code,) = (block for block in blocks(README, "python") if "KavaTrainer(" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "distilled").config.num_hidden_layers == 3


def test_both_languages_start_with_the_same_two_commands():
    assert blocks(README, "bash")[0] == blocks(CHINESE, "bash")[0]
    assert [line.split()[0] for line in blocks(README, "bash")[0].splitlines()] == ["pip", "pip"]


def test_every_run_command_of_the_readme_names_right_arguments(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(optimizers, "is_torchao_available", lambda: False)
    assert len(RUNS) == 3
    for arguments in RUNS:
        assert parse_arguments([*shlex.split(arguments), "--use_cpu"])


FEWER = "--max_steps 1 --max_train_samples 64 --max_eval_samples 4 --generation_max_new_tokens 8"


@pytest.mark.parametrize("fewer", [FEWER, pytest.param("", marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize("recipe", ["seed_mercator_only", "gsm8k_qwen2.5_8gb"])
def test_the_recipes_run_as_the_readme_writes_them_without_torchao(tmp_path, monkeypatch, capsys, recipe, fewer):
    monkeypatch.setattr(optimizers, "is_torchao_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training_args").symlink_to(ROOT / "training_args")
    (command,) = (run for run in RUNS if run.startswith(f"training_args/{recipe}.json"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_checkpointing", category=FutureWarning)
        assert run_kava.main([*shlex.split(command), *shlex.split(fewer)]) == 0
    shown = capsys.readouterr().out
    assert "rounds away" not in shown
    if recipe == "seed_mercator_only" and not fewer:
        assert re.search(r"^Alignment: CosSim 0\.9\d\d\d Collapsed", shown, re.M)


def test_both_languages_show_the_commands_of_the_quickstart():
    assert blocks(CHINESE, "bash") == blocks(README, "bash")[:2]


def test_the_json_of_the_readme_is_a_right_request(tmp_path):
    (tmp_path / "args.json").write_text(blocks(README, "json")[0])
    assert json.loads(blocks(README, "json")[0])
    assert parse_arguments([str(tmp_path / "args.json"), "--use_cpu"])


def test_every_link_to_a_file_leads_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_tables_of_effectiveness_are_those_of_its_measurements():
    text, rows = effectiveness.DOCUMENT.read_text(), effectiveness.read_rows(effectiveness.CSV_FILE)
    assert effectiveness.document(text, rows) == text
    assert len(rows) > 40


def test_the_tables_of_performance_are_those_of_its_measurements():
    text = performance.DOCUMENT.read_text(encoding="utf-8")
    assert performance.document(text) == text
    assert "step-real-hidden" in text


def test_the_tables_of_scaling_are_those_of_its_runs_and_of_its_arithmetic():
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.document(text) == text
    with scaling.MATRIX.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["outcome"].startswith("failed")]
    assert {row["resume"] for row in rows if row["outcome"] == "run"} == {"resumed"}


def test_the_memory_of_a_stream_is_flat_over_a_million_examples():
    rows = performance.read("streaming-memory")
    memory = {int(row["examples"]): float(row["resident_mb"]) for row in rows}
    assert max(memory) >= 1_000_000
    settled = [size for examples, size in memory.items() if examples >= 100_000]
    assert max(settled) < 1.1 * min(settled)


def test_the_tables_of_numbers_are_those_of_its_measurements():
    text = bf16_table.DOCUMENT.read_text(encoding="utf-8")
    assert bf16_table.document(text) == text


def test_every_recipe_saves_into_a_folder_of_its_own():
    for path in ROOT.glob("training_args/*.json"):
        assert json.loads(path.read_text())["output_dir"] == f"checkpoints/{path.stem}"
