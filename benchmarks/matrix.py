"""What runs on what: every cell of the support matrix is a run, an interruption and a resumed run of tiny models.

    python benchmarks/matrix.py --out benchmarks/results/matrix.csv

On a CPU, with gloo between the processes; FSDP2 with accelerate's restriction to accelerators set aside, which is all
that keeps it from CPUs. A cell says `run` where the run ended well, with the wrapper that it asked for, and `resumed`
where a run that goes on from its second checkpoint ends with the very same weights, bit for bit. Otherwise it holds the
message that refused it.
"""

import argparse
import csv
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

from helpers import fault_child, sharded_run  # noqa: E402
from helpers.data import write_problems  # noqa: E402
from helpers.hashes import state_hash  # noqa: E402
from helpers.processes import Run  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from kava_trainer.distillation.projector_files import load_projectors  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402

COLUMNS = ("engine", "ranks", "student", "teacher", "source", "outcome", "resume")
ENGINES = {"one process": 1, "DDP": 2, "FSDP2": 2, "DeepSpeed": 2}
STUDENTS = {"full": {}, "LoRA": {"use_peft": True, "lora_r": 4, "merge_adapter": True}}
TEACHERS = {
    "bf16": {"teacher_dtype": "bfloat16"},
    "8-bit": {"teacher_quantization": "8bit"},
    "4-bit": {"teacher_quantization": "4bit"},
}
CHANGES = {"max_steps": 4, "eval_strategy": "no", "save_steps": 2, "save_total_limit": 3}
WRAPPERS = {"one process": "DistillationModel", "DDP": "DistributedDataParallel", "FSDP2": "FSDPDistillationModel"}


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
        with mock.patch.dict(os.environ, asked):
            return fault_child.run(folder, data, changes)


def digest(out: Path) -> str:
    """Of all weights of the final student and projector."""
    files = sorted((out / "final_student").glob("*.safetensors"))
    tensors = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    tensors |= load_projectors(out / "final_projector.pth").state_dict()
    return state_hash(tensors)


def cell(engine: str, changes: dict[str, Any], folder: Path, data: str) -> tuple[str, str]:
    """The outcome of one cell, and of resuming it."""
    ranks = ENGINES[engine]
    run = Run(launch, folder / "logs", engine, str(folder), data, changes, ranks=ranks)
    codes = run.wait(300)
    if codes != [0] * ranks:
        lines = [line for line in run.output().splitlines() if line.startswith("Error: ")]
        refused = set(codes) == {2} and not (folder / "out" / "final_student").exists()
        return ("refused: " if refused else "failed: ") + (lines[0][7:] if lines else f"exit codes {codes}"), ""
    if f"wrapper: {WRAPPERS[engine]}, ranks: {ranks}" not in run.output():
        return "failed: it did not run as it was asked to", ""
    expected, out = digest(folder / "out"), folder / "out"
    for name in ("final_student", "checkpoint-4"):
        (out / name).rename(folder / f"first_{name}")
    (out / "final_projector.pth").unlink()
    again = Run(launch, folder / "logs", engine, str(folder), data, changes, ranks=ranks)
    if again.wait(300) != [0] * ranks:
        return "run", "failed"
    if f"Resuming from {out / 'checkpoint-2'}." not in again.output():
        return "run", "not resumed"
    return "run", "resumed" if digest(out) == expected else "other weights"


def cells(engines: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the CSV file."""
    with tempfile.TemporaryDirectory() as scratch:
        data = str(write_problems(Path(scratch) / "data.jsonl"))
        places = itertools.product(engines, STUDENTS, TEACHERS, ("online", "cached"))
        for number, (engine, student, teacher, source) in enumerate(places):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            cache = {"teacher_cache_dir": str(folder / "cache")} if source == "cached" else {}
            changes = CHANGES | STUDENTS[student] | TEACHERS[teacher] | cache
            outcome, resume = cell(engine, changes, folder, data)
            row = dict(zip(COLUMNS, (engine, ENGINES[engine], student, teacher, source, outcome, resume), strict=True))
            print(*row.values(), sep=" | ", flush=True)
            yield row


def main() -> None:
    """Run all cells and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = list(cells(arguments.engines))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
