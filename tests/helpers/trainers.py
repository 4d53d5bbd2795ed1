"""Trainers of tiny models, and what they log."""

import torch
from datasets import Dataset

from helpers.data import random_examples
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.distillation.loss_terms import needed_teacher_layers
from kava_trainer.distillation.targets import build_target
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.trainer.trainer import KavaTrainer

SETTINGS = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 1,
}
"""Of a training that takes a second."""


def tiny_teacher():
    return tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)


def make_trainer(folder, tokenizer, count=16, model=tiny_llama, rollout_fn=None, train=None, teacher=None, **changes):
    arguments = {
        "output_dir": str(folder),
        **SETTINGS,
        "plain_output": True,
        "mercator_weight": 1.0,
        "projector_direction": "teacher_to_student",
        "projector_init": "random",
        **changes,
    }
    args = KavaTrainingArguments(**arguments)
    teacher = tiny_teacher() if teacher is None else teacher
    student = model(STUDENT_SIZE, STUDENT_LAYERS, seed=2)
    torch.manual_seed(3)
    target = build_target(args, student, teacher)
    data = Dataset.from_list(random_examples(count))
    return KavaTrainer(
        student,
        OnlineTeacher(teacher, needed_teacher_layers(args, target, TEACHER_LAYERS)),
        target,
        args,
        train_dataset=data if train is None else train,
        eval_dataset=data.select(range(7)),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
        rollout_fn=rollout_fn,
    )


def loss_lines(trainer):
    """The training log lines, without what differs from run to run."""
    measured = ("tokens_per_second", "peak_memory_bytes", "generation_seconds", "training_seconds")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


FILES = ("trainer_state.json", "projector.pth", "optimizer.pt", "scheduler.pt", "model.safetensors")
