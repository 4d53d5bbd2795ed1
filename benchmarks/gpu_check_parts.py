"""The checks of `gpu_check.py`, one in each process: `python -m benchmarks.gpu_check_parts NAME cuda|cpu FOLDER`."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.processes import Run  # noqa: E402

import run_kava  # noqa: E402

RECIPE = ROOT / "training_args" / "gsm8k_qwen2.5_8gb.json"
FSDP_CONFIG = ROOT / "training_args" / "accelerate" / "fsdp2.yaml"
CAP, MOST = 8e9, 6.0e9
"""Bytes that the 8 GB recipe gets, and that it may take at its peak."""

TESTS = ("tests/runs_whole/test_devices.py",)
"""Trainings by tiny models, which run on the device that `KAVA_TEST_DEVICE` names."""

SHORT = {
    "max_steps": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_eval_samples": 8,
    "per_device_eval_batch_size": 8, "run_control": "false", "evaluate_generation": "false", "logging_steps": 1,
    "save_steps": 6, "report_to": "none", "plain_output": "true", "warmup_steps": 0, "generation_max_new_tokens": 8,
    "max_train_samples": 256,
}  # fmt: skip


class Missed(Exception):
    """A figure misses what was asked of it; the figures are its second argument."""


def words(options: Mapping[str, Any]) -> list[str]:
    """A command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Place:
    """The device of a check and a folder for it."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.on_gpu = device == "cuda"

    def argv(self, name: str, changes: Mapping[str, Any], arguments: str = "quickstart") -> list[str]:
        """The command line of a run into a folder of that name."""
        out = str(self.folder / name)
        options = {**SHORT, "output_dir": out, "final_dir": out, **({} if self.on_gpu else {"use_cpu": "true"})}
        return [arguments, *words({**options, **changes})]

    def run(self, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Run the quickstart to its end, and read its summary.

        On a CPU that is done by a process that has imported everything; one that has may not begin with CUDA.
        """
        if self.on_gpu:
            ended([sys.executable, str(ROOT / "run_kava.py"), *self.argv(name, changes)])
        elif (run := Run(run_kava.main, self.folder / f"{name}_log", self.argv(name, changes))).wait(600) != [0]:
            raise RuntimeError(last_lines(run.output()))
        return self.summary(name)

    def summary(self, name: str) -> dict[str, Any]:
        """What a run has left."""
        return json.loads((self.folder / name / "run_summary.json").read_text(encoding="utf-8"))

    def losses(self, name: str, changes: Mapping[str, Any]) -> list[float]:
        """Run it, and read the loss of each step."""
        self.run(name, changes)
        (state,) = (self.folder / name).glob("checkpoint-6/trainer_state.json")
        return [line["loss"] for line in json.loads(state.read_text())["log_history"] if "loss" in line]


def last_lines(said: str) -> str:
    """The end of what a process said."""
    return " / ".join(line for line in said.replace("\r", "\n").splitlines()[-4:] if line.strip())


def ended(command: list[str]) -> str:
    """Run a command to its end. Raises `RuntimeError` with the last lines of what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {last_lines(said)}")
    return said


def furthest(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference between the losses of two runs."""
    return max(abs(own - other) / abs(other) for own, other in zip(losses, expected, strict=True))


