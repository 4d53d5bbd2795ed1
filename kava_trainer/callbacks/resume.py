"""A resumed run takes up its counters where they stood."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ResumeCallback(TrainerCallback):
    """Runs when training begins, after Trainer has set its own counters to zero and before any other callback.

    Args:
        restore: puts back what a checkpoint holds, where the run is resumed.
    """

    def __init__(self, restore: Callable[[], Any]) -> None:
        self._restore = restore

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put it back."""
        self._restore()
