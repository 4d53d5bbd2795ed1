"""The layers that a run compares where `layer_mapping` cka chooses them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config.arguments import KavaTrainingArguments
from ...distillation.targets.mapping import LayerChooser, kept_layers
from ...trainer.checkpoint import PROJECTOR_FILE
from .models import Models


def with_chosen_layers(
    training: KavaTrainingArguments, models: Models, train: Any, collator: Any, checkpoint: Path | None
) -> Models:
    """The models with the layers that are compared, where `layer_mapping` cka chooses them; else as they are.

    Args:
        training: of the run.
        models: the pair.
        train: the training examples.
        collator: pads them.
        checkpoint: that the run goes on from, whose layers stay what they are.

    Raises:
        BadRequest: if the checkpoint's projector file cannot be read.
    """
    if training.layer_mapping != "cka" or not training.aligns:
        return models
    if checkpoint is not None:
        return replace(models, chosen_layers=kept_layers(checkpoint / PROJECTOR_FILE))
    choose = LayerChooser(training, train, collator)
    return replace(models, chosen_layers=choose(models.student, models.teacher))
