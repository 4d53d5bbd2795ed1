"""Runs over a stream that are stopped and resumed: they see what they would have seen, and end with equal weights."""

import itertools
import json
import re
import shlex

import pytest
import torch
from helpers import fault_child, stream_child
from helpers.data import write_problems
from helpers.hashes import final_hash
from helpers.matrices import a_quarter, matrix
from helpers.processes import Run

from kava_trainer.data import streaming
from run_kava import main

ROWS = 24
"""Three of them are held out, so a pass has 21 examples: no batch size and no number of ranks divides them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", ROWS)


def finish(folder, data, checkpoint, settings, ranks=1):
    output, resume = str(folder / "result"), str(checkpoint) if checkpoint else None
    asked = (str(folder / "run"), str(data), output, resume, dict(settings))
    folder.mkdir()
    if ranks == 1:
        stream_child.train(*asked)
    else:
        run = Run(stream_child.train, folder, *asked, ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
    return [torch.load(f"{output}{rank}.pt", weights_only=True) for rank in range(ranks)]


def settings_of(accumulation=1, workers=0, packing=40, buffer=8, steps=8):
    return {
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
        "max_tokens_per_batch": packing,
        "shuffle_buffer": buffer,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 99,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "layer_mapping": "uniform:2",
    }


def resumed_as_straight(folder, data, settings, stops, ranks=1):
    straight = finish(folder / "straight", data, None, settings, ranks)
    assert straight[0]["world_size"] == ranks
    assert straight[0]["wrapper"] == ("DistributedDataParallel" if ranks > 1 else "DistillationModel")
    assert straight[0]["packs"] == (settings["max_tokens_per_batch"] > 0)
    passes = {place[0] for result in straight for place in result["place"]["places"].values()}
    assert max(passes) >= 1, "the run has to go over the end of the stream"
    for stop in stops:
        checkpoint = folder / "straight" / "run" / f"checkpoint-{stop}"
        resumed = finish(folder / f"again{stop}", data, checkpoint, settings, ranks)
        done = stop * settings["gradient_accumulation_steps"]
        for before, after in zip(straight, resumed, strict=True):
            assert after["seen"] == before["seen"][done:], stop
            assert after["place"] == before["place"]
            for name in ("weights", "losses", "lines"):
                assert after[name] == before[name], (stop, name)


@pytest.mark.parametrize(
    ("accumulation", "workers", "stops"), [(3, 0, (4,)), pytest.param(2, 2, (3,), marks=pytest.mark.slow)]
)
def test_a_resumed_stream_goes_on_with_the_next_example(tmp_path, data, accumulation, workers, stops):
    resumed_as_straight(tmp_path, data, settings_of(accumulation, workers), stops)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_share_an_odd_number_of_examples_and_resume(tmp_path, data, ranks):
    resumed_as_straight(tmp_path, data, settings_of(accumulation=2, steps=6), (3,), ranks)


@pytest.mark.slow
def test_a_row_that_only_one_process_reads_is_left_out_and_told_by_the_first(tmp_path):
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    bad = streaming.CHECKED_ROWS + 6
    rows = [{"messages": turns if number != bad else turns[:1]} for number in range(1, bad + 40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (str(tmp_path / "run"), str(tmp_path / "data.jsonl"), str(tmp_path / "result"), None)
    settings = settings_of(buffer=0, steps=3) | {"per_device_train_batch_size": 180, "max_tokens_per_batch": None}
    run = Run(stream_child.train, tmp_path, *asked, settings, ranks=2)
    assert run.wait() == [0, 0], run.output()
    told = [log.read_text().count("A row of the stream cannot be used and is left out") for log in run.logs]
    assert told == [1, 0]


@pytest.mark.slow
def test_two_processes_fill_one_cache_from_a_stream_and_read_the_same_from_it(tmp_path, data):
    changes = {"streaming": True, "shuffle_buffer": 8, "max_eval_samples": 3, "max_steps": 6, "logging_steps": 1}
    cached = {**changes, "teacher_cache_dir": tmp_path / "cache", "dataloader_num_workers": 2}
    shown = []
    for name, options in (("online", {**cached, "teacher_cache_dir": None}), ("first", cached), ("second", cached)):
        run = Run(fault_child.run, tmp_path / name, tmp_path / name, data, options, ranks=2)
        assert run.wait() == [0, 0], run.output()
        shown.append(run.logs[0].read_text())
    counts = re.search(
        r"^(\d+) of \d+ examples beside the stream.*^(\d+) examples of the stream", shown[1], re.M | re.S
    )
    assert sum(map(int, counts.groups())) == ROWS
    assert "\n0 examples of the stream were missing" in shown[2]
    online, first, second = (re.findall(r"^\[Step \d+\] Loss: (\S+)", text, re.M) for text in shown)
    assert len(first) == 6
    assert first == second
    assert [float(loss) for loss in first] == pytest.approx([float(loss) for loss in online], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_a_signal_leaves_a_checkpoint_that_the_printed_command_goes_on_from(tmp_path, data, workers):
    changes = {"streaming": True, "shuffle_buffer": 8, "max_eval_samples": 3, "dataloader_num_workers": workers}
    straight = Run(fault_child.run, tmp_path / "straight", tmp_path / "straight", data, changes)
    assert straight.wait() == [0], straight.output()
    run = Run(fault_child.run_and_signal, tmp_path, tmp_path, data, "training", "SIGTERM", 0, 1, changes)
    assert run.wait() == [143], run.output()
    command = re.search(r"^Resume with: .*run_kava.py (.*)$", run.output(), re.M)[1]
    resumed = Run(main, tmp_path, shlex.split(command))
    assert resumed.wait() == [0], resumed.output()
    assert final_hash(tmp_path) == final_hash(tmp_path / "straight")


MATRIX = list(itertools.product((1, 3), (0, 2), (0, 40), (0, 8)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "workers", "packing", "buffer", "ranks"),
    matrix([(*cell, ranks) for cell in MATRIX for ranks in (1, 2)], a_quarter),
)
def test_every_way_of_reading_resumes_at_the_right_example(
    tmp_path, data, accumulation, workers, packing, buffer, ranks
):
    steps = 12 if accumulation == 1 else 5
    settings = settings_of(accumulation, workers, packing, buffer, steps)
    stop = MATRIX.index((accumulation, workers, packing, buffer)) % (steps - 1) + 1
    resumed_as_straight(tmp_path, data, settings, (stop,), ranks)
