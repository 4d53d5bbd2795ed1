"""The evaluation where users look for it: the metric in `evaluate`, and the student in lm-evaluation-harness."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers.places import ROOT

from kava_trainer.evaluation.final_answer_match.final_answer_match import is_exact_match
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.quickstart.export import main
from kava_trainer.quickstart.problems import generate_problems

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
TASKS = ROOT / "docs" / "lm_eval"


def block(kind):
    (code,) = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return code


def offline(folder):
    return {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_the_metric_loads_offline_and_computes_what_the_page_says(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=tmp_path, env=offline(tmp_path), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.strip().splitlines()[-1]
    assert f"prints `{printed}`" in PAGE
    assert is_exact_match("5+13=18\n#### 18.0", "#### 18")
    assert not is_exact_match("It costs $1,800", "#### 1850")


def test_the_held_out_problems_are_written_as_they_are_evaluated(capsys):
    main(["--count", "3"])
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written == generate_problems(500, "test")[:3]


def test_the_tasks_read_what_the_export_writes():
    task = yaml.safe_load((TASKS / "kava_quickstart.yaml").read_text())
    assert f"> {task['dataset_kwargs']['data_files']['test']}\n" in block("bash needs-harness")
    assert f"--tasks {task['task']} " in block("bash needs-harness")
    problem = generate_problems(1, "test")[0]
    found = re.search(task["filter_list"][0]["filter"][0]["regex_pattern"], problem["answer"])
    assert found[1] == problem["answer"].split("####")[1].strip()
    local = yaml.safe_load((TASKS / "kava_gsm8k_local.yaml").read_text())
    assert (TASKS / local["include"]).exists()
    assert f"--tasks {local['task']}`" in PAGE


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_the_harness_runs_the_documented_command(tmp_path):
    """On the quickstart's teacher, which solves every problem, and on few of them."""
    (tmp_path / "checkpoints").mkdir()
    changes = {
        "checkpoints/quickstart/final_student": str(TEACHER_FOLDER),
        "docs/lm_eval": str(TASKS),
        "--count 200": "--count 20",
        "lm_eval --model": f"{sys.executable} -m lm_eval --output_path results --model",
        "python -m kava": f"{sys.executable} -m kava",
    }
    command = block("bash needs-harness")
    for old, new in changes.items():
        assert old in command
        command = command.replace(old, new)
    ran = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, env=offline(tmp_path / "hf"), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["kava_quickstart"]["exact_match,final-answer"] == 1.0
