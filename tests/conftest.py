"""Fixtures; what they and the tests are made of is in `helpers`."""

import logging
import os

import pytest
import torch
from helpers.fake_hub import asked_hub
from helpers.outcomes import one_step
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.runs import finish

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; see `_threads` for this one
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # see `use_all_cores`: here other tests have the other cores
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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


@pytest.fixture(autouse=True)
def _no_report(request, monkeypatch):
    """Runs in this process leave their report out, which takes over a second, unless the test is marked `report`."""
    if hasattr(request.module, "run_kava") and request.node.get_closest_marker("report") is None:
        monkeypatch.setattr(finish, "report_on", lambda *_: None)


@pytest.fixture(scope="session")
def whole_batch(tmp_path_factory):
    """One optimizer step on a whole batch in one process, see `one_step`."""
    return one_step(tmp_path_factory.mktemp("whole"), 8, 1, 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """See `asked_hub`."""
    with asked_hub(monkeypatch, tmp_path) as hub:
        yield hub
