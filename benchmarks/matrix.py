"""What runs on what: every cell of the support matrix is a run of tiny models, an interruption and two resumed runs.

    python benchmarks/matrix.py --out benchmarks/results/matrix.csv

On a CPU, with gloo between the processes; FSDP2 with accelerate's restriction to accelerators set aside, which is all
that keeps it from CPUs. A cell says `run` where the run ended well, with the wrapper that it asked for; `resumed` where
a run that goes on from its second checkpoint ends with the very same weights, bit for bit; and `goes on` where one that
goes on there with another number of processes ends with the same weights up to rounding. Otherwise it holds the message
that refused it.
"""

import argparse
import csv
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from helpers import fault_child, sharded_run  # noqa: E402
from helpers.data import write_problems  # noqa: E402
from helpers.processes import Run  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import set_seed  # noqa: E402

from kava_trainer.config import launcher  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.distillation.projector_files import load_projectors  # noqa: E402
from kava_trainer.models.student import load_student  # noqa: E402
from kava_trainer.models.teacher import load_teacher  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402

COLUMNS = ("engine", "ranks", "student", "precision", "teacher", "outcome", "resume", "elsewhere", "apart")
ENGINES = {"one process": 1, "DDP": 2, "FSDP2": 2, "DeepSpeed": 2}
ELSEWHERE = {"DDP": 4, "FSDP2": 4}
"""With how many processes a run goes on that began with two."""
STUDENTS = {"full": {}, "LoRA": {"use_peft": True, "lora_r": 4, "merge_adapter": True}}
PRECISIONS = {"float32": {}, "bf16 mixed": {"bf16": True}}
TEACHERS = {
    "replicated": {},
    "8-bit": {"teacher_quantization": "8bit"},
    "4-bit": {"teacher_quantization": "4bit"},
    "sharded": {"teacher_sharding": "fsdp"},
    "cached": {"teacher_cache_dir": "cache"},
}
CHANGES = {"max_steps": 4, "eval_strategy": "no", "save_steps": 2, "save_total_limit": 3}
WRAPPERS = {"one process": "DistillationModel", "DDP": "DistributedDataParallel", "FSDP2": "FSDPDistillationModel"}
STEP_BATCHES = 4
"""Micro-batches of an optimizer step over all processes, of two examples each."""
APART = 0.1
"""How far students may be `apart` where processes add up in another order; Adam blows small gradients up."""


def launch(engine: str, folder: str, data: str, changes: dict[str, Any]) -> int:
    """One rank of one run, which also says what wraps the model."""
    finish = KavaTrainer.save_finals

    def told(self: KavaTrainer, *args: Any) -> Any:
        print(f"wrapper: {type(self.model_wrapped).__name__}, ranks: {self.args.world_size}", flush=True)
        return finish(self, *args)

    with mock.patch.object(KavaTrainer, "save_finals", told):
        if engine == "FSDP2":
            return sharded_run.run(folder, data, changes)
        asked = {"ACCELERATE_USE_DEEPSPEED": "true"} if engine == "DeepSpeed" else {}
        with mock.patch.dict(os.environ, asked), mock.patch.object(launcher, "SHARDING_DEVICES", {"cpu"}):
            return fault_child.run(folder, data, changes)


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    """All weights of the final student and projector."""
    files = sorted((out / "final_student").glob("*.safetensors"))
    tensors = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return tensors | load_projectors(out / "final_projector.pth").state_dict()


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """How far the students of two runs are apart, for how far the second one has come from its start."""
    began = first_student()
    pairs = [(found[name], expected[name], began[name.partition(":")[2]]) for name in expected if ":" in name]
    square = sum((ours - theirs).double().square().sum() for ours, theirs, _ in pairs)
    moved = sum((theirs - start).double().square().sum() for _, theirs, start in pairs)
    return float((square / moved).sqrt())


@cache
def first_student() -> dict[str, torch.Tensor]:
    """The weights that every run begins with."""
    arguments = parse_arguments(fault_child.words("unused", "quickstart"))
    set_seed(arguments.training.seed)
    return load_student(arguments.model, load_teacher(arguments.model, torch.device("cpu"))).state_dict()


