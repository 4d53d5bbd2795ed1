"""A projector file beside every checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class ProjectorSaveCallback(TrainerCallback):
    """Writes `proj_step_<N>.pth` into the output folder whenever a checkpoint is saved (every `save_steps`).

    Args:
        save_projector: writes the projectors to a file.
        folder: tells where to; in a hyperparameter search each trial has a folder of its own.
    """

    def __init__(self, save_projector: Callable[[Path], Any], folder: Callable[[], Path]) -> None:
        self._save_projector, self._folder = save_projector, folder

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the projectors as they are after this step, where something is aligned."""
        if args.aligns:
            self._save_projector(self._folder() / f"proj_step_{state.global_step}.pth")
