"""What the processes of `test_faults.py` do: one small run, with something happening to it on the way."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoTokenizer

import run_kava
from helpers.hashes import state_hash
from helpers.models import tiny_llama
from helpers.trainers import loss_lines, make_trainer
from kava_trainer.distillation import calibration, teacher_cache
from kava_trainer.models.generation import generate
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.trainer import saving
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.distributed import disconnect, whole

STEPS = 8
OPTIONS = {
    "teacher_model_name_or_path": "quickstart",
    "student_model_name_or_path": "quickstart",
    "max_length": 64,
    "max_eval_samples": 8,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 3,
    "learning_rate": 1e-3,
    "calibration_tokens": 600,
    "use_cpu": True,
    "plain_output": True,
    "report_to": "none",
}


def words(folder, data, **changes):
    """The command line of one run."""
    options = {**OPTIONS, "dataset_name": data, "output_dir": Path(folder) / "out", **changes}
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def run(folder, data, changes=None):
    """`run_kava.py` from the beginning or from the newest checkpoint."""
    return run_kava.main(words(folder, data, resume_from_checkpoint="true", **(changes or {})))


def run_and_look(folder, data):
    """The same; it ends with 9 where threads of Gloo outlive `disconnect`, and with 8 where there were none."""
    code, before = run(folder, data), threads_of_gloo()
    disconnect()
    return code or (8 if not before else 9 * bool(threads_of_gloo()))


def threads_of_gloo():
    return [name for file in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := file.read_text())]


def run_and_die(folder, data, moment, names):
    """The same, killed in place of the call number `moment` of one of some functions."""
    calls = 0
    places = {
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "rmtree": (shutil, "rmtree"),
        "manifest": (saving, "write_manifest"),
        "torch.save": (torch, "save"),
        "unlink": (Path, "unlink"),
    }

    def dying(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in names:
        owner, attribute = places[name]
        setattr(owner, attribute, dying(getattr(owner, attribute)))
    return run(folder, data)


STAGES = {
    "training": (KavaTrainer, "compute_loss", 7),
    "save": (saving, "write_manifest", 1),
    "evaluation": (KavaTrainer, "prediction_step", 1),
    "calibration": (calibration, "_add_batch", 2),
    "final evaluation": (KavaTrainer, "prediction_step", 2 * 2 + 1),
    "cache": (teacher_cache, "_examples", 2),
    "generation": (generate, "own_defaults_off", 1),
    "control": (KavaTrainer, "compute_loss", 2 * STEPS + 2 * (2 + 2) + 2 + 5),
}
"""Where a signal comes: in place of which call of which function."""


def run_and_signal(folder, data, stage, name, rank=0, times=1, changes=None, group=False):
    """A run in which one rank sends itself, or its whole process group, a signal in the middle of a stage."""
    if group:
        os.setpgid(0, 0)
    owner, attribute, moment = STAGES[stage]
    calls, original = 0, getattr(owner, attribute)

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == moment and int(os.environ.get("RANK", "0")) == rank:
            for _ in range(times):
                (os.killpg if group else os.kill)(os.getpid(), getattr(signal, name))
        return original(*args, **kwargs)

    with mock.patch.object(owner, attribute, call):
        sys.argv[0] = "run_kava.py"
        return run_kava.main(words(folder, data, **(changes or {})))


def _dropout_student(*args, **kwargs):
    student = tiny_llama(*args, **kwargs)
    student.config.attention_dropout = 0.1
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return student


def plain(state):
    """A state of the optimizer in one row, also of an 8-bit one."""
    state = whole(state)
    return (state.dequantize() if type(state).__name__.startswith("OptimState") else state).flatten()


def train(folder, output, resume, settings, prepare=lambda trainer: None):
    """A trainer's run, prepared or not; rank 0 writes the hash of its weights and optimizer, and its losses."""
    settings = {"model": _dropout_student, "count": 20, "lr_scheduler_type": "cosine", **settings}
    trainer = make_trainer(folder, AutoTokenizer.from_pretrained(STUDENT_FOLDER), **settings)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    assert torch.distributed.is_initialized() == (several or trainer.is_fsdp_enabled)
    optimizer = trainer.optimizer.optimizer.state.values() if trainer.optimizer else ()
    states = [torch.cat([plain(p) for p in state.values() if isinstance(p, torch.Tensor) and p.dim()])
              for state in optimizer]  # fmt: skip
    weights = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    if trainer.is_world_process_zero():
        logged = [
            {k: v for k, v in line.items() if not k.endswith(("_runtime", "_seconds", "_per_second", "_memory_bytes"))}
            for line in trainer.state.log_history
            if "train_runtime" not in line
        ]
        torch.save(
            {
                "weights": state_hash(weights),
                "optimizer": [state.double().sum().item() for state in states],
                "rates": [group["lr"] for group in trainer.optimizer.param_groups] if trainer.optimizer else [],
                "lines": logged,
                "losses": [line["loss"] for line in loss_lines(trainer)],
                "world_size": trainer.args.world_size,
                "wrapper": type(trainer.model_wrapped).__name__,
                "packs": trainer.batches.packs,
                "problems": trainer.problems,
            },
            output,
        )
    return 0


def seeded(number):
    """A generator of its own for each place in a matrix."""
    return random.Random(number)
