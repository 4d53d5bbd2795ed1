"""The control: a second student with the same start, data, steps and learning rates, and no teacher."""

import copy
import os
import shutil
from collections.abc import Sized
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import release_memory
from transformers import set_seed

from ..config.arguments import KavaTrainingArguments
from ..config.checks import TEACHER_WEIGHTS
from ..distillation.teacher_cache import is_released
from ..models.student import load_student
from ..models.teacher import load_teacher
from ..trainer.checkpoint import find_newest_checkpoint, list_checkpoints, read_manifest
from ..trainer.trainer import KavaTrainer
from ..utils.errors import BadRequest
from ..utils.progress_bar import working
from .advice import planned_steps
from .setup import Run, make_trainer
from .tracking import keep_apart

TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"
"""Variable of the environment that gives TensorBoard one folder for all runs."""

CONTROL_FOLDER = "control"
"""Folder under `output_dir` that takes the control's checkpoints."""


def control_arguments(training: KavaTrainingArguments) -> KavaTrainingArguments:
    """The run's arguments with the next-token loss as the only term, saving into a folder of its own.

    The control stays local. Of the trackers only TensorBoard goes on, which keeps a folder for each run; any other
    would mix the control's lines into the run's.
    """
    control = copy.copy(training)
    for name in TEACHER_WEIGHTS:
        setattr(control, name, 0.0)
    control.on_policy_fraction, control.rollouts_from = 0.0, None
    if control.lm_weight == 0:
        control.lm_tokens = "answers"
    control.lm_weight = 1.0
    control.metric_for_best_model, control.load_best_model_at_end = None, False  # it may be one that only KAVA has
    control.output_dir = control.final_dir = str(Path(training.output_dir) / CONTROL_FOLDER)
    control.push_to_hub = control.run_control = False
    control.report_to = [tracker for tracker in training.report_to or [] if tracker == "tensorboard"]
    return control


def _checkpoints(training: KavaTrainingArguments, of_control: bool) -> list[Path]:
    """The readable checkpoints in the control's folder that are a control's, or else those of a run of its own.

    A control's checkpoints say nothing of what the run was asked for, and those of a run do.
    """
    found = []
    for folder in list_checkpoints(control_arguments(training).output_dir):
        with suppress(ValueError):  # one that is torn is nobody's, and never resumed
            found += [folder] if (read_manifest(folder)["run"] is None) == of_control else []
    return found


def forget_control(training: KavaTrainingArguments) -> None:
    """Delete the checkpoints that an earlier run's control left, so that they are never taken for this run's."""
    for folder in _checkpoints(training, of_control=True) if training.should_save else []:
        shutil.rmtree(folder)


def check_place_of_control(training: KavaTrainingArguments) -> None:
    """Make sure that the control would not go into a run of its own. Raises `BadRequest` if it would."""
    if training.run_control and (others := _checkpoints(training, of_control=False)):
        raise BadRequest(
            f"{others[0]} is of another run, but the control's checkpoints go to {others[0].parent};",
            "name another output_dir, or write run_control false.",
        )


def build_control(run: Run) -> KavaTrainer:
    """The control's trainer, around a student that starts with the very weights the run's student started with.

    The run's own trainer has been released. The teacher makes room on the device, unless it is quantised and cannot
    move, or has made room for its cache.
    """
    model, models, teacher = run.arguments.model, run.models, run.models.teacher
    if not is_released(teacher):
        teacher = teacher if getattr(teacher, "is_quantized", False) else cast(Any, teacher).to("cpu")
    elif model.is_cut and not getattr(teacher, "is_quantized", False):  # whose weights are read from files anyway
        teacher = load_teacher(model, torch.device("cpu"))
    release_memory()
    training, data = control_arguments(run.training), run.data
    if data.of_the_data is not None:  # of which there may be others than the run has examples
        training.max_steps = planned_steps(run.training, len(cast(Sized, data.train)), run.training.world_size)
        data = replace(data, train=data.of_the_data, of_the_data=None)
    set_seed(training.seed)
    with working("Loading the student once more"):
        student = load_student(model, teacher, training.device, models.cut)
    with working("Trying out the student"):
        trainer = make_trainer(training, replace(models, student=student), data)
    if TENSORBOARD_FOLDER in os.environ:
        keep_apart(trainer.trackers, CONTROL_FOLDER)
    return trainer


def train_control(trainer: KavaTrainer, resume: bool) -> None:
    """Train the control, or go on from its newest checkpoint, where there is one."""
    if resume:
        newest = find_newest_checkpoint(trainer.args.output_dir).checkpoint
        trainer.console.print(f"The control goes on from {newest}." if newest else "The control has no checkpoint yet.")
    trainer.train(resume_from_checkpoint=resume)
