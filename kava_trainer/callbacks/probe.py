"""The alignment diagnostics before the first step and beside every checkpoint."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProbeCallback(TrainerCallback):
    """Runs the probe when training begins and whenever a checkpoint was saved; evaluations run it as well.

    Args:
        first_probe: measures and logs where the run starts.
        probe: measures and logs the run so far.
    """

    def __init__(self, first_probe: Callable[[], Any], probe: Callable[[], Any]) -> None:
        self._first_probe, self._probe = first_probe, probe
        self._evaluated_at = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start."""
        self._first_probe()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that this step has been measured."""
        self._evaluated_at = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what was saved, unless an evaluation has just done so, or the training ends here."""
        if self._evaluated_at != state.global_step and not control.should_training_stop:
            self._probe()
