"""The alignment diagnostics before the first step."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FirstProbeCallback(TrainerCallback):
    """Runs the probe when training begins; evaluations run it afterwards.

    Args:
        run_probe: measures and logs.
    """

    def __init__(self, run_probe: Callable[[], Any]) -> None:
        self._run_probe = run_probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start."""
        self._run_probe()
