"""A projector file beside every checkpoint."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..projector import save_projectors
from ..student import DistillationModel


class ProjectorSaveCallback(TrainerCallback):
    """Writes `proj_step_<N>.pth` into the output folder whenever a checkpoint is saved (every `save_steps`)."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DistillationModel,
        **kwargs: Any,
    ) -> None:
        """Write the projectors as they are after this step."""
        if args.should_save:
            save_projectors(model.target.projectors, Path(args.output_dir) / f"proj_step_{state.global_step}.pth")
