"""Every command of the documents is run, in the order in which a reader meets them, or marked with what it needs."""

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers.documents import DOCUMENTS, MARKS, Block, blocks
from helpers.places import ROOT

import run_kava
from kava_trainer import cli
from kava_trainer.config import optimizer_names
from kava_trainer.config.parser import parse_arguments

README, QUICKSTART, CHINESE, TROUBLESHOOTING = (
    ROOT / name for name in ("README.md", "docs/quickstart.md", "docs/quickstart.zh-CN.md", "docs/troubleshooting.md")
)
FEWER = [
    *("--max_steps", "1", "--max_train_samples", "64", "--max_eval_samples", "4"),
    *("--evaluate_generation", "false", "--run_control", "false", "--use_cpu", "true"),
]
SAME_ELSEWHERE = (README, CHINESE)
"""Documents with no block that quickstart.md has not: a test below holds that."""
LONG = ("numbers.md", "quickstart.md")
"""Their walks take half a minute."""
RUN = ("bash", "python", "json")
WALKS = [
    path for path in DOCUMENTS if path not in SAME_ELSEWHERE and any(not block.marks for block in blocks(path, *RUN))
]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What a reader has before them: a checkout to run in, on a machine without torchao."""
    for name in ("run_kava.py", "training_args", "kava_trainer"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizer_names, "is_torchao_available", lambda: False)
    return tmp_path


PROCESSES = "python -m torch.distributed.run"
"""Only parsed by default: to start processes takes as long as all the rest. A slow test runs them."""


def runner(words: list[str]):
    """What runs a command within the tests, shortened; None for a program that the tests do not have."""
    commands = {
        "accelerate launch run_kava.py": lambda rest: run_kava.main([*rest, *FEWER]),
        "python run_kava.py": lambda rest: run_kava.main([*rest, *FEWER]),
        "python -m kava_trainer train": lambda rest: cli.main(["train", *rest, *FEWER]),
        "python -m kava_trainer cache": lambda rest: cli.main(["cache", *rest, *FEWER]),
        "python -m kava_trainer rollouts": lambda rest: cli.main(["rollouts", *rest, *FEWER]),
        "python -m kava_trainer": cli.main,
        PROCESSES: lambda rest: 0 if parse_arguments(rest[rest.index("run_kava.py") + 1 :]) else 1,
    }
    for start, run in commands.items():
        length = len(start.split())
        if words[:length] == start.split():
            return lambda: run(words[length:])
    return None


def run_block(block: Block) -> None:
    if block.language == "python":
        exec(compile(block.text, "a block of python", "exec"), {"__name__": "__main__"})
    elif block.language == "json":
        Path("arguments.json").write_text(block.text)
        assert parse_arguments(["arguments.json", "--use_cpu", "true"])
    else:
        for words in block.commands:
            if "quickstart" in block.marks and words[0] in ("pip", "pytest"):
                continue
            assert (run := runner(words)) is not None, (
                f"No test runs `{' '.join(words)}`; write what it needs behind ```bash: {', '.join(MARKS)}."
            )
            assert run() == 0, " ".join(words)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.name in LONG else []) for path in WALKS],
    ids=lambda path: path.name,
)
def test_the_blocks_of_a_document_run_one_after_the_other(desk, capfd, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_checkpointing", category=FutureWarning)
        for block in blocks(path, *RUN):
            if not block.marks - {"quickstart"}:
                run_block(block)
    assert "rounds away" not in capfd.readouterr().out


def commands_with(part: str) -> list[list[str]]:
    """The commands that no mark keeps from being run, with a word in them."""
    found = [words for path in WALKS for block in blocks(path, "bash") if not block.marks for words in block.commands]
    return [words for words in found if part in words]


@pytest.mark.slow
def test_the_commands_for_several_processes_run(desk):
    (command,) = commands_with("torch.distributed.run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *command[1:], *FEWER]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "processes: 2, each with the whole student (DDP)" in result.stdout


@pytest.mark.slow
@pytest.mark.exhaustive  # the walks run the same commands with fewer steps
@pytest.mark.parametrize("recipe", ["seed_mercator_only", "gsm8k_qwen2.5_8gb"])
def test_the_recipes_run_whole_as_they_stand_without_torchao(desk, capsys, recipe):
    (command,) = commands_with(f"training_args/{recipe}.json")
    assert run_kava.main(command[command.index("run_kava.py") + 1 :]) == 0
    shown = capsys.readouterr().out
    assert "rounds away" not in shown
    if recipe == "seed_mercator_only":
        assert re.search(r"^Alignment: CosSim 0\.9\d\d\d Collapsed", shown, re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_has_a_known_mark_or_none(path):
    for block in blocks(path):
        assert block.marks <= MARKS.keys(), f"{path.name}: {set(block.marks)}; known are {', '.join(MARKS)}"
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "bash":
            assert block.commands


def test_what_the_tests_leave_to_the_whole_check_is_done_there():
    (two,) = (block for block in blocks(README, "bash") if "quickstart" in block.marks)
    assert [line.split()[:2] for line in two.text.splitlines()] == [["pip", "install"]] * 2
    done = (ROOT / ".ci" / "run").read_text() + two.text
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            if "quickstart" in block.marks:
                assert block == two
            if "ci" in block.marks:
                assert all(words[0] in done for words in block.commands)


def test_both_languages_have_the_same_blocks_in_the_same_order():
    assert blocks(CHINESE) == blocks(QUICKSTART)


def test_the_readme_has_no_code_that_the_quickstart_has_not():
    code = blocks(README, *RUN)
    assert code[0] in blocks(QUICKSTART)
    assert set(code) <= {block for path in DOCUMENTS if path != README for block in blocks(path)}


def sentences(text: str) -> list[str]:
    """The sentences of a text; `\0` stands for a value that may bring some along."""
    parts = re.split(r"(?<=[.;:])\0? ", text)
    return parts + [part[2:] for part in parts if part.startswith("\0 ")]


def said_in_the_code() -> list[re.Pattern]:
    """Every sentence of every text in the package, with something for each value that is put in."""
    texts = set()
    for path in (ROOT / "kava_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"\{\w*\}", "\0", node.value))
    found = {sentence.strip() for text in texts for sentence in sentences(text)}
    spoken = [sentence for sentence in found if len(re.sub(r"\W", "", sentence)) >= 8]
    return [re.compile(".*".join(map(re.escape, sentence.split("\0"))) + r"\.?", re.S) for sentence in spoken]


QUOTES = [
    line for block in blocks(TROUBLESHOOTING, "text") if "message" in block.marks for line in block.text.splitlines()
]


def unsaid(quote: str, said: list[re.Pattern]) -> list[str]:
    """The sentences of a quoted message that are nowhere in the code."""
    own = [part for part in sentences(quote.replace("...", "\1")) if len(re.sub(r"\W", "", part)) >= 8]
    return [part.replace("\1", "...") for part in own if not any(pattern.fullmatch(part) for pattern in said)]


def test_every_message_that_is_quoted_is_said():
    said = said_in_the_code()
    assert len(QUOTES) > 30
    assert not {quote: missing for quote in QUOTES if (missing := unsaid(quote, said))}
    assert unsaid("CosSim is ..., below 0.95. The moon is made of cheese.", said) == ["The moon is made of cheese."]
