"""Ctrl-C, SIGTERM and SIGUSR1 while a model trains: finish the step, save everything, stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...utils.signals import WATCH

EMERGENCY_PROJECTOR = "emergency_projector.pth"


class EmergencyCheckpointCallback(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the step, or the one that is being written into the last.

    With several ranks all of them stop at the same step, whichever of them got the signal.

    Args:
        save_projector: writes the projectors to a file.
    """

    def __init__(self, save_projector: Callable[[Path], Any]) -> None:
        self._save_projector = save_projector
        self.received: int | None = None
        """The signal that stopped the training, or None."""
        self.evaluation_pending = False
        """Whether an evaluation was due and gave way to the signal."""
        self.save_was_due = False
        """Whether the checkpoint would have been written without the signal."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the last training."""
        self.received, self.evaluation_pending, self.save_was_due = None, False, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal has come on any rank."""
        if (number := WATCH.agree()) is not None:
            self.stop(number, control)

    def stop(self, number: int, control: TrainerControl) -> None:
        """Have Trainer save what there is and stop, without an evaluation first: there may be seconds left."""
        self.received = number
        self.save_was_due |= control.should_save
        self.evaluation_pending |= control.should_evaluate
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # with save_strategy best it could also cancel the save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer calls this also where a signal has ended the epoch early; then nothing of its end is due."""
        if self.received is not None and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here if a signal came while the checkpoint was being written; the projector beside it."""
        if self.received is None and (number := WATCH.agree()) is not None:
            self.received, control.should_training_stop = number, True
        if self.received is not None:
            self._save_projector(Path(cast(str, args.output_dir)) / EMERGENCY_PROJECTOR)
