"""A resumed run takes up its counters where they stood."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.streaming import ExampleStream


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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Of a stream Trainer knows no epoch, and begins to count one where the run was resumed; put that right."""
        if isinstance(getattr(kwargs.get("train_dataloader"), "dataset", None), ExampleStream):
            state.epoch = state.global_step / state.max_steps
