"""Runs that are killed, signalled, stopped and damaged: each goes on as if nothing had happened."""

import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import fault_child
from helpers.data import write_problems
from helpers.hashes import final_hash
from helpers.matrices import a_quarter, matrix
from helpers.models import tiny_lora_llama
from helpers.outcomes import finish
from helpers.processes import Run

from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import broken_reason, find_newest_checkpoint, list_checkpoints
from run_kava import main

pytestmark = pytest.mark.slow

DEADLY = ("fsync", "replace", "rmtree", "manifest", "torch.save", "unlink")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """What a run that nothing happens to ends with, by its number of ranks."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"straight{ranks}")
        run = Run(fault_child.run, folder, folder, data, ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
        found[ranks] = final_hash(folder)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have names under Linux")
def test_threads_that_could_abort_an_exiting_process_are_ended(data, tmp_path):
    run = Run(fault_child.run_and_look, tmp_path, tmp_path, data, ranks=2)
    assert run.wait() == [0, 0], run.output()


def assert_nothing_broken(output):
    assert not list(output.glob(".*"))
    assert all(broken_reason(folder) is None for folder in list_checkpoints(output))
    for file in output.rglob("*.pth"):
        if not file.name.startswith("rng_state"):  # numpy's, which Trainer reads with an allowance for them
            torch.load(file, weights_only=True)
    assert json.loads((output / "run_summary.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("least_kills", [8, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_never_stopped(
    data, uninterrupted, tmp_path, least_kills
):
    expected, rng, kills, inside, runs = uninterrupted[1], random.Random(0), 0, 0, 0
    started = time.monotonic()
    assert Run(fault_child.run, tmp_path / "timed", tmp_path / "timed", data).wait() == [0]
    duration = time.monotonic() - started
    while kills < least_kills:
        folder, codes = tmp_path / str(runs), None
        runs += 1
        while codes != [0]:
            if rng.random() < 0.6:
                moment = rng.randint(1, 45)
                run = Run(fault_child.run_and_die, folder, folder, data, moment, DEADLY)
                codes = run.wait()
                inside += codes == [-signal.SIGKILL]
            else:
                run = Run(fault_child.run, folder, folder, data)
                time.sleep(rng.uniform(0.4, 1.0) * duration)
                run.kill()
                codes = run.wait()
            assert codes in ([0], [-signal.SIGKILL]), run.output()
            kills += codes == [-signal.SIGKILL]
        assert final_hash(folder) == expected
        assert_nothing_broken(folder / "out")
    print(f"{kills} kills, {inside} of them in the middle of writing, in {runs} runs")
    assert inside >= least_kills // 4


def test_a_cut_or_a_flipped_byte_in_any_file_of_a_checkpoint_is_found_and_skipped(data, uninterrupted, tmp_path):
    run = Run(fault_child.run, tmp_path, tmp_path, data)
    assert run.wait() == [0], run.output()
    older, newest = list_checkpoints(tmp_path / "out")
    rng, files = random.Random(1), sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "projector.pth", "progress_0.pth", "manifest.json",
            "rng_state.pth", "trainer_state.json", "config.json"} <= {path.name for path in files}  # fmt: skip
    for file in files:
        content = file.read_bytes()
        position = rng.randrange(len(content))
        flipped = bytes([content[position] ^ (1 << rng.randrange(8))])
        for damage in (content[: rng.randrange(len(content))], content[:position] + flipped + content[position + 1 :]):
            file.write_bytes(damage)
            found = find_newest_checkpoint(tmp_path / "out")
            assert found.checkpoint == older
            assert [folder for folder, _ in found.skipped] == [newest]
        file.write_bytes(content)
    assert find_newest_checkpoint(tmp_path / "out").checkpoint == newest
    (newest / "optimizer.pt").write_bytes(b"broken")
    shutil.rmtree(tmp_path / "out" / "final_student")
    again = Run(fault_child.run, tmp_path, tmp_path, data)
    assert again.wait() == [0], again.output()
    assert f"Skipped {newest}: optimizer.pt has 6 bytes in place of" in again.output()
    assert f"Resuming from {older}" in again.output()
    assert final_hash(tmp_path) == uninterrupted[1]


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}


STAGES = ("training", "save", "evaluation", "calibration")


@pytest.mark.parametrize(
    ("name", "stage", "ranks"),
    matrix(list(itertools.product(SIGNALS, STAGES, (1, 2))), lambda name, stage, rank: rank == (name + stage) % 2),
)
def test_a_signal_at_any_stage_saves_and_the_printed_command_goes_on(data, uninterrupted, tmp_path, name, stage, ranks):
    signalled_and_resumed(data, uninterrupted, tmp_path, name, stage, ranks)


@pytest.mark.parametrize("stage", ["final evaluation", "generation"])
def test_a_signal_after_the_training_keeps_everything(data, uninterrupted, tmp_path, stage):
    changes = {"evaluate_generation": True, "generation_max_new_tokens": 4} if stage == "generation" else {}
    signalled_and_resumed(data, uninterrupted, tmp_path, "SIGTERM", stage, 1, changes)


def signalled_and_resumed(data, uninterrupted, folder, name, stage, ranks, changes=None):
    rank = 0 if stage == "save" else ranks - 1  # the first one writes
    run = Run(fault_child.run_and_signal, folder, folder, data, stage, name, rank, 1, changes, ranks=ranks)
    assert run.wait() == [SIGNALS[name]] * ranks, run.output()
    if stage == "generation":  # before the training: there is nothing to save, and nothing is touched
        assert "Interrupted before the first step" in run.output()
        assert not list((folder / "out").iterdir())
        return
    output, text = folder / "out", run.output()
    summary = json.loads((output / "run_summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert not list(output.glob(".*"))
    checkpoints = list_checkpoints(output)
    if stage == "calibration":
        command = re.search(r"^No step was done\. Start again with: .*run_kava.py (.*)$", text, re.M)[1]
        assert not checkpoints
    else:
        step = int(re.search(r"Saved after step (\d+)", text)[1])
        assert step == summary["global_step"]
        command = re.search(r"^Resume with: .*run_kava.py (.*)$", text, re.M)[1]
        assert f"--resume_from_checkpoint {output / f'checkpoint-{step}'}" in command
        assert checkpoints[-1].name == f"checkpoint-{step}"
        assert broken_reason(checkpoints[-1]) is None
        if stage != "final evaluation":
            assert load_projectors(output / "emergency_projector.pth")
    resumed = Run(main, folder, shlex.split(command), ranks=ranks)
    assert resumed.wait() == [0] * ranks, resumed.output()
    assert final_hash(folder) == uninterrupted[ranks]
    assert_nothing_broken(output)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_second_signal_leaves_at_once_and_touches_nothing(data, tmp_path, first):
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "save", first, 0, 2)
    assert run.wait() == [SIGNALS[first]]
    assert not list_checkpoints(tmp_path / "out")
    assert not (tmp_path / "out" / "emergency_projector.pth").exists()


@pytest.mark.parametrize(
    "name", ["SIGINT", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("SIGTERM", "SIGUSR1"))]
)
def test_a_signal_to_the_whole_process_group_spares_the_data_workers(data, uninterrupted, tmp_path, name):
    workers = {"dataloader_num_workers": 2}
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "training", name, 0, 1, workers, True)
    assert run.wait() == [SIGNALS[name]], run.output()
    command = re.search(r"^Resume with: .*run_kava.py (.*)$", run.output(), re.M)[1]
    resumed = Run(main, tmp_path, shlex.split(command))
    assert resumed.wait() == [0], resumed.output()
    assert final_hash(tmp_path) == uninterrupted[1]


def test_a_signal_while_the_cache_is_written_keeps_what_was_read(data, tmp_path):
    cache = {"teacher_cache_dir": tmp_path / "cache", "max_tokens_per_batch": 128}
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "cache", "SIGTERM", 0, 1, cache)
    assert run.wait() == [143], run.output()
    assert "Interrupted before the first step" in run.output()
    assert list((tmp_path / "cache").glob("states-*.safetensors"))
    assert not list((tmp_path / "cache").glob(".*"))
    again = Run(fault_child.run, tmp_path, tmp_path, data, cache)
    assert again.wait() == [0], again.output()
    missing, total = map(int, re.search(r"^(\d+) of (\d+) examples are to be written", again.output(), re.M).groups())
    assert 0 < missing < total


def test_a_signal_during_the_control_keeps_the_student(data, tmp_path):
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "control", "SIGTERM", 0, 1, {"run_control": True})
    assert run.wait() == [143], run.output()
    assert "Resume with" in run.output()
    assert (tmp_path / "out" / "final_student").is_dir()
    assert list_checkpoints(tmp_path / "out" / "control")
    command = re.search(r"^Resume with: .*run_kava.py (.*)$", run.output(), re.M)[1]
    resumed = Run(main, tmp_path, shlex.split(command))
    assert resumed.wait() == [0], resumed.output()
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["evaluation"]["control_sft"] is not None


SETTINGS = list(itertools.product((1, 3), (0, 2), (0, 40), (False, True)))
FOUR_RANKS = [pytest.param(*SETTINGS[place], 4, marks=pytest.mark.exhaustive) for place in (2, -2)]
"""A stream is resumed by four ranks in every run of CI: test_stream_resume."""


@pytest.mark.parametrize(
    ("accumulation", "workers", "packing", "bf16", "ranks"),
    [*matrix([(*cell, ranks) for cell in SETTINGS for ranks in (1, 2)], a_quarter), *FOUR_RANKS],
)
def test_a_resumed_run_has_the_same_losses_and_weights(tmp_path, accumulation, workers, packing, bf16, ranks):
    settings = {
        "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "bf16": bf16,
        "dataloader_num_workers": workers, "max_tokens_per_batch": packing, "max_steps": 7, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 9, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2,
        "lr_scheduler_type": "cosine", "projector_dropout": 0.1, "metric_for_best_model": "eval_loss",
        "layer_mapping": "uniform:2",
    }  # fmt: skip
    straight = finish(tmp_path / "straight", None, settings, ranks)
    assert straight["world_size"] == ranks
    assert straight["wrapper"] == ("DistributedDataParallel" if ranks > 1 else "DistillationModel")
    assert straight["packs"] == (settings["max_tokens_per_batch"] > 0)
    number = SETTINGS.index((accumulation, workers, packing, bf16))
    for stop in fault_child.seeded(number).sample(range(1, 7), 2):
        resumed = finish(
            tmp_path / f"again{stop}", tmp_path / "straight" / "run" / f"checkpoint-{stop}", settings, ranks
        )
        for name in ("weights", "optimizer", "rates", "losses", "lines"):
            assert resumed[name] == straight[name], (stop, name)


@pytest.mark.parametrize(
    ("ranks", "bf16"),
    [(1, True), (2, False), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, False), (2, True)))],
)
def test_a_resumed_run_with_adapters_has_the_same_losses_and_weights(tmp_path, ranks, bf16):
    settings = {
        "bf16": bf16, "model": partial(tiny_lora_llama, lora_dropout=0.1), "max_steps": 7, "save_strategy": "steps",
        "save_steps": 1, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "projector_dropout": 0.1,
        "gradient_checkpointing": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    straight = finish(tmp_path / "straight", None, settings, ranks)
    assert (straight["world_size"], straight["packs"]) == (ranks, True)
    for stop in (2, 5):
        checkpoint = tmp_path / "straight" / "run" / f"checkpoint-{stop}"
        assert not (checkpoint / "model.safetensors").exists()
        resumed = finish(tmp_path / f"again{stop}", checkpoint, settings, ranks)
        for name in ("weights", "optimizer", "rates", "losses", "lines"):
            assert resumed[name] == straight[name], (stop, name)


CASES = [("training", 1, "none"), ("training", 2, "4bit"), ("save", 1, "4bit"), ("evaluation", 1, "none")]
OTHERS = [("training", 1, "4bit"), ("training", 2, "none"), ("save", 1, "none"), ("evaluation", 1, "4bit")]


@pytest.mark.parametrize(
    ("stage", "ranks", "bits"), [*CASES, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in OTHERS)]
)
def test_a_signal_to_a_run_with_adapters_loses_nothing(data, tmp_path, stage, ranks, bits):
    changes = {"use_peft": True, "lora_r": 4, "student_model_name_or_path": TEACHER_FOLDER}
    changes["student_quantization"] = bits
    whole = Run(fault_child.run, tmp_path / "whole", tmp_path / "whole", data, changes, ranks=ranks)
    assert whole.wait() == [0] * ranks, whole.output()
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, stage, "SIGTERM", 0, 1, changes, ranks=ranks)
    assert run.wait() == [143] * ranks, run.output()
    command = re.search(r"^Resume with: .*run_kava.py (.*)$", run.output(), re.M)[1]
    resumed = Run(main, tmp_path, shlex.split(command), ranks=ranks)
    assert resumed.wait() == [0] * ranks, resumed.output()
    assert final_hash(tmp_path) == final_hash(tmp_path / "whole")


def test_the_seed_of_the_signal_stages_is_where_it_says(data, tmp_path):
    """So that no stage of the matrix is another one by a change elsewhere."""
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "training", "SIGTERM")
    assert run.wait() == [143]
    assert "Saved after step 4" in run.output()
    assert os.listdir(tmp_path / "out")
