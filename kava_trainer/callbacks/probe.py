"""The alignment diagnostics before the first step and beside every checkpoint."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProbeCallback(TrainerCallback):
    """Runs the probe when training begins and whenever a checkpoint was saved; evaluations run it themselves.

    Args:
        first_probe: measures and logs where the run starts.
        probe: measures and logs the run so far.
    """

    def __init__(self, first_probe: Callable[[], Any], probe: Callable[[], Any]) -> None:
        self._first_probe, self._probe = first_probe, probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start."""
        self._first_probe()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what was saved, unless the training ends here."""
        if not control.should_training_stop:
            self._probe()
