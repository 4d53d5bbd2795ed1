"""`run_summary.json`: what a run was, what it measured, how it ended. A figure that was not measured is null."""

import json
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .callbacks.status import ALWAYS_LOGGED_STEPS
from .checkpoint_io import write_atomically

SUMMARY_FILE = "run_summary.json"
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "safetensors")
_FINAL = (
    "loss", "mercator_loss", "cos_sim", "centred_cos_sim", "shuffled_cos_sim", "margin", "cka",
    "student_effective_rank", "target_effective_rank", "teacher_effective_rank",
)  # fmt: skip
_EVALUATED = ("teacher", "student_before", "student_after", "control_sft")
_THROUGHPUT = (
    "tokens_per_second", "samples_per_second", "padding_fraction", "peak_memory_bytes", "teacher_seconds",
    "student_seconds",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Python, operating system, device, and the versions of the packages that decide results."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        **{package: _version(package) for package in _PACKAGES},
    }


def now() -> datetime:
    """The current time with its zone."""
    return datetime.now(timezone.utc)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use at once: on the accelerator, or of this process; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunSummary:
    """Collects the figures of a run and writes them to `run_summary.json`.

    Args:
        arguments: every argument with its value, secrets masked.
        environment: see `describe_environment`.
    """

    def __init__(self, arguments: dict[str, Any], environment: dict[str, Any]) -> None:
        self._started = now()
        self.content: dict[str, Any] = {
            "schema_version": 1,
            "status": "failed",
            "started_at": self._started.isoformat(timespec="seconds"),
            "finished_at": None,
            "duration_seconds": None,
            "environment": environment,
            "arguments": arguments,
            "global_step": 0,
            "cos_sim_at": {str(step): None for step in ALWAYS_LOGGED_STEPS},
            "final": dict.fromkeys(_FINAL),
            "evaluation": dict.fromkeys(_EVALUATED),
            "verdict": {"success": None, "collapsed": None, "reasons": []},
            "throughput": dict.fromkeys(_THROUGHPUT),
            "problems": [],
            "checkpoints": [],
        }

    def add_training(self, log_history: list[dict[str, float]], global_step: int) -> None:
        """Read the log lines of the training: CosSim at the named steps, and the last loss and CosSim."""
        self.content["global_step"] = global_step
        lines = [line for line in log_history if "loss" in line]
        for line in lines:
            if str(line["step"]) in self.content["cos_sim_at"]:
                self.content["cos_sim_at"][str(line["step"])] = line.get("cos_sim")
        if lines:
            self.content["final"] |= {name: lines[-1].get(name) for name in ("loss", "mercator_loss", "cos_sim")}

    def add_final(self, metrics: dict[str, float]) -> None:
        """Set the final figures from the metrics of an evaluation; what it did not measure becomes null."""
        self.content["final"] = {name: metrics.get(f"eval_{name}") for name in _FINAL}
        self.content["verdict"]["collapsed"] = bool(metrics["eval_collapsed"]) if "eval_collapsed" in metrics else None

    def add_evaluation(self, who: str, figures: dict[str, float | None]) -> None:
        """Set the figures of `teacher`, `student_before`, `student_after` or `control_sft`."""
        self.content["evaluation"][who] = figures

    def write(self, output_dir: str | Path, status: str) -> Path:
        """Finish the summary with `completed`, `interrupted` or `failed` and write it."""
        finished = now()
        self.content |= {
            "status": status,
            "finished_at": finished.isoformat(timespec="seconds"),
            "duration_seconds": round((finished - self._started).total_seconds(), 1),
        }
        path = Path(output_dir) / SUMMARY_FILE
        write_atomically(path, lambda temporary: temporary.write_text(self.to_json(), encoding="utf-8"))
        return path

    def to_json(self) -> str:
        """The summary as JSON text."""
        return json.dumps(self.content, indent=2, ensure_ascii=False, default=str) + "\n"
