"""A projector file beside every checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProjectorSaveCallback(TrainerCallback):
    """Writes `proj_step_<N>.pth` into the output folder whenever a checkpoint is saved (every `save_steps`).

    Args:
        save_projector: writes the projectors to a file.
    """

    def __init__(self, save_projector: Callable[[Path], Any]) -> None:
        self._save_projector = save_projector

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the projectors as they are after this step."""
        self._save_projector(Path(cast(str, args.output_dir)) / f"proj_step_{state.global_step}.pth")
