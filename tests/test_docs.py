"""The commands of the documents: the same in both languages, and all of them parse."""

import json
import re
import shlex

import pytest
from conftest import ROOT

from kava_trainer.parsing import parse_arguments

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.zh-CN.md"))


def blocks(text, language):
    return [block.strip() for block in re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.M | re.S)]


@pytest.mark.parametrize("language", ["python", "json"])
def test_both_languages_show_the_same_code(language):
    assert blocks(README, language) == blocks(CHINESE, language)


def test_both_languages_start_with_the_same_two_commands():
    assert blocks(README, "bash")[0] == blocks(CHINESE, "bash")[0]
    assert [line.split()[0] for line in blocks(README, "bash")[0].splitlines()] == ["pip", "pip"]


def test_every_run_command_of_the_readme_names_right_arguments(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks(README, "bash") for line in block.replace("\\\n", " ").splitlines()]
    runs = [command.split("run_kava.py ", 1)[1] for command in commands if "run_kava.py " in command]
    assert len(runs) == 2
    for arguments in runs:
        assert parse_arguments([*shlex.split(arguments), "--use_cpu"])


def test_the_json_of_the_readme_is_a_right_request(tmp_path):
    (tmp_path / "args.json").write_text(blocks(README, "json")[0])
    assert json.loads(blocks(README, "json")[0])
    assert parse_arguments([str(tmp_path / "args.json"), "--use_cpu"])
