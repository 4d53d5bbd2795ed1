"""Command lines of short runs, and what these leave."""

import json
import os
import subprocess
import sys

from helpers.places import ROOT

MEMORY = {"teacher": 3_400_000, "student": 700_000, "projector": 200_000, "optimizer": 1_800_000, "micro-batch": 10**8}
"""About what `estimate_memory` says of the quickstart, for tests that are about something else: it takes a second."""

RECIPES = sorted(path.name for path in (ROOT / "training_args").glob("*.json"))

QUICKSTART = {
    "teacher_model_name_or_path": "quickstart",
    "student_model_name_or_path": "quickstart",
    "dataset_name": "quickstart",
    "teacher_quantization": "none",
    "gradient_accumulation_steps": 4,
}

SHORT = {
    "max_train_samples": 64,
    "max_eval_samples": 8,
    "max_steps": 3,
    "generation_max_new_tokens": 8,
    "use_cpu": True,
}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def launch(*argv, cwd=ROOT, timeout=600):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "run_kava.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout)


def summary_of(folder):
    return json.loads((folder / "run_summary.json").read_text())


ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
