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
import torch
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


@pytest.mark.estimate
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
        "Retention": {"3"},
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
    of_one_piece = (
        *("Preparing the training data", "Loading the teacher", "Loading the student", "Trying out the models"),
        *("Timing a few passes", "Saving a checkpoint", "Saving the student"),
    )
    for name in of_one_piece:
        assert f"{name} [00:" in text, name
    assert re.search(r"Fitting the projectors: \|[^|]*\| 0/2 \[", text)
    # Three batches and two pairs, and at the start each of two terms on one batch of gradients.
    probes = re.findall(r"Measuring the alignment: \|[^|]*\| \d+/(\d+) \[", text)
    assert set(probes) == {"7", "5"}
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
    lines = shown[0].split("\r\n")
    for told in ("Calibrating the projectors on 15", "Measuring the alignment on "):
        assert any(line.startswith(told) and line.endswith(" ...") for line in lines), told
    evaluated = ("Measuring on 30 held-out examples: teacher ...", "Teacher: perplexity")
    again = ("Measuring on 30 held-out examples: student after ...", "Student after: perplexity")
    order = (*evaluated, "Calibrating", "Measuring the alignment on", "[Step 0001]", *again)
    first = [next(i for i, line in enumerate(lines) if line.startswith(told)) for told in order]
    assert first == sorted(first)


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


@pytest.fixture
def quiet(monkeypatch, capsys):
    """No bars; what is printed since it was asked last."""
    monkeypatch.setattr(progress_bar._PULSE, "add", lambda bar: None)  # no beats but those of the test
    show_progress_bars(False)
    return lambda: capsys.readouterr().out


def test_without_bars_lines_tell_of_what_takes_long(quiet):
    with progress_bar.progress_bar(60, "Work", "batch") as bar:
        began = bar._began
        bar.beat(began + progress_bar.PATIENCE - 0.1)
        assert quiet() == ""
        bar.beat(began + progress_bar.PATIENCE)
        assert quiet() == "Work ...\n"
        bar.update(12)
        bar.beat(began + progress_bar.PATIENCE + progress_bar.LINE_EVERY - 0.1)
        assert quiet() == ""
        bar.beat(began + progress_bar.PATIENCE + progress_bar.LINE_EVERY)
        assert quiet() == "Work: 12 of 60 batches, 01:02 so far\n"
        bar.beat(began + 3600)
        assert quiet() == "Work: 12 of 60 batches, 1:00:00 so far\n"
        bar.beat(began + 3600 + 60)
        assert quiet() == ""  # after an hour a line a minute would be too much
        bar.beat(began + 3600 + 401)
        assert quiet() == "Work: 12 of 60 batches, 1:06:41 so far\n"
        bar.lines_begin_anew()  # at the time of the clock, long before
        bar.beat(began + 59)
        assert quiet() == ""


@pytest.mark.parametrize(("total", "done", "line"), [
    (None, 0, "Work: 01:00 so far"),
    (None, 3, "Work: 3 passes, 01:00 so far"),
    (1, 1, "Work: 1 of 1 passes, 01:00 so far"),
])  # fmt: skip
def test_what_has_no_total_is_told_of_likewise(quiet, total, done, line):
    with progress_bar.progress_bar(total, "Work", "pass", told=True) as bar:
        bar.update(done)
        bar.beat(bar._began + 30)
        assert quiet() == ""
        bar.beat(bar._began + 60)
        assert quiet() == f"{line}\n"


def test_a_line_before_the_work_is_the_only_one_at_its_beginning(quiet):
    for number in (1, 2):
        with progress_bar.told("Reading 3 rows", once=True), progress_bar.progress_bar(3, "Rows") as bar:
            assert quiet() == ("Reading 3 rows ...\n" if number == 1 else "")
            bar.beat(bar._began + 5)
            assert quiet() == ("" if number == 1 else "Rows ...\n")  # the second time nothing was said of it
    show_progress_bars(False)
    with progress_bar.told("Reading 3 rows", once=True):
        assert quiet() == "Reading 3 rows ...\n"  # another run
    with progress_bar.told("Reading 3 rows"):
        assert quiet() == "Reading 3 rows ...\n"


@pytest.mark.parametrize(("main", "total"), [(False, 3), (True, 0)])
def test_who_prints_no_lines(monkeypatch, capsys, main, total):
    monkeypatch.setattr(progress_bar, "PartialState", Rank(main))
    show_progress_bars(False)
    with progress_bar.progress_bar(total, "Work") as bar:
        assert bar not in set(progress_bar._PULSE._bars)
    assert capsys.readouterr().out == ""


def test_where_bars_are_shown_their_clocks_tick_and_no_lines_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    show_progress_bars(True)
    with progress_bar.told("Reading"), progress_bar.progress_bar(3, "Work", "batch") as bar:
        bar.note("token 7 of 9")
        bar.start_t -= 75
        bar.beat(bar._began + 75)
        assert "0/3 [01:15<?, ?batch/s, token 7 of 9]" in sys.stderr.getvalue()
        bar.update()
    with progress_bar.working("Loading"):
        assert sys.stderr.getvalue().endswith("Loading [00:00]")
    shown = sys.stderr.getvalue()
    bar.beat(1e9)
    assert sys.stderr.getvalue() == shown  # it was closed
    assert capsys.readouterr().out == ""


def test_the_thread_that_beats_ends_with_the_last_bar_and_not_a_beat_later(monkeypatch):
    monkeypatch.setattr(progress_bar, "BEAT", 60.0)
    monkeypatch.setattr(progress_bar, "_PULSE", progress_bar._Pulse())
    show_progress_bars(False)
    for _ in range(2):
        before = set(threading.enumerate())
        with progress_bar.working("Work"), progress_bar.progress_bar(2, "More"):
            (thread,) = {thread for thread in threading.enumerate() if thread.name == "progress"} - before
            assert thread.daemon
        thread.join(10)
        assert not thread.is_alive()


def test_a_step_of_many_micro_batches_shows_how_far_it_is(tmp_path, tokenizer, monkeypatch):
    notes = []
    monkeypatch.setattr(progress_bar.Progress, "note", lambda bar, text: notes.append(text))
    trainer = make_trainer(tmp_path, tokenizer, gradient_accumulation_steps=4, eval_strategy="no")
    trainer.train()
    of_steps = [re.sub(r"Loss.*", "Loss", note) for note in notes]
    first = [f"micro-batch {number} of 4" for number in (1, 2, 3)]
    assert of_steps == [*first, "", *(f"{note} | Loss" for note in first), "Loss"]


def test_a_training_is_the_same_with_and_without_bars(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(progress_bar, "BEAT", 0.001)
    weights = []
    for name, plain in (("lines", True), ("bars", False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        settings = {"projector_dropout": 0.2, "eval_strategy": "steps", "eval_steps": 1, "plain_output": plain}
        trainer = make_trainer(tmp_path / name, tokenizer, **settings)
        trainer.train()
        assert bool(sys.stderr.getvalue()) is not plain
        weights.append([*trainer.model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
