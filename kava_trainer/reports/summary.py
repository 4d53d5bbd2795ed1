"""What a run was, what it measured and how it ended: `run_summary.json`, and its log lines in `log_history.json`.

A figure that was not measured is null.
"""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..trainer.callbacks.status import ALWAYS_LOGGED_STEPS
from ..utils.atomic_files import write_atomically
from ..utils.redaction import without_secrets

SUMMARY_FILE = "run_summary.json"

HISTORY_FILE = "log_history.json"
"""The list of all log lines of the training, as in `TrainerState.log_history`."""

REPORT_PAGE, REPORT_PICTURE = "report.html", "report.png"
"""What `report.write_report` makes of the two."""

MOST_SAMPLES = 10
"""Held-out problems whose answers the summary shows."""

_FINAL = (
    "loss", "mercator_loss", "cos_sim", "centred_cos_sim", "shuffled_cos_sim", "margin", "cka",
    "student_effective_rank", "target_effective_rank", "teacher_effective_rank",
)  # fmt: skip

_EVALUATED = ("teacher", "student_before", "student_after", "control_sft")

_THROUGHPUT = (
    "tokens_per_second", "samples_per_second", "padding_fraction", "peak_memory_bytes", "teacher_seconds",
    "student_seconds", "estimated_memory_bytes",
)  # fmt: skip


def now() -> datetime:
    """The current time with its zone."""
    return datetime.now(timezone.utc)


def finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None: JSON has no word for those."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunSummary:
    """Collects the figures of a run and writes them to `run_summary.json`.

    Args:
        arguments: every argument with its value, secrets masked.
        environment: see `describe_environment`.
        command: what started the run, tokens masked; None where that is not known.
    """

    def __init__(self, arguments: dict[str, Any], environment: dict[str, Any], command: str | None = None) -> None:
        self._started, self._earlier_seconds = now(), 0.0
        self.log_history: list[dict[str, float]] = []
        self.content: dict[str, Any] = {
            "schema_version": 1,
            "status": "failed",
            "started_at": self._started.isoformat(timespec="seconds"),
            "finished_at": None,
            "duration_seconds": None,
            "environment": environment,
            "arguments": arguments,
            "command": command,
            "global_step": 0,
            "cos_sim_at": {str(step): None for step in ALWAYS_LOGGED_STEPS},
            "final": dict.fromkeys(_FINAL),
            "evaluation": dict.fromkeys(_EVALUATED),
            "samples": [],
            "teacher_fidelity": None,
            "prompt_kind": None,
            "held_out_examples": None,
            "student_parameters": None,
            "final_checksums": None,
            "verdict": {"success": None, "collapsed": None, "reasons": []},
            "throughput": dict.fromkeys(_THROUGHPUT),
            "problems": [],
            "checkpoints": [],
        }

    def run_time(self) -> dict[str, Any]:
        """When the run began, and the seconds that it has taken so far, in all of its sessions."""
        seconds = self._earlier_seconds + (now() - self._started).total_seconds()
        return {"started_at": self.content["started_at"], "seconds": seconds}

    def go_on_from(self, earlier: dict[str, Any]) -> None:
        """Add the `run_time` that a checkpoint holds: this session goes on from there."""
        self.content["started_at"], self._earlier_seconds = earlier["started_at"], earlier["seconds"]

    def add_training(self, log_history: list[dict[str, float]], global_step: int) -> None:
        """Read the log lines of the training: CosSim at the named steps.

        The last loss and CosSim of the training stand in for final figures where no evaluation has set those.
        """
        self.log_history = log_history
        self.content["global_step"] = global_step
        lines = [line for line in log_history if "loss" in line]
        for line in lines:
            if str(line["step"]) in self.content["cos_sim_at"]:
                self.content["cos_sim_at"][str(line["step"])] = line.get("cos_sim")
        if lines and self.content["final"]["loss"] is None:
            self.content["final"] |= {name: lines[-1].get(name) for name in ("loss", "mercator_loss", "cos_sim")}

    def add_final(self, metrics: dict[str, float]) -> None:
        """Set the final figures from the metrics of `Trainer.evaluate`; what it did not measure becomes null."""
        self.content["final"] = {name: metrics.get(f"eval_{name}") for name in _FINAL}

    def add_evaluation(self, who: str, figures: dict[str, float | None]) -> None:
        """Set the figures of `teacher`, `student_before`, `student_after` or `control_sft`."""
        self.content["evaluation"][who] = figures

    def add_answers(
        self, who: str, problems: list[dict[str, str]], answers: list[str], is_right: Callable[[str, str], bool]
    ) -> None:
        """Set what a model, named as in `add_evaluation`, answered to the first held-out problems.

        Args:
            who: see `add_evaluation`.
            problems: `prompt` and `reference` of at most `MOST_SAMPLES` problems, the same at every call.
            answers: one for each problem, or more; none where nothing was generated.
            is_right: takes an answer and its reference.
        """
        samples = self.content["samples"]
        if answers and not samples:
            nothing = {"answers": dict.fromkeys(_EVALUATED), "matches": dict.fromkeys(_EVALUATED)}
            samples += [{**problem, **deepcopy(nothing)} for problem in problems]
        for sample, answer in zip(samples, answers, strict=False):
            sample["answers"][who], sample["matches"][who] = answer, is_right(answer, sample["reference"])

    def write(self, output_dir: str | Path, status: str) -> Path:
        """Finish the summary with `completed`, `interrupted` or `failed`, unless it is finished so.

        Returns:
            Where it was written, with the log lines beside it.
        """
        if self.content["finished_at"] is None or self.content["status"] != status:
            self.content |= {
                "status": status,
                "finished_at": now().isoformat(timespec="seconds"),
                "duration_seconds": round(self.run_time()["seconds"], 1),
            }
        path = Path(output_dir) / SUMMARY_FILE
        _write(path, self.to_json())
        _write(Path(output_dir) / HISTORY_FILE, self.history_to_json())
        return path

    def to_json(self) -> str:
        """The summary as JSON text, without secrets."""
        return without_secrets(json.dumps(finite(self.content), indent=2, ensure_ascii=False, default=str)) + "\n"

    def history_to_json(self) -> str:
        """The log lines as JSON text, one a line, without secrets."""
        lines = [json.dumps(finite(line), ensure_ascii=False, default=str) for line in self.log_history]
        return without_secrets("[\n" + ",\n".join(lines) + "\n]\n")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
