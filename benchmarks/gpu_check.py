"""What only a machine with a GPU can tell, in one command of under eight minutes there; a smaller one on a CPU.

    python -m benchmarks.gpu_check                 # the first CUDA device, into benchmarks/results
    python -m benchmarks.gpu_check --device cpu    # the same checks, smaller, so that they stay alive
    python -m benchmarks.gpu_check --only step recipe

It needs torch, transformers, accelerate, peft, pytest, `datasets` and `evaluate`, and no network; what else is missing
(bitsandbytes, torchao, flash-attn) is left out of a check, which says so. Each check is a process of its own, so that
one that crashes, hangs or leaves memory behind spoils no other. Outcomes:

held      it ran, and what was asked of its figures holds
missed    it ran, and a figure misses what was asked of it
failed    it did not run to its end
not run   the time was up
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
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
    "tests": "the tests of what runs on a device",
    "quickstart": "the quickstart, with its control and verdict",
    "step": "a step of 1.5B to 0.5B, hidden states alone: at least 5 x the usual loop, 45 % of a matrix product",
    "step_all": "the same with next-token loss and divergence",
    "recipe": "the 8 GB recipe, capped at 8 GB: peak at most 6 GB, and as estimated",
    "signal": "SIGTERM in a step, and going on from it",
    "packing": "packed rows and padded ones learn the same, under each attention",
    "compile": "torch_compile of padded rows learns the same",
    "cache": "online and cached teacher learn the same",
    "fsdp": "FSDP2 with bf16, and with LoRA, and going on from a checkpoint",
}
"""What each check is about, in the order in which they run."""


@dataclass
class Result:
    """What came of one check."""

    check: str
    outcome: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def run_check(name: str, device: str, limit: float) -> Result:
    """Run one check in a process of its own, for so many seconds at most."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"kava-{name}-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check_parts", name, device, scratch]
        with (Path(scratch) / "log").open("w+") as log:
            try:
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit, check=False)
                said = ""
            except subprocess.TimeoutExpired:
                said = f"stopped after {limit:.0f} s"
            log.seek(0)
            lines = log.read().replace("\r", "\n").splitlines()
        seconds = round(time.monotonic() - began, 1)
        if answer.exists():
            return Result(name, seconds=seconds, **json.loads(answer.read_text()))
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Result(name, "failed", seconds, {}, said or last[:300])


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


def main(argv: list[str] | None = None) -> int:
    """Run the checks and write both files; 1 where one failed or missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu-check-DEVICE.json and .md")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all checks together")
    asked = parser.parse_args(argv)
    on = machine(asked.device)
    began, results = time.monotonic(), list[Result]()
    for name in asked.only:
        left = asked.budget - (time.monotonic() - began)
        own = run_check(name, asked.device, left) if left > 0 else Result(name, "not run", said="the time was up")
        print(f"{name}: {own.outcome} after {own.seconds:.0f} s {own.figures} {own.said}", flush=True)
        results.append(own)
    asked.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": on, "checks": [asdict(own) for own in results]}
    name = f"gpu-check-{asked.device}"
    (asked.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    told = ", ".join(f"{name} {value}" for name, value in on.items())
    (asked.out / f"{name}.md").write_text(f"{told}\n\n{table(results)}\n", encoding="utf-8")
    return int(any(own.outcome in ("failed", "missed") for own in results))


if __name__ == "__main__":
    sys.exit(main())
