"""A `KavaTrainer` as a user of the library makes it, of plain models."""

import torch
from datasets import Dataset

from helpers.data import random_examples
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.trainers import SETTINGS
from kava_trainer import KavaTrainer, KavaTrainingArguments

DATA = random_examples(16)

EVERY_STEP = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}


def new_student(trial=None):
    return tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2)


def new_teacher():
    return tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)


def arguments(folder, **changes):
    ours = {"plain_output": True, "projector_init": "random", "projector_dropout": 0.0}
    return KavaTrainingArguments(output_dir=str(folder), **{**SETTINGS, **ours, **changes})


def make(folder, tokenizer, given=None, args=None, **changes):
    """A trainer of plain models; `given` are its own parameters, `changes` its training arguments."""
    given = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(DATA), **(given or {})}
    given.setdefault("eval_dataset", Dataset.from_list(DATA[:7]))
    if "model_init" not in given:
        given.setdefault("student", new_student())
    given.setdefault("teacher", new_teacher())
    return KavaTrainer(args=args or arguments(folder, **changes), **given)


def changed(trainer, before):
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