def alike(figures: dict[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """The figures, if none is above what it may be. Raises `Missed`."""
    if far := [name for name, value in figures.items() if not value <= most[name]]:
        raise Missed("; ".join(f"{name} may be {most[name]:g} at most" for name in far), figures)
    return figures


def tests(place: Place) -> dict[str, Any]:
    """The tests of what runs on a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "KAVA_TEST_DEVICE": place.device}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    print(done.stdout, done.stderr)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    names = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.M)
    if names:
        raise Missed(f"failed: {', '.join(names[:12])}", counts)
    if done.returncode:
        raise RuntimeError(last_lines(done.stdout + done.stderr))
    return counts


def quickstart(place: Place) -> dict[str, Any]:
    """The quickstart; on a CPU 60 steps of it, which its verdict is not asked of."""
    whole = {
        "max_steps": 600, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_eval_samples": 200,
        "per_device_eval_batch_size": 100, "run_control": "true", "evaluate_generation": "true", "logging_steps": 50,
        "save_steps": 300, "warmup_steps": 50, "generation_max_new_tokens": 256,
    }  # fmt: skip
    began = time.monotonic()
    summary = place.run("quickstart", whole if place.on_gpu else {"max_steps": 60, "save_steps": 60})
    after = summary["evaluation"]["student_after"]
    figures = {
        "seconds": time.monotonic() - began, "exact_match": after["exact_match"],
        "cos_sim": summary["final"]["cos_sim"], "tokens_per_second": summary["throughput"]["tokens_per_second"],
        "success": summary["verdict"]["success"],
    }  # fmt: skip
    if place.on_gpu and not summary["verdict"]["success"]:
        raise Missed("; ".join(summary["verdict"]["reasons"]), figures)
    return figures


def _step(place: Place, terms: str) -> dict[str, Any]:
    import torch

    from benchmarks import step
    from benchmarks.gpu_check_shapes import QWEN, gsm8k_like

    size, examples = (QWEN, gsm8k_like(QWEN.examples)) if place.on_gpu else (step.SIZES["quickstart"], None)
    bench = step.Bench(size, terms, torch.device(place.device), examples)
    asked = argparse.Namespace(size="gpu_check", terms=terms, repeats=5 if place.on_gpu else 1)
    rows = {row["way"]: row for row in step.rows_of(bench, asked, ["a", "c", "d", "e", "f"])}
    ours, cached = rows["d"], rows["e"]
    figures = {
        "tokens_per_second": ours["tokens_per_second"], "x_usual": ours["ratio_to_usual"],
        "x_trl": rows["c"]["seconds"] / ours["seconds"], "x_usual_cached": cached["ratio_to_usual"],
        "x_floor": ours["ratio_to_floor"], "share_of_a_matrix_product": ours["fraction_of_limit"],
        "matrix_tflops": ours["matrix_flops_per_second"] / 1e12, "peak_gb": ours["peak_memory_bytes"] / 1e9,
    }  # fmt: skip
    missing = {"x_usual": 5.0, "share_of_a_matrix_product": 0.45}
    if place.on_gpu and (far := [name for name, least in missing.items() if figures[name] < least]):
        raise Missed("; ".join(f"{name} shall be {missing[name]:g} at least" for name in far), figures)
    return figures


def recipe(place: Place) -> dict[str, Any]:
    """The 8 GB recipe on models of its shapes with random weights, three steps, in a process that gets 8 GB."""
    from benchmarks.gpu_check_shapes import save_pair

    teacher, student = save_pair(place.folder, small=not place.on_gpu)
    content = json.loads(RECIPE.read_text())
    del content["dataset_config_name"]
    without: dict[str, Any] = {}
    if importlib.util.find_spec("bitsandbytes") is None:
        without |= {"teacher_quantization": "none", "teacher_dtype": "bfloat16"}
    if importlib.util.find_spec("torchao") is None:
        without["optim"] = "adamw_torch_fused"
        del content["optim_args"]
    models = {"teacher_model_name_or_path": teacher, "student_model_name_or_path": student}
    arguments = place.folder / "recipe.json"
    arguments.write_text(json.dumps(content | without | models | {"dataset_name": "quickstart"}))
    given = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}
    cap = f"import torch; torch.cuda.set_per_process_memory_fraction({CAP} / torch.cuda.mem_get_info()[1]); "
    capped = place.on_gpu and not without
    program = f"{cap if capped else ''}import sys, run_kava; sys.exit(run_kava.main(sys.argv[1:]))"
    said = ended([sys.executable, "-c", program, *place.argv("recipe", given, str(arguments))])
    found = re.search(r"Memory estimate for training: ([\d.]+) (GB|MB)", said)
    if found is None:
        raise RuntimeError("no estimate was told")
    peak = place.summary("recipe")["throughput"]["peak_memory_bytes"] / 1e9
    estimate = float(found[1]) / (1 if found[2] == "GB" else 1e3)
    figures = {"peak_gb": peak, "estimated_gb": estimate, "left_out": ", ".join(without) or "nothing"}
    if place.on_gpu and abs(peak - estimate) > estimate / 5:  # a CPU's peak is that of all libraries too
        raise Missed("peak_gb shall be within a fifth of estimated_gb", figures)
    if capped and peak > MOST / 1e9:
        raise Missed(f"peak_gb shall be {MOST / 1e9:g} at most", figures)
    return figures


def stop(place: Place) -> dict[str, Any]:
    """SIGTERM in a step, and going on from it, beside a run that nobody stopped."""
    steps = {"max_steps": 120, "save_steps": 120, "logging_steps": 20, "gradient_accumulation_steps": 1}
    straight = place.run("straight", steps)["final"]["loss"]
    command = [sys.executable, str(ROOT / "run_kava.py"), *place.argv("stopped", steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout or ():
        if line.startswith("[Step"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.communicate()[0]
    if process.returncode != 143 or "Resume with:" not in said:
        raise RuntimeError(f"exit code {process.returncode}: {said[-300:]}")
    resumed = place.run("stopped", {**steps, "resume_from_checkpoint": "true"})["final"]["loss"]
    return alike({"resumed_loss_apart": abs(resumed - straight) / straight}, {"resumed_loss_apart": 1e-2})


def packing(place: Place) -> dict[str, Any]:
    """Packed and padded rows under each attention that is there, in float32 and, where products are, in bfloat16."""
    ways: dict[str, dict[str, Any]] = {"sdpa": {}, "eager": {"attn_implementation": "eager"}}
    if place.on_gpu:  # torch's own flash kernel takes no float32
        ways["sdpa_bf16"] = {"bf16": "true"}
        if importlib.util.find_spec("flash_attn") is not None:
            ways["flash_bf16"] = {"bf16": "true", "attn_implementation": "flash_attention_2"}
    figures, most = {}, {}
    expected = place.losses("reference", {"max_tokens_per_batch": 0})
    for name, changes in ways.items():
        for kind, budget in (("packed", {}), ("padded", {"max_tokens_per_batch": 0})):
            figures[f"{name}_{kind}"] = furthest(place.losses(f"{name}_{kind}", changes | budget), expected)
            most[f"{name}_{kind}"] = 3e-2 if "bf16" in name else 1e-3
    return alike(figures, most)


def compiled(place: Place) -> dict[str, Any]:
    """`torch_compile` of the padded path."""
    padded = {"max_tokens_per_batch": 0}
    expected = place.losses("plain", padded)
    backend = {} if place.on_gpu else {"torch_compile_backend": "aot_eager"}  # which writes no C that takes a minute
    found = place.losses("compiled", padded | {"torch_compile": "true"} | backend)
    return alike({"loss_apart": furthest(found, expected)}, {"loss_apart": 1e-3})


def cache(place: Place) -> dict[str, Any]:
    """The teacher beside the student, and its states from a disk, in bfloat16."""
    expected = place.losses("online", {})
    found = place.losses("cached", {"teacher_cache_dir": str(place.folder / "states")})
    return alike({"loss_apart": furthest(found, expected)}, {"loss_apart": 2e-2})


def fsdp(place: Place) -> dict[str, Any]:
    """FSDP2 in a world of one GPU, or of two processes on a CPU, full with bf16 and with LoRA, and resumed."""
    ways = {"bf16": {"bf16": "true"}, "lora": {"bf16": "true", "use_peft": "true", "lora_r": 4}}
    if not place.on_gpu:
        return _sharded_on_cpu(place, ways)
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP_CONFIG), "--num_processes", "1",
        str(ROOT / "run_kava.py"),
    ]  # fmt: skip
    figures = {}
    for name, changes in ways.items():
        asked = {**changes, "save_steps": 3}
        ended([*launcher, *place.argv(name, asked)])
        first = place.summary(name)["final"]["loss"]
        shutil.rmtree(place.folder / name / "checkpoint-6")
        ended([*launcher, *place.argv(name, {**asked, "resume_from_checkpoint": "true"})])
        again = place.summary(name)["final"]["loss"]
        figures[f"{name}_resumed_loss_apart"] = abs(first - again) / first
    return alike(figures, dict.fromkeys(figures, 1e-3))


def _sharded_on_cpu(place: Place, ways: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    from helpers.data import write_problems

    from benchmarks.matrix import CHANGES, cell  # it sets tests' ways of sharding on a CPU up

    data = str(write_problems(place.folder / "data.jsonl"))
    figures = {}
    for name, changes in ways.items():
        folder = place.folder / name
        folder.mkdir()
        figures[name] = ", ".join(cell("FSDP2", CHANGES | changes, folder, data))
    if far := [name for name, outcome in figures.items() if outcome != "run, resumed"]:
        raise Missed(f"{' and '.join(far)} shall run and be resumed", figures)
    return figures


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "step": lambda place: _step(place, "hidden"), "recipe": recipe, "fsdp": fsdp, "signal": stop, "packing": packing,
    "cache": cache, "tests": tests, "compile": compiled, "step_all": lambda place: _step(place, "all"),
    "quickstart": quickstart,
}  # fmt: skip


def outcome(part: Callable[[Place], dict[str, Any]], place: Place) -> dict[str, Any]:
    """What came of a check, as `gpu_check.Result` has it."""
    try:
        return {"outcome": "held", "figures": part(place)}
    except Missed as error:
        return {"outcome": "missed", "figures": error.args[1], "said": error.args[0]}
    except Exception as error:  # a check that breaks is told, and the next one runs
        traceback.print_exc()
        return {"outcome": "failed", "said": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    name, device, folder = sys.argv[1:]
    found = outcome(PARTS[name], Place(device, Path(folder)))
    (Path(folder) / "answer.json").write_text(json.dumps(found))
