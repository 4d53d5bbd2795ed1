"""Ctrl-C, SIGTERM and SIGUSR1 while a model trains: finish the step, save everything, stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState

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
        self._best: str | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the last training."""
        self.received, self.evaluation_pending, self.save_was_due = None, False, False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer calls this also where a signal has ended the epoch early; then nothing of its end is due."""
        if self.received is not None and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here if a signal came while the checkpoint was being written; the projector beside it."""
        if self.received is None and (number := WATCH.agree()) is not None:
            self.received, control.should_training_stop = number, True
        if self.received is not None:
            self._save_projector(Path(cast(str, args.output_dir)) / EMERGENCY_PROJECTOR)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end Trainer would delete all but the best checkpoint, also the one that a signal has just left.

        The last log line comes right before; what is best is named again in `on_train_end`.
        """
        if self.received is not None and "train_loss" in kwargs["logs"]:
            self._best, state.best_model_checkpoint = state.best_model_checkpoint, None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `on_log`."""
        if self.received is not None:
            state.best_model_checkpoint = self._best

    def state_dict(self) -> dict[str, Any]:
        """What gave way to the signal, and is due when the run is resumed."""
        return {
            "evaluation_pending": self.evaluation_pending,
            "probe_due": self.received is None or self.save_was_due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept: what is due is done at once, see `KavaTrainer.catch_up`."""
