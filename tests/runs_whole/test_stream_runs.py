"""Whole runs over a stream, as a user starts them: what they print, leave and refuse."""

import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers.caches import IDENTITY, LAYERS, teacher_model
from helpers.data import write_problems
from helpers.models import TEACHER_LAYERS
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from helpers.stream_child import Noting, stream_of
from helpers.trainers import make_trainer

import run_kava
from kava_trainer.distillation import teacher_cache
from kava_trainer.distillation.state_shards import ShardWriter
from kava_trainer.distillation.teacher_cache import TeacherCache
from kava_trainer.runs import start as stages
from kava_trainer.runs.fill_cache import announce, fill_from_stream
from kava_trainer.trainer.checkpoint import broken_reason, find_newest_checkpoint
from kava_trainer.utils.console import Console
from kava_trainer.utils.errors import BadRequest

OPTIONS = {
    **QUICKSTART,
    **SHORT,
    "streaming": True,
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "calibration_tokens": 600,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
}
OPTIONS.pop("max_train_samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", 60)


def start(folder, data, **changes):
    options = {**OPTIONS, "dataset_name": data, "output_dir": folder / "out", **changes}
    return run_kava.main(words({name: value for name, value in options.items() if value is not None}))


def losses(text):
    return re.findall(r"^\[Step (\d+)\] Loss: (\S+) \| CosSim: (\S+)", text, re.M)


@pytest.mark.slow
def test_a_stream_is_trained_on_with_a_control_and_a_cache_and_resumed(tmp_path, data, capsys):
    cache = {"teacher_cache_dir": tmp_path / "cache", "run_control": True, "max_steps": 4}
    assert start(tmp_path / "cached", data, **cache) == 0
    shown = capsys.readouterr().out
    for line in (
        "Data set streamed: examples are read while the model trains, mixed within 10000 rows",
        "8 held-out examples of 8",
        "examples beside the stream are to be written to",
        "Up to 16 examples of the stream will be read from",
        "KAVA beat the control|the control",
    ):
        assert re.search(line, shown), line
    cached = losses(shown)
    summary = summary_of(tmp_path / "cached" / "out")
    assert summary["evaluation"]["control_sft"]["perplexity"] > 1
    assert summary["arguments"]["streaming"] is True
    assert start(tmp_path / "again", data, **{**cache, "run_control": False}) == 0
    shown = capsys.readouterr().out
    assert "\n0 examples of the stream were missing" in shown
    assert losses(shown) == cached[:4]
    assert start(tmp_path / "online", data, max_steps=2) == 0
    assert start(tmp_path / "online", data, max_steps=4, resume_from_checkpoint=True) == 0
    online = losses(capsys.readouterr().out)
    assert [step for step, *_ in online] == ["0001", "0002", "0003", "0004"]
    for left, right in zip(online, cached[:4], strict=True):
        assert float(left[1]) == pytest.approx(float(right[1]), rel=0.02)