def are_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are the same, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], own) for name, own in expected.items())


def start(engine: str, ranks: int, changes: dict[str, Any], folder: Path, data: str) -> Run:
    """Start or go on with the run of a cell, whose steps have the same examples with any number of processes."""
    split = {"gradient_accumulation_steps": STEP_BATCHES // ranks}
    return Run(launch, folder / f"logs{ranks}", engine, str(folder), data, changes | split, ranks=ranks)


def said_of(run: Run, codes: list[int], folder: Path) -> str:
    """Why a run did not end well, and whether it was refused before anything was done."""
    lines = [line for line in run.output().splitlines() if line.startswith("Error: ")]
    refused = set(codes) == {2} and not (folder / "out" / "final_student").exists()
    return ("refused: " if refused else "failed: ") + (lines[0][7:] if lines else f"exit codes {codes}")


def cell(engine: str, changes: dict[str, Any], folder: Path, data: str) -> tuple[str, str]:
    """The outcome of one cell, and of resuming it."""
    return cell_of(engine, changes, folder, data, elsewhere={})[:2]


def cell_of(
    engine: str, changes: dict[str, Any], folder: Path, data: str, elsewhere: Mapping[str, int] = ELSEWHERE
) -> tuple[str, str, str, str]:
    """The outcome of one cell, of resuming it, and of going on with other processes; how far these are apart."""
    ranks, out = ENGINES[engine], folder / "out"
    run = start(engine, ranks, changes, folder, data)
    codes = run.wait(300)
    if codes != [0] * ranks:
        return said_of(run, codes, folder), "", "", ""
    if f"wrapper: {WRAPPERS[engine]}, ranks: {ranks}" not in run.output():
        return "failed: it did not run as it was asked to", "", "", ""
    expected, ends = tensors_of(out), {}
    for number in (ranks, *([elsewhere[engine]] if engine in elsewhere else [])):
        ends[number] = _resumed(engine, number, changes, folder, data)
    again = ends[ranks]
    resume = again if isinstance(again, str) else "resumed" if are_equal(again, expected) else "other weights"
    if engine not in elsewhere:
        return "run", resume, "", ""
    found = ends[elsewhere[engine]]
    if isinstance(found, str):
        return "run", resume, found, ""
    far = apart(found, expected)
    return "run", resume, "goes on" if far <= APART else "other weights", f"{far:.1e}"


def _resumed(
    engine: str, ranks: int, changes: dict[str, Any], folder: Path, data: str
) -> dict[str, torch.Tensor] | str:
    """The weights of a run that goes on from the second checkpoint with so many processes; else what came of it."""
    out = folder / "out"
    for path in (out / "final_student", out / "checkpoint-4"):
        shutil.rmtree(path, ignore_errors=True)
    (out / "final_projector.pth").unlink(missing_ok=True)
    run = start(engine, ranks, changes, folder, data)
    codes = run.wait(300)
    if codes != [0] * ranks:
        return said_of(run, codes, folder)
    return tensors_of(out) if f"Resuming from {out / 'checkpoint-2'}." in run.output() else "not resumed"


def cells(engines: list[str], teachers: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the CSV file."""
    with tempfile.TemporaryDirectory() as scratch:
        data = str(write_problems(Path(scratch) / "data.jsonl"))
        for number, place in enumerate(itertools.product(engines, STUDENTS, PRECISIONS, teachers)):
            engine, student, precision, teacher = place
            folder = Path(scratch) / str(number)
            folder.mkdir()
            asked = dict(TEACHERS[teacher])
            if "teacher_cache_dir" in asked:
                asked["teacher_cache_dir"] = str(folder / asked["teacher_cache_dir"])
            changes = CHANGES | STUDENTS[student] | PRECISIONS[precision] | asked
            found = cell_of(engine, changes, folder, data)
            shutil.rmtree(folder)
            values = (engine, ENGINES[engine], student, precision, teacher, *found)
            print(*values, sep=" | ", flush=True)
            yield dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Run all cells and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--teachers", nargs="*", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in cells(arguments.engines, arguments.teachers):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
