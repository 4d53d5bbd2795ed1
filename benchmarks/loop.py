"""Where the time of the quickstart's own training loop goes.

    python benchmarks/loop.py --out FILE.csv [--name value ...]

Runs `training_args/quickstart.json` without control and generation, and times the forward passes (teacher, student,
projectors, losses), the backward passes and the optimizer within `KavaTrainer.train`; the rest of it is data loading,
clipping, logging, probes and checkpoints. Further words go to `run_kava.py`.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from transformers import Trainer  # noqa: E402

import run_kava  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402

COLUMNS = ("part", "seconds", "share", "steps", "device", "torch")


class Clock:
    """Seconds by part; `timed` adds what a method takes to its part while a training step or `train` runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps, self._depth = 0, 0

    def timed(self, part: str, method: Callable[..., Any], only_in_step: bool = True) -> Callable[..., Any]:
        """The method, with its time noted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if only_in_step and self._depth == 0:
                return method(*args, **kwargs)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return run

    def step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A training step: only what runs within counts as forward and backward, so that probes do not."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1

        return run

    def optimizer(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The optimizer's step, counted."""
        timed = self.timed("optimizer", method, only_in_step=False)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return timed(*args, **kwargs)

        return run


def measure(words: list[str]) -> Clock:
    """Run the quickstart once."""
    clock = Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(KavaTrainer, "compute_loss", clock.timed("forward", KavaTrainer.compute_loss)),
        mock.patch.object(Accelerator, "backward", clock.timed("backward", Accelerator.backward)),
        mock.patch.object(KavaTrainer, "training_step", clock.step(KavaTrainer.training_step)),
        mock.patch.object(AcceleratedOptimizer, "step", clock.optimizer(AcceleratedOptimizer.step)),
        mock.patch.object(Trainer, "train", clock.timed("all", Trainer.train, False)),
    ):
        recipe = str(ROOT / "training_args" / "quickstart.json")
        quick = ["--run_control", "false", "--evaluate_generation", "false", "--output_dir", folder]
        code = run_kava.main([recipe, *quick, *words])
    if code != 0:
        sys.exit(code)
    return clock


def main() -> None:
    """Measure and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments, words = parser.parse_known_args()
    clock = measure(words)
    total = clock.seconds.pop("all")
    clock.seconds["outside"] = total - sum(clock.seconds.values())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for part, seconds in clock.seconds.items():
            device = (
                f"cpu x {torch.get_num_threads()}" if not torch.cuda.is_available() else torch.cuda.get_device_name()
            )
            writer.writerow([part, f"{seconds:.4g}", f"{seconds / total:.4f}", clock.steps, device, torch.__version__])
            print(f"{part:<10} {seconds:8.2f} s  {seconds / total:6.1%}")
    print(f"{'all':<10} {total:8.2f} s  in {clock.steps} steps")


if __name__ == "__main__":
    main()
