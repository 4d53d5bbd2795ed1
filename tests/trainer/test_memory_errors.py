"""Memory that runs out outside of a training step's passes: the message names the stage and what fits it."""

import pytest
import torch
from helpers.places import ROOT
from helpers.programs import SHORT, words
from helpers.trainers import make_trainer
from transformers import TrainerCallback

import run_kava
from kava_trainer.runs import fill_cache, pipeline, start
from kava_trainer.utils.errors import RunFailed

RECIPE = str(ROOT / "training_args" / "quickstart.json")
OPTIMIZER = "write optim adamw_bnb_8bit, which saves 0.00 GB of optimizer states; write teacher_quantization 4bit"


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def failed(trainer):
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    return str(caught.value)


class NoMemoryAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            no_memory()


@pytest.mark.parametrize("step", [1, 2])
def test_in_the_optimizers_step(tmp_path, tokenizer, step):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.add_callback(NoMemoryAtStep(step))
    told = failed(trainer)
    assert told.startswith(f"Out of memory in the optimizer's step {step}. Do one of these: {OPTIMIZER}")
    assert "per_device_eval_batch_size" not in told


def test_an_optimizer_with_small_states_is_not_advised_again(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, tokenizer, optim="adamw_bnb_8bit")
    trainer.add_callback(NoMemoryAtStep(1))
    assert "Do one of these: write teacher_quantization 4bit" in failed(trainer)


def test_before_the_first_step(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)
    monkeypatch.setattr(trainer, "create_optimizer", no_memory)
    assert failed(trainer).startswith(f"Out of memory before the first step. Do one of these: {OPTIMIZER}")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("prediction_step", "in the evaluation"),
        ("calibrate", "while the projectors were calibrated"),
        ("probe.measure", "while the probe measured the alignment"),
    ],
)
def test_in_an_evaluation(tmp_path, tokenizer, monkeypatch, name, stage):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "projector_init": "least_squares"}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    owner, _, method = name.rpartition(".")
    monkeypatch.setattr(trainer.probe.fixed if owner else trainer, method, no_memory)
    told = f"Out of memory {stage} (tried to allocate 2 GiB). Lower per_device_eval_batch_size (now 3). There is no"
    assert failed(trainer).startswith(told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "start.load_models",
            "Out of memory while the models were loaded (tried to allocate 2 GiB). Do one of these: write "
            "teacher_quantization 4bit; write student_dtype bfloat16; choose smaller models; let nothing else use",
        ),
        (
            "start.check_teacher",
            "Out of memory while the teacher was tried out (tried to allocate 2 GiB). Lower per_device_eval_batch_size "
            "(now 100) or generation_max_new_tokens.",
        ),
        (
            "evaluate_with_answers",
            "Out of memory in the evaluation (tried to allocate 2 GiB). Lower per_device_eval_batch_size (now 100) or "
            "generation_max_new_tokens.",
        ),
        (
            "fill_cache._fill",
            "Out of memory while the cache was written (tried to allocate 2 GiB). Lower max_tokens_per_batch (now 300)",
        ),
        (
            "start.open_caches",
            "Out of memory (tried to allocate 2 GiB). Let nothing else use the device, or choose smaller",
        ),
    ],
)
def test_before_the_training(tmp_path, monkeypatch, capsys, name, told):
    module, _, function = name.rpartition(".")
    monkeypatch.setattr({"fill_cache": fill_cache, "start": start}.get(module, pipeline), function, no_memory)
    options = {**SHORT, "output_dir": tmp_path, "teacher_cache_dir": tmp_path / "cache", "max_tokens_per_batch": 300}
    assert run_kava.main([RECIPE, *words(options)]) == 1
    assert told in capsys.readouterr().err
