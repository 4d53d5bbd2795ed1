import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("TRANSFORMERS_VERBOSITY", None)  # Trainer's progress bars depend on it

import itertools
import logging
import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; see `_threads` for this one
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # see `use_all_cores`: here other tests have the other cores
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

from kava_trainer.config.model_arguments import ModelArguments  # noqa: E402
from kava_trainer.models.lora import add_adapter  # noqa: E402
from kava_trainer.quickstart import STUDENT_FOLDER  # noqa: E402

TEACHER_SIZE, STUDENT_SIZE, TEACHER_LAYERS, STUDENT_LAYERS = 64, 32, 4, 2
MEMORY = {"teacher": 3_400_000, "student": 700_000, "projector": 200_000, "optimizer": 1_800_000, "micro-batch": 10**8}
"""About what `estimate_memory` says of the quickstart, for tests that are about something else: it takes a second."""
SETTINGS = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 1,
}
"""Of a training that takes a second."""
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def matrix(cells, chosen):
    """The cells of a matrix of slow tests; those that are not chosen for every run of CI are marked `exhaustive`.

    Args:
        cells: tuples of values.
        chosen: takes the numbers of the values and tells whether the cell is in the selection.
    """
    values = [list(dict.fromkeys(column)) for column in zip(*cells, strict=True)]
    places = [tuple(column.index(value) for column, value in zip(values, cell, strict=True)) for cell in cells]
    selection = [place for place in places if chosen(*place)]
    for first, second in itertools.combinations(range(len(values)), 2):
        everywhere = {(place[first], place[second]) for place in places}
        assert {(place[first], place[second]) for place in selection} == everywhere, (first, second)
    marks = [() if place in selection else pytest.mark.exhaustive for place in places]
    return [pytest.param(*cell, marks=mark) for cell, mark in zip(cells, marks, strict=True)]


def a_quarter(a, b, c, d, e):
    """Of a matrix of five settings with two values each the quarter in which each pair of values occurs twice."""
    return d == a ^ b and e == a ^ c


def shared_path(*parts: str) -> Path:
    """A folder of real models or data beside the checkout; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


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
        monkeypatch.setattr("kava_trainer.runs.finish.report_on", lambda *_: None)


def tiny_sizes(hidden_size: int, layers: int) -> dict:
    return {
        "vocab_size": 512,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def tiny_llama(hidden_size: int, layers: int, seed: int = 0, tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**tiny_sizes(hidden_size, layers), tie_word_embeddings=tie))


def tiny_qwen(hidden_size: int, layers: int, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**tiny_sizes(hidden_size, layers)))


def tiny_lora_llama(hidden_size: int, layers: int, seed: int = 0, tie: bool = True, **changes) -> LlamaForCausalLM:
    student = tiny_llama(hidden_size, layers, seed, tie)
    options = {**LORA, "student_model_name_or_path": "some/student", **changes}
    add_adapter(student, ModelArguments("teacher", use_peft=True, **options))
    return student


def random_examples(count: int, seed: int = 0, longest: int = 24) -> list[dict]:
    """Examples of different lengths, each with a prompt and an answer."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        length = rng.randint(4, longest)
        ids = [rng.randint(1, 511) for _ in range(length - 1)] + [0]
        prompt = rng.randint(1, length - 2)
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return examples


@pytest.fixture(scope="session")
def whole_batch(tmp_path_factory):
    """One optimizer step on a whole batch in one process, see `test_invariants.one_step`."""
    from test_invariants import one_step

    return one_step(tmp_path_factory.mktemp("whole"), 8, 1, 1)


@contextmanager
def asked_hub(patch, folder):
    """A `FakeHub` that the hub's client asks, without the pauses between its attempts.

    Args:
        patch: a monkeypatch.
        folder: where what is loaded from it is kept.
    """
    from fake_hub import fake_hub

    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    patch.setattr("huggingface_hub.utils._http.time", impatient)
    with fake_hub() as hub:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)  # which peft asks
        # transformers keeps its client, and the first test that needed one may have made it for another address.
        patch.setattr("transformers.trainer.hf_api", lambda: HfApi(endpoint=hub.address), raising=False)
        yield hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """See `asked_hub`."""
    with asked_hub(monkeypatch, tmp_path) as hub:
        yield hub
