"""What only a machine with a GPU can tell, in one command of under eight minutes there; a smaller one on a CPU.

    python -m benchmarks.gpu_check                 # the first CUDA device, into benchmarks/results
    python -m benchmarks.gpu_check --device cpu    # the same checks, smaller, so that they stay alive
    python -m benchmarks.gpu_check --only step recipe

It needs torch, transformers, accelerate, peft, psutil, pytest with pytest-xdist, `datasets` and `evaluate` with what
these need, and no network; what else is missing (bitsandbytes, torchao, flash-attn) is left out of a check, which says
so. Each check is a process of its own, so that one that crashes, hangs or leaves memory behind spoils no other, and
both files are written after each. Outcomes, of which all but `held` make the exit code 1:

held      it ran, and what was asked of its figures holds
missed    it ran, and a figure misses what was asked of it
failed    it did not run to its end
not run   the time was up
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.tables import markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 460
"""Seconds for all checks together; one that would begin after them is not run."""

CHECKS = {
    "step": "a step of 1.5B to 0.5B, hidden states alone: at least 5 x the usual loop, 45 % of a matrix product",
    "recipe": "the 8 GB recipe, capped at 8 GB: peak at most 6 GB, and within a fifth of the estimate",
    "fsdp": "FSDP2 with bf16, and with LoRA, and going on from a checkpoint",
    "signal": "SIGTERM in a step, and going on from it",
    "packing": "packed rows and padded ones learn the same, under each attention",
    "cache": "online and cached teacher learn the same",
    "tests": "the tests of what runs on a device",
    "compile": "torch_compile of padded rows learns the same",
    "step_all": "a step with next-token loss and divergence",
    "quickstart": "the quickstart, with its control and verdict",
}
"""What each check is about, in the order in which they run."""

MOST_SECONDS = 150
"""For one check on a GPU; a CPU has as long as there is time."""


@dataclass
class Result:
    """What came of one check."""

    check: str
    outcome: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def run_check(name: str, device: str, limit: float, out: Path) -> Result:
    """Run one check in a process of its own, for so many seconds at most; what it says goes into a log in `out`."""
    began, log = time.monotonic(), out / f"gpu-check-{device}-{name}.log"
    with tempfile.TemporaryDirectory(prefix=f"kava-{name}-", ignore_cleanup_errors=True) as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check_parts", name, device, scratch]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)
            said = ""
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                said = f"stopped after {limit:.0f} s"
            with suppress(ProcessLookupError):  # whatever it has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = round(time.monotonic() - began, 1)
        if answer.exists():
            return Result(name, seconds=seconds, **json.loads(answer.read_text()))
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return Result(name, "failed", seconds, {}, said or (lines or ["it ended without a word"])[-1][:300])


def is_cuda_there() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} x {os.cpu_count()}"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def table(results: list[Result]) -> str:
    """All checks as Markdown."""
    lines = []
    for own in results:
        figures = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in own.figures.items())
        told = "; ".join(part.replace("|", "/") for part in (figures, own.said) if part)
        lines.append([CHECKS[own.check], own.outcome, f"{own.seconds:.0f}", told])
    return markdown(["Check", "Outcome", "Seconds", "Figures"], lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(results: list[Result], on: dict[str, Any], device: str, out: Path) -> None:
    """Both files."""
    content = {"machine": on, "checks": [asdict(own) for own in results]}
    (out / f"gpu-check-{device}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    told = ", ".join(f"{name} {value}" for name, value in on.items())
    (out / f"gpu-check-{device}.md").write_text(f"{told}\n\n{table(results)}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the checks and write both files; 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of both files and the logs")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all checks together")
    asked = parser.parse_args(argv)
    if asked.device == "cuda" and not is_cuda_there():
        parser.error("torch sees no CUDA device here; write --device cpu for the smaller checks")
    asked.out.mkdir(parents=True, exist_ok=True)
    on = machine(asked.device)
    began, results = time.monotonic(), list[Result]()
    for name in asked.only:
        left = asked.budget - (time.monotonic() - began)
        limit = min(left, MOST_SECONDS) if asked.device == "cuda" else left
        ran = run_check(name, asked.device, limit, asked.out) if left > 0 else None
        own = ran or Result(name, "not run", said="the time was up")
        print(f"{name}: {own.outcome} after {own.seconds:.0f} s {own.figures} {own.said}", flush=True)
        results.append(own)
        write(results, on, asked.device, asked.out)
    return int(any(own.outcome != "held" for own in results))


if __name__ == "__main__":
    sys.exit(main())