def refused(capsys, folder, data, **changes):
    capsys.readouterr()
    assert start(folder, data, **changes) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "Error: max_steps is missing: with streaming nobody knows how many examples there are"),
        ({"save_strategy": "epoch"}, "save_strategy is epoch, but a stream is read on without one; write steps."),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1; it cannot be negative."),
        ({"ignore_data_skip": True}, "ignore_data_skip has no use with streaming"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy group_by_length needs the lengths"),
        ({"dataloader_in_order": False}, "dataloader_in_order is false, but a stream"),
        ({"max_eval_samples": 60}, "ends within its first 60 rows"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, data, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(stages, "load_models", lambda *_: pytest.fail("models were loaded"))
    assert message in refused(capsys, tmp_path, data, **changes)


def test_a_checkpoint_of_another_stream_is_refused(tmp_path, data, capsys):
    assert start(tmp_path, data, max_steps=2) == 0
    other = write_problems(tmp_path / "problems.jsonl", 60, seed=1)
    for changes, told in (
        ({"dataset_name": other}, "data differs"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers was 0, is 2"),
        ({"shuffle_buffer": 7}, "shuffle_buffer was 10000, is 7"),
        ({"streaming": False}, "streaming was True, is False"),
        ({"max_length": 60}, "max_length was 64, is 60"),
    ):
        error = refused(capsys, tmp_path, data, **{"max_steps": 4, "resume_from_checkpoint": True, **changes})
        assert re.search(rf"was written by another run: .*{told}", error), error


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_line_that_breaks_the_stream_in_the_middle_ends_the_run_and_keeps_its_checkpoint(tmp_path, capsys, workers):
    row = json.dumps({"prompt": "2+3=", "completion": "5", "note": "x" * 15_000}) + "\n"
    (tmp_path / "data.jsonl").write_text(row * 1400 + row.replace(":", " ", 1) + row * 99 + "         \n")
    options = {"shuffle_buffer": 4, "max_steps": 50, "per_device_train_batch_size": 32, "save_steps": 5}
    options |= {"dataloader_num_workers": workers, "calibration_tokens": 300, "logging_steps": 100}
    assert start(tmp_path, tmp_path / "data.jsonl", **options) == 1
    error = capsys.readouterr().err
    newest = find_newest_checkpoint(tmp_path / "out").checkpoint
    assert "line 1401 is not valid JSON" in error
    assert f"Resume from {newest}, which is sound." in error
    assert broken_reason(newest) is None
    assert summary_of(tmp_path / "out")["status"] == "failed"
    (tmp_path / "data.jsonl").write_text(row * 1400 + " " * (len(row) - 1) + "\n" + row * 99 + "         \n")
    assert start(tmp_path, tmp_path / "data.jsonl", **options, resume_from_checkpoint=True) == 0


def filled(folder, stream, steps, **changes):
    cache = TeacherCache(folder, IDENTITY, LAYERS, "bfloat16")
    settings = {"max_steps": steps, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    args = SimpleNamespace(**{**settings, "dataloader_num_workers": 0, **changes})
    return cache, fill_from_stream(cache, teacher_model(), stream, args, 64, nullcontext)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gets_the_examples_that_will_be_read_and_no_others(tmp_path, data, tokenizer, workers):
    stream = stream_of(data, tokenizer)
    cache, written = filled(tmp_path / "few", stream, 4, dataloader_num_workers=workers)
    everything = [example["input_ids"] for example in stream.one_pass()]
    assert written == 24
    assert sum(ids in cache.shards for ids in everything) == 24
    if workers == 0:
        assert all(ids in cache.shards for ids in everything[:24])
    assert filled(tmp_path / "few", stream, 4, dataloader_num_workers=workers)[1] == 0
    _, written = filled(tmp_path / "few", stream, 5, dataloader_num_workers=workers)
    assert written == 6
    cache, written = filled(tmp_path / "all", stream, 10, dataloader_num_workers=workers)
    assert cache.missing(everything) == []
    assert written == len({tuple(ids) for ids in everything})


def test_a_filling_that_was_cut_off_goes_on_where_it_was(tmp_path, data, tokenizer, monkeypatch):
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (1,))
    monkeypatch.setattr(teacher_cache, "GROUP", 5)
    stream, features, calls = stream_of(data, tokenizer), teacher_cache.OnlineTeacher.features, []

    def failing(self, inputs):
        calls.append(inputs)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return features(self, inputs)

    monkeypatch.setattr(teacher_cache.OnlineTeacher, "features", failing)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, stream, 4)
    done = len(TeacherCache(tmp_path, IDENTITY, LAYERS, "bfloat16").shards.paths)
    assert 0 < done < 24
    assert filled(tmp_path, stream, 4)[1] == 24 - done


def test_a_second_training_on_a_stream_begins_with_its_first_example(tmp_path, data, tokenizer):
    stream, seen = stream_of(data, tokenizer), []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.train_dataset = stream
        noting = Noting(trainer)
        trainer.train()
        seen.append(noting.seen)
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


def test_another_version_of_datasets_is_named_when_a_stream_is_resumed(tmp_path, data, capsys, monkeypatch):
    assert start(tmp_path, data, max_steps=2) == 0
    monkeypatch.setattr("datasets.__version__", "99.0")
    assert start(tmp_path, data, max_steps=2, resume_from_checkpoint=True) == 0
    assert re.search(r"Differs from the checkpoint: datasets_version was \S+, is 99.0", capsys.readouterr().out)


def test_the_announcement_is_an_estimate_for_no_more_than_there_is(tmp_path, data, tokenizer, capsys, monkeypatch):
    stream = stream_of(data, tokenizer)
    lengths = [len(example["input_ids"]) for example in stream.one_pass()]
    cache = TeacherCache(tmp_path, IDENTITY, [TEACHER_LAYERS], "bfloat16")
    args = SimpleNamespace(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    size = announce(Console(True), cache, stream, args, 64)
    assert size == pytest.approx(24 * sum(lengths) / len(lengths) * 128, rel=0.01)
    assert "Up to 24 examples of the stream" in capsys.readouterr().out
    args.max_steps = 1000
    assert announce(Console(True), cache, stream, args, 64) == sum(lengths) * 128
    assert "Up to 57 examples" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sum(lengths) * 128 - 1))
    with pytest.raises(BadRequest, match="The teacher cache would take"):
        announce(Console(True), cache, stream, args, 64)
    cache.shards.paths = [data]  # as if so much were there already
    announce(Console(True), cache, stream, args, 64)
