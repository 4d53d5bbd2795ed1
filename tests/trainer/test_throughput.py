import time

import pytest
import torch
from helpers.trainers import make_trainer

from kava_trainer.distillation.token_means import TokenMeans
from kava_trainer.trainer.run_state import read_progress
from kava_trainer.trainer.throughput import Stopwatch


def test_means_weigh_batches_by_their_tokens_and_start_anew_when_read():
    means = TokenMeans()
    means.add("loss", torch.tensor(6.0), torch.tensor(2))
    means.add("loss", torch.tensor(1.0), torch.tensor(5))
    means.add("empty", torch.tensor(0.0), torch.tensor(0))
    assert means.drain(lambda sums: 2 * sums) == {"loss": pytest.approx(1.0)}
    assert means.drain(lambda sums: sums) == {}


def test_a_stopwatch_adds_up_what_has_one_name(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("step", "teacher", "step"):
        with watch.measure(name):
            pass
    assert watch.seconds() == {"step": 2.5, "teacher": 4.0}


def test_a_resumed_run_counts_the_time_and_the_examples_of_its_earlier_part(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
    first.run_time = lambda: {"started_at": "then", "seconds": 5.0}
    first.train()
    earlier = first.clock.spent()
    saved = read_progress(tmp_path / "checkpoint-2", rank=0, world_size=1)
    assert saved["run_time"] == {"started_at": "then", "seconds": 5.0}
    counted = {name: saved["spent"][name] for name in ("tokens", "positions", "examples")}
    assert counted.items() <= earlier.items()
    second = make_trainer(tmp_path, tokenizer, max_steps=4, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole, alone = second.clock.spent(), make_trainer(tmp_path, tokenizer, max_steps=4, save_strategy="no")
    alone.train()
    for name in ("tokens", "positions", "examples"):
        assert whole[name] == alone.clock.spent()[name] > earlier[name]
    for name in ("train_seconds", "teacher_seconds", "step_seconds"):
        assert whole[name] > saved["spent"][name] > 0
    figures = second.throughput()
    assert figures["samples_per_second"] == pytest.approx(whole["examples"] / whole["train_seconds"])
    again = make_trainer(tmp_path, tokenizer, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.clock.spent() == saved["spent"]


def test_the_teacher_is_timed_in_training_alone(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert trainer.throughput() == {}
    calls, features = [], trainer.teacher.features
    trainer.teacher.features = lambda inputs: calls.append(torch.is_grad_enabled()) or features(inputs)
    trainer.train()
    figures = trainer.throughput()
    assert figures["teacher_seconds"] > 0
    assert figures["student_seconds"] > 0
    runtime = next(line["train_runtime"] for line in trainer.state.log_history if "train_runtime" in line)
    assert figures["teacher_seconds"] + figures["student_seconds"] < runtime
    assert any(calls)
    assert not all(calls)
