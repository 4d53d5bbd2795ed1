"""Fixtures; what they and the tests are made of is in `helpers`."""

import functools
import gc
import logging
import os

import pytest
import torch
from helpers.fake_hub import asked_hub
from helpers.outcomes import one_step
from helpers.programs import MEMORY
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from kava_trainer.data import splits
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.runs import finish, pipeline, setup

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; see `_threads` for this one
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # see `use_all_cores`: here other tests have the other cores
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pytest_collection_finish():
    """What the libraries are made of is not looked through again by each training that collects its garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads(request):
    """Several threads only wait for each other on tiny models, and much longer where the machine has other work."""
    before = torch.get_num_threads()
    alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"
    if request.node.get_closest_marker("slow") is None or not alone:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _verbosity():
    """What one test logs is no matter of the next one."""
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT_FOLDER)


@pytest.fixture(autouse=True, scope="session")
def _unflushed():
    """What is written need not reach the disk: a process that is killed loses nothing by it, and no power goes away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _short_runs(request, monkeypatch):
    """Runs in this process leave out their report, play no step through for its memory and time none: seconds each.

    A test that is about the one is marked `report`, and one that is about the other `estimate`.
    """
    if hasattr(request.module, "run_kava"):
        if request.node.get_closest_marker("report") is None:
            monkeypatch.setattr(finish, "report_on", lambda *_: None)
        if request.node.get_closest_marker("estimate") is None:
            monkeypatch.setattr(setup, "estimate_memory", lambda arguments: MEMORY)
            monkeypatch.setattr(pipeline, "tell_time", lambda run: None)
        monkeypatch.setattr(pipeline, "tell_busy_cores", lambda *_: None)


@pytest.fixture(autouse=True, scope="session")
def _problems():
    """The data of the quickstart, which never changes, is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "generate_problems", functools.cache(splits.generate_problems))
        yield


@pytest.fixture(scope="session")
def whole_batch(tmp_path_factory):
    """One optimizer step on a whole batch in one process, see `one_step`."""
    return one_step(tmp_path_factory.mktemp("whole"), 8, 1, 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """See `asked_hub`."""
    with asked_hub(monkeypatch, tmp_path) as hub:
        yield hub
