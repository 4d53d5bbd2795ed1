"""Long work shows how far it is, on a terminal, and nowhere else."""

import fcntl
import io
import os
import re
import struct
import sys
import termios
import threading
from contextlib import contextmanager

import pytest
from helpers.data import random_examples, write_problems
from helpers.models import tiny_llama
from helpers.places import ROOT
from helpers.programs import SHORT, words
from helpers.stream_child import stream_of
from helpers.trainers import make_trainer

import run_kava
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.evaluation.teacher_fidelity import read_examples
from kava_trainer.runs import start
from kava_trainer.runs.display import shows_bars
from kava_trainer.utils import progress_bar
from kava_trainer.utils.errors import RunFailed
from kava_trainer.utils.progress_bar import own_batches, show_progress_bars

BAR = re.compile(r"([A-Z][\w' -]+): +\d+%\|[^|]*\| *[\d.k]+/([\d.k]+) \[")
OPTIONS = {
    **SHORT,
    "max_train_samples": 48,
    "max_eval_samples": 30,
    "per_device_eval_batch_size": 10,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_length": 128,
    "projector_init": "least_squares",
    "calibration_tokens": 1500,
    "run_control": "false",
}


@contextmanager
def terminal(monkeypatch):
    """A pseudo terminal in place of both streams; what was written to it is in the list afterwards."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    read, shown = [], []

    def collect():
        while True:
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # the other end was closed
                return
            read.append(chunk)

    thread = threading.Thread(target=collect)
    thread.start()
    monkeypatch.setattr(start, "tell_memory", lambda *_: None)  # half of the time of such a short run
    with monkeypatch.context() as patch, os.fdopen(writer, "w", encoding="utf-8", buffering=1) as file:
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", file)
        yield shown
    thread.join()
    os.close(reader)
    shown.append(b"".join(read).decode())


def run(folder, **options):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    return run_kava.main([recipe, *words({**OPTIONS, "output_dir": folder / "out", **options})])


def test_a_terminal_shows_a_bar_with_its_total_for_everything_long(tmp_path, monkeypatch):
    with terminal(monkeypatch) as shown:
        assert run(tmp_path, teacher_cache_dir=tmp_path / "cache") == 0
    (text,) = shown
    bars = {}
    for name, total in BAR.findall(text):
        bars.setdefault(name, set()).add(total)
    caching = bars.pop("Caching the teacher's states")
    assert bars == {
        "Tokenizing the training data": {"48"},
        "Tokenizing the held-out data": {"30"},
        "Hashing the training data": {"48"},
        "Perplexity": {"1", "3"},  # one batch when the teacher is tried out
        "Generating answers": {"3"},
        "Calibrating the projectors": {"2"},
        "Training": {"3"},
        "Evaluating": {"3"},
    }
    (written,) = re.findall(r"are to be written to .*: (\d+) tokens", text)
    assert caching == {f"{int(written) / 1000:.3g}k"}
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\r\n")]
    assert not [line for line in lines if "%|" in line and "Step 0" in line.split("%|")[0]]
    assert len([line for line in lines if re.match(r"(\x1b\[A)?\[Step 0003\] Loss", line)]) == 1


def test_no_bar_is_shown_on_a_terminal_where_none_is_wanted(tmp_path, monkeypatch):
    with terminal(monkeypatch) as shown:
        options = {"max_steps": 1, "evaluate_generation": "false", "eval_strategy": "no", "plain_output": "true"}
        assert run(tmp_path, teacher_cache_dir=tmp_path / "cache", **options) == 0
    assert "[Step 0001]" in shown[0]
    assert "%|" not in shown[0]
    assert "\r" not in shown[0].replace("\r\n", "\n")
    assert shown[0].isascii()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Rank:
    num_processes, process_index = 2, 0

    def __init__(self, main):
        self.is_main_process = main

    def __call__(self):
        return self


@pytest.mark.parametrize(("main", "wanted", "total", "shown"), [
    (True, True, 3, True), (False, True, 3, False), (True, False, 3, False), (True, True, 0, False),
])  # fmt: skip
def test_who_shows_a_bar(monkeypatch, main, wanted, total, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_bar, "PartialState", Rank(main))
    monkeypatch.setitem(progress_bar._switch, "shown", wanted)
    with progress_bar.progress_bar(total, "Work") as bar:
        assert bar.disable is not shown


def test_where_no_terminal_is_no_bar_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show_progress_bars(True)
    with progress_bar.progress_bar(3, "Work") as bar:
        bar.update()
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("options", "shown"), [
    ({"plain_output": True}, False),
    ({"plain_output": False, "disable_tqdm": True}, False),
    ({"plain_output": False}, True),
])  # fmt: skip
def test_a_trainer_of_a_library_keeps_to_its_arguments(tmp_path, tokenizer, monkeypatch, options, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer = make_trainer(tmp_path, tokenizer, **options)
    trainer.train()
    assert list(own_batches([1, 2, 3], 2, "Work")) == [[1, 2], [3]]
    assert shows_bars(trainer.args) is shown
    for name in ("Training:", "Work:"):
        assert (name in sys.stderr.getvalue()) is shown


def test_a_training_that_breaks_closes_its_bars(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer = make_trainer(tmp_path, tokenizer, plain_output=False)

    def fail(*args, **kwargs):
        raise RunFailed("It broke.")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(RunFailed):
        trainer.train()
    assert sys.stderr.getvalue().endswith("\n")


def test_reading_a_teacher_and_counting_a_stream_show_bars(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    show_progress_bars(True)
    examples = random_examples(3)
    read_examples(tiny_llama(32, 2), [1], examples, DistillationCollator(tokenizer), "Unquantised teacher")
    assert ("Unquantised teacher", "3") in BAR.findall(sys.stderr.getvalue())
    stream = stream_of(str(write_problems(tmp_path / "problems.jsonl", 12)), tokenizer, 0)
    assert stream.count_rows(5) == 5
    assert re.search(r"Counting the rows of the stream: \d", sys.stderr.getvalue())
