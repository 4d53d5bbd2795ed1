"""Ctrl-C and SIGTERM: finish the step, save everything, stop."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..projector import save_projectors
from ..student import DistillationModel

EMERGENCY_PROJECTOR = "emergency_projector.pth"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


_LAUNCHER_VARIABLES = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Set by `accelerate launch` and `torch.distributed.run`, which do not pass a SIGTERM of their own on."""


def exit_code(signal_number: int) -> int:
    """The exit code a shell expects of a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signal_number


class EmergencyCheckpointCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint at the end of the step; the same one again leaves at once.

    A launcher that has gone away counts as a SIGTERM. With several ranks all of them stop at the same step, whichever
    of them got the signal. `received` is the number of the signal that stopped the run, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._launcher = os.getppid() if _LAUNCHER_VARIABLES & os.environ.keys() else None
        self._flag: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self._flag == signal_number:
            os._exit(exit_code(signal_number))
        self._flag = self._flag or signal_number

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the handlers for the time of the training loop; Python allows it in the main thread only."""
        self.received = self._flag = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DistillationModel,
        **kwargs: Any,
    ) -> None:
        """Save and stop if a signal has come on any rank."""
        self.received = self._agree(args)
        if self.received is None:
            return
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # it takes long, and with save_strategy best it could cancel the save
        if args.should_save:
            save_projectors(model.target.projectors, Path(args.output_dir) / EMERGENCY_PROJECTOR)

    def restore_handlers(self) -> None:
        """Give the old handlers back; a signal that came after the last step counts as well."""
        self.received = self.received or self._flag
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _agree(self, args: TrainingArguments) -> int | None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._flag = self._flag or signal.SIGTERM
        if args.world_size == 1:
            return self._flag
        flag = torch.tensor(self._flag or 0, device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return flag.item() or None
