"""KAVA as a library: what it offers by name, and a `KavaTrainer` made of plain models."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.places import ROOT
from transformers import TrainerCallback

import kava_trainer
from kava_trainer import (
    DistillationCollator,
    ElasticBottleneck,
    HiddenStateCapture,
    KavaTrainer,
    KavaTrainingArguments,
    OnlineTeacher,
    ProjectorConfig,
    build_target,
    generalized_jsd_loss,
    mercator_loss,
)


@pytest.mark.parametrize("name", kava_trainer.__all__)
def test_everything_that_is_offered_is_there(name):
    assert getattr(kava_trainer, name) is not None
    assert name in dir(kava_trainer)


def test_what_is_not_offered_is_missing():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kava_trainer.nothing


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, kava_trainer; sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "kava_trainer" / "py.typed").is_file()


def make(folder, tokenizer, teacher=None, **changes):
    args = KavaTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        save_strategy="no", logging_steps=1, plain_output=True, projector_init="random", projector_dropout=0.0,
    )  # fmt: skip
    student = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2)
    teacher = tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1) if teacher is None else teacher
    data = Dataset.from_list(random_examples(12))
    torch.manual_seed(3)
    return KavaTrainer(student, teacher, args=args, train_dataset=data, processing_class=tokenizer, **changes)


def test_plain_models_make_the_same_trainer_as_a_source_and_a_target(tmp_path, tokenizer):
    plain = make(tmp_path / "plain", tokenizer)
    assert isinstance(plain.data_collator, DistillationCollator)
    assert isinstance(plain.teacher, OnlineTeacher)
    assert not any(parameter.requires_grad for parameter in plain.teacher.model.parameters())
    teacher = tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)
    torch.manual_seed(plain.args.seed)  # projectors start from it alone
    target = build_target(plain.args, plain.student, teacher)
    made = make(tmp_path / "made", tokenizer, OnlineTeacher(teacher, [TEACHER_LAYERS]), target=target)
    for trainer in (plain, made):
        trainer.train()
    for ours, theirs in zip(plain.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_neither_a_model_nor_a_target_is_refused(tmp_path, tokenizer):
    teacher = OnlineTeacher(tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1), [TEACHER_LAYERS])
    with pytest.raises(ValueError, match="Give the teacher as a model, or say what is aligned"):
        make(tmp_path, tokenizer, teacher)


class Order(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_step_end(self, *args, **kwargs):
        self.events.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events += ["log"] if "loss" in logs else []

    def on_train_end(self, *args, **kwargs):
        self.events.append("end")


def test_the_users_own_collator_callback_and_optimizer_are_used(tmp_path, tokenizer):
    calls, order = [], Order()

    class Collator(DistillationCollator):
        def __call__(self, examples):
            calls.append(len(examples))
            return super().__call__(examples)

    trainer = make(tmp_path, tokenizer, data_collator=Collator(tokenizer), callbacks=[order])
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    trainer.optimizer = optimizer
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert calls
    assert order.events == ["begin", "step", "log", "step", "log", "end"]


def test_losses_and_capture_do_without_the_trainer():
    teacher = tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1).eval()
    student = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2)
    projector = ElasticBottleneck(ProjectorConfig(STUDENT_SIZE, TEACHER_SIZE))
    optimizer = torch.optim.Adam([*student.parameters(), *projector.parameters()], lr=1e-2)
    of_teacher, of_student = HiddenStateCapture(teacher, [TEACHER_LAYERS]), HiddenStateCapture(student, [1, 2])
    batch = {"input_ids": torch.randint(1, 512, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    mask, losses = batch["attention_mask"].bool(), []
    for _ in range(20):
        with of_student as states:
            logits = student(**batch).logits
        with torch.no_grad(), of_teacher as targets:
            reference = teacher(**batch).logits
        aligned = mercator_loss(projector(states[STUDENT_LAYERS]), targets[TEACHER_LAYERS], mask)
        loss = aligned + generalized_jsd_loss(logits, reference, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(aligned.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    of_student.remove()
    with of_student as states:
        student(**batch)
    assert states == {}
    assert not any(module._forward_hooks for module in student.modules())


def state_of_the_process():
    """What a cell of a notebook must leave as it was for the cells after it."""
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": torch.get_num_threads(),
        "loggers": {
            name: level for name, level in loggers.items() if name.split(".")[0] in ("transformers", "datasets")
        },
        "root": (logging.root.level, list(logging.root.handlers)),
        "filters": len(warnings.filters),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "folder": os.getcwd(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
    }


@pytest.mark.slow
def test_a_cell_of_a_notebook_runs_twice_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kava_trainer").symlink_to(ROOT / "kava_trainer")
    (cell,) = re.findall(
        r"^```python\n([^`]*KavaTrainer\([^`]*)^```", (ROOT / "docs" / "quickstart.md").read_text(), re.M
    )
    cell = cell.replace("max_steps=20", "max_steps=2")
    notebook, losses, states, threads = {}, [], [], []
    for _ in range(3):  # the first time much is imported
        exec(compile(cell, "cell", "exec"), notebook)
        threads.append(threading.enumerate())
        losses.append([line["loss"] for line in notebook["trainer"].state.log_history if "loss" in line])
        states.append(state_of_the_process())
    assert losses[0]
    assert states[1] == states[2]
    begun = set(threads[2]) - set(threads[1])
    for thread in begun:
        thread.join(timeout=10)  # one that is about to end may
    assert not [thread.name for thread in begun if thread.is_alive()]
    assert states[0]["signals"] == states[1]["signals"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
