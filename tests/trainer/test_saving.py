"""Saves that fail: the training goes on, the former checkpoint stays, and the next save is tried."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.trainers import FILES, loss_lines, make_trainer
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback

from kava_trainer.trainer import saving
from kava_trainer.trainer.checkpoint import (
    MANIFEST_FILE,
    broken_reason,
    list_checkpoints,
    read_manifest,
    write_manifest,
)
from kava_trainer.trainer.weights import Weights
from kava_trainer.utils.errors import BadRequest, RunFailed

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "lr_scheduler_type": "constant"}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURES = {
    "no space for the optimizer": (torch, "save", RuntimeError("[enforce fail] file write failed")),
    "no space for the folder": (saving, "stage", OSError(errno.ENOSPC, "No space left on device")),
    "a read-only disk": (saving, "stage", OSError(errno.EROFS, "Read-only file system")),
    "no space for the weights": (Weights, "write_student", SafetensorError("I/O error: No space left on device")),
    "no space for the tokenizer": (Weights, "write_student", Exception("No space left on device (os error 28)")),
    "no space for the manifest": (saving, "write_manifest", OSError(errno.ENOSPC, "No space left on device")),
    "a rename that fails": (saving, "publish", OSError(errno.EIO, "Input/output error")),
}


def fail_at(trainer, monkeypatch, steps, owner, name, error):
    """Let a function fail while these steps are saved."""
    original = getattr(owner, name)

    def work(*args, **kwargs):
        if trainer.state.global_step in steps:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, work)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_save_that_fails_costs_one_checkpoint_and_nothing_else(tmp_path, tokenizer, monkeypatch, failure, capsys):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING)
    fail_at(trainer, monkeypatch, {2}, *FAILURES[failure])
    trainer.train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert all(broken_reason(folder) is None for folder in list_checkpoints(tmp_path))
    assert not list(tmp_path.glob(".*"))
    assert {(problem["step"], problem["kind"]) for problem in trainer.problems} == {(2, "save")}
    told = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-2'} could not be written (" in told
    assert "GB are free there)" in told
    assert f"Resume from {tmp_path / 'checkpoint-1'}, which is sound." in told
    assert len(loss_lines(trainer)) == 4


def test_two_saves_that_fail_in_a_row_end_the_run(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING)
    fail_at(trainer, monkeypatch, {2, 3}, saving, "stage", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunFailed, match=r"checkpoint-3 could not be written .*No space.*Resume from .*checkpoint-1,"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_projector_file_that_cannot_be_written_does_not_end_the_run(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING)
    (tmp_path / "proj_step_2.pth").mkdir(parents=True)
    trainer.train()
    assert [problem["action"] for problem in trainer.problems] == ["went on without proj_step_2.pth"]
    assert len(list_checkpoints(tmp_path)) == 4


def test_rotation_waits_until_the_newer_checkpoint_is_whole(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING, save_total_limit=1)
    fail_at(trainer, monkeypatch, {3}, saving, "publish", OSError(errno.EIO, "Input/output error"))
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append([folder.name for folder in list_checkpoints(tmp_path)])

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-2"], ["checkpoint-4"]]


@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=pytest.mark.slow)])
def test_the_checkpoint_of_a_signal_is_kept_beside_the_best_one(tmp_path, tokenizer, strategy):
    settings = {
        **SAVING, "max_steps": 9, "save_total_limit": 1, "metric_for_best_model": "eval_loss", "save_steps": 2,
        "eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 2, "load_best_model_at_end": True,
        "greater_is_better": True, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, tokenizer, **settings)

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Signal())
    trainer.train()
    assert trainer.emergency.received == signal.SIGTERM
    assert trainer.state.global_step == 7
    assert [folder.name for folder in list_checkpoints(tmp_path)][-1] == "checkpoint-7"
    assert Path(trainer.state.best_model_checkpoint).is_dir()
    assert 7 not in [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    straight = make_trainer(tmp_path / "straight", tokenizer, **settings)
    straight.train()
    resumed = make_trainer(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert loss_lines(resumed) == loss_lines(straight)


def test_a_folder_that_vanishes_is_made_again(tmp_path, tokenizer):
    output = tmp_path / "out"
    trainer = make_trainer(output, tokenizer, **SAVING)

    class Vanish(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shutil.rmtree(output)

    trainer.add_callback(Vanish())
    trainer.train()
    assert [folder.name for folder in list_checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]


def test_a_disk_that_is_really_full(tmp_path, tokenizer):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a file system of a given size cannot be mounted here")
    try:
        trainer = make_trainer(disk / "out", tokenizer, **SAVING, save_total_limit=3)

        class Fill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    (disk / "large").write_bytes(bytes(shutil.disk_usage(disk).free - 2**15))
                if state.global_step == 2:
                    (disk / "large").unlink()

        trainer.add_callback(Fill())
        trainer.train()
        names = [folder.name for folder in list_checkpoints(disk / "out")]
        assert names == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
        assert all(broken_reason(folder) is None for folder in list_checkpoints(disk / "out"))
        assert {(problem["step"], problem["kind"]) for problem in trainer.problems} == {(2, "save")}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_holds_all_that_resuming_reads_and_lists_it(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING)
    trainer.identity = {"seed": 42}
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    listed = read_manifest(folder)
    assert listed["run"] == {"seed": 42}
    on_disk = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert set(listed["files"]) == on_disk
    assert on_disk >= {*FILES, "progress_0.pth", "rng_state.pth"}


def test_the_first_line_after_resuming_averages_the_steps_before_it_too(tmp_path, tokenizer):
    settings = {**SAVING, "max_steps": 6, "logging_steps": 4, "gradient_accumulation_steps": 1}
    straight = make_trainer(tmp_path, tokenizer, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "again", tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert loss_lines(resumed) == loss_lines(straight)
    assert [line["step"] for line in loss_lines(resumed)] == [4, 6]


def test_intervals_that_were_changed_hold_from_the_checkpoint_on(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, **SAVING).train()
    resumed = make_trainer(tmp_path / "again", tokenizer, **{**SAVING, "max_steps": 6, "logging_steps": 2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [line["step"] for line in loss_lines(resumed)] == [1, 2, 3, 4, 6]


def test_true_takes_the_newest_sound_checkpoint_or_starts_afresh(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, **SAVING)
    first.train(resume_from_checkpoint=True)
    assert first.state.global_step == 4
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    second = make_trainer(tmp_path, tokenizer, **{**SAVING, "save_strategy": "no"})
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    second.add_callback(Count())
    second.train(resume_from_checkpoint=True)
    assert steps == [4]


def test_early_stopping_and_the_best_model_are_resumed(tmp_path, tokenizer):
    settings = {
        **SAVING, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss",
        "greater_is_better": False, "load_best_model_at_end": True, "learning_rate": 3e-2,
    }  # fmt: skip

    def trainer_in(folder):
        trainer = make_trainer(folder, tokenizer, **settings)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        return trainer

    straight = trainer_in(tmp_path)
    straight.train()
    saved = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert saved["best_metric"] is not None
    assert saved["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 0
    resumed = trainer_in(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name in ("global_step", "best_metric", "best_global_step", "best_model_checkpoint"):
        assert getattr(resumed.state, name) == getattr(straight.state, name), name


def test_progress_that_cannot_be_read_is_one_clear_error(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "progress_0.pth").write_bytes(b"half")
    with pytest.raises(BadRequest, match=r"checkpoint-2 cannot be resumed: progress_0.pth has 4 bytes"):
        make_trainer(tmp_path, tokenizer, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    write_manifest(checkpoint, None)
    with pytest.raises(BadRequest, match=r"checkpoint-2 cannot be loaded"):
        make_trainer(tmp_path, tokenizer, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_transformers_own_checkpoint_on_sigterm_does_not_take_the_signal_away(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, enable_jit_checkpoint=True)
    assert not trainer.args.enable_jit_checkpoint
    assert not any("JIT" in type(callback).__name__ for callback in trainer.callback_handler.callbacks)


class SignalAt(TrainerCallback):
    """A SIGTERM in the step after this one."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("fails", "signal_at", "tried_again"),
    [(2, None, True), (4, None, False), (2, 1, False)],
    ids=["on the way", "the last", "of a signal"],
)
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_only_a_save_that_has_a_next_one_says_so(
    tmp_path, tokenizer, monkeypatch, capsys, strategy, fails, signal_at, tried_again
):
    settings = {**SAVING, "save_strategy": strategy, "gradient_accumulation_steps": 4, "num_train_epochs": 4}
    trainer = make_trainer(tmp_path, tokenizer, **settings, count=16)  # a step is an epoch
    if signal_at is not None:
        trainer.add_callback(SignalAt(signal_at))
    fail_at(trainer, monkeypatch, {fails}, saving, "stage", OSError(errno.ENOSPC, "No space left on device"))
    trainer.train()
    told = capsys.readouterr().out
    newest = f"Resume from {tmp_path / f'checkpoint-{fails - 1}'}, which is sound."
    assert (f"The training tries again at the next save. {newest}" in told) is tried_again
    assert (f"The training ends here, without it. {newest}" in told) is not tried_again
    assert {problem["kind"] for problem in trainer.problems} == {"save"}


def test_two_saves_that_fail_at_the_end_leave_the_finished_student(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer, **SAVING)
    fail_at(trainer, monkeypatch, {3, 4}, saving, "stage", OSError(errno.ENOSPC, "No space left on device"))
    trainer.train()
    trainer.save_finals(tmp_path / "student", tmp_path / "projector.pth")
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "The training ends here, without it." in capsys.readouterr().out
    assert [problem["step"] for problem in trainer.problems] == [3, 4]
