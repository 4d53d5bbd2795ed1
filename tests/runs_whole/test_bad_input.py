"""Files and folders that a user can get wrong: one sentence that names the place, and nothing is touched."""

import json
import os
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from helpers.models import tiny_model
from helpers.programs import QUICKSTART, SHORT, words
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import run_kava
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.data.splits import load_splits
from kava_trainer.runs import start
from kava_trainer.runs.resources import checkpoint_bytes, estimate_memory
from kava_trainer.utils.console import size_text
from kava_trainer.utils.errors import BadRequest
from kava_trainer.utils.files import make_folder

Usage = namedtuple("Usage", "total used free")


def refused(capsys, folder, **changes):
    """What stands on stderr after a bad request with these changes to a short quickstart run."""
    options = {**QUICKSTART, **SHORT, "max_length": 120, "output_dir": folder / "out", **changes}
    capsys.readouterr()
    assert run_kava.main(words({name: value for name, value in options.items() if value is not None})) == 2
    return capsys.readouterr().err


def one_sentence(error):
    """The message of a single error line with nothing around it."""
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0].removeprefix("Error: ")


def data_problem(path, content=None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadRequest) as caught:
        load_splits(DataArguments(dataset_name=str(path)))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"The data set '{path}' cannot be loaded: ")
    return line.removeprefix(f"The data set '{path}' cannot be loaded: ")


ROW = '{"question": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW * 2 + '{"question": "c"\n' + ROW, "line 3 is not valid JSON (Expecting ',' delimiter, column 17)."),
        (ROW + '{"question": "c\n', "line 2 is not valid JSON (Unterminated string starting at, column 14)."),
        (ROW + "\n\n" + "oops\n", "line 4 is not valid JSON (Expecting value, column 1)."),
        (ROW + '["a", "b"]\n' + ROW, "line 2 holds a list where an object in braces is needed."),
        (ROW + '"a"\n', "line 2 holds a text where an object in braces is needed."),
        (ROW + "null\n", "line 2 holds null where an object in braces is needed."),
        (ROW.encode() + b'{"question": "\xe4"}\n', "line 2 is not UTF-8 text."),
        (ROW + '{"question": "\u2028"}\n' + '{"a"\n', "line 3 is not valid JSON (Expecting ':' delimiter, column 5)."),
        (b"\xef\xbb\xbf" + ROW.encode() + b"{\n", "line 2 is not valid JSON "),
    ],
)
def test_a_broken_line_of_a_jsonl_file_is_named(tmp_path, content, message):
    assert data_problem(tmp_path / "data.jsonl", content).startswith(message)


def test_a_broken_line_is_named_however_far_down_it_is(tmp_path):
    row = json.dumps({"question": "a" * 100, "answer": "b"}) + "\n"
    content = row * 100_000 + "{broken}\n" + row  # the reader takes 10 MB at once, in blocks of a 32nd of that
    assert len(content) > 11 * 2**20
    assert data_problem(tmp_path / "data.jsonl", content).startswith(
        "line 100001 is not valid JSON (Expecting property"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.json",
            '[{"text": "a"},\n {"text": "b"},\n {"text": ]\n',
            r"line 3 is not valid JSON \(Expecting value,",
        ),
        ("data.json", '{"text": "a"}\n{"text"\n', r"line 2 is not valid JSON \(Expecting ':'"),
        ("data.csv", "text\na\nb,c,d\n", "Expected 1 fields in line 3, saw 3"),
        ("data.csv", 'text\n"a\nb\n', "EOF inside string$"),
        ("data.csv", b"text\n\xff\xfe\n", "codec can't decode"),
        ("data.parquet", b"PAR1 and no more", "Parquet|parquet"),
        ("data.arrow", b"no arrow file", "."),
    ],
)
def test_a_broken_file_of_another_kind_gets_one_sentence(tmp_path, capfd, name, content, message):
    assert re.search(message, data_problem(tmp_path / name, content))
    assert not re.search("Failed|ERROR|Traceback", capfd.readouterr().err)


def test_folders_without_a_whole_data_set_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert data_problem(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "model.safetensors").write_bytes(b"no data")
    assert data_problem(tmp_path / "texts")
    for name, content in (("broken", "{"), ("list", "[]"), ("foreign", "{}")):
        Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / name)
        (tmp_path / name / "state.json").write_text(content)
        if name != "foreign":
            assert data_problem(tmp_path / name).startswith("in its state.json, ")
        assert data_problem(tmp_path / name)
    (tmp_path / "texts" / "train.jsonl").write_text(ROW + "{\n")
    assert data_problem(tmp_path / "texts").startswith("in its train.jsonl, line 2 is not valid JSON")


MODEL_FILES = {
    "model_safetensors": [(b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "student"), (b"", "student"), (None, "student")],
    "config_json": [(b'{"model_type": "llama",', "student's"), (b"[]", "student's"), (b"{}", "student's")],
    "tokenizer_json": [(b'{"version"', "student's tokenizer"), (b"{}", "student's tokenizer")],
    "tokenizer_config_json": [(b"{", "student's tokenizer"), (b"[]", "student's tokenizer")],
}


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [(file, content, what) for file, cases in MODEL_FILES.items() for content, what in cases],
)
def test_a_broken_model_file_gets_one_sentence(tmp_path, capsys, file, content, what):
    folder = tiny_model(tmp_path / "student", **{file: content})
    error = one_sentence(refused(capsys, tmp_path, student_model_name_or_path=folder))
    assert re.match(rf"The {what}( \w+)? '{folder}' cannot be loaded: \S", error), error


def test_a_broken_json_file_of_a_model_is_named(tmp_path, capsys):
    folder = tiny_model(tmp_path / "student", tokenizer_config_json=b'{\n"a": ]}')
    error = one_sentence(refused(capsys, tmp_path, student_model_name_or_path=folder))
    assert error.endswith(
        "cannot be loaded: in its tokenizer_config.json, line 2 is not valid JSON (Expecting value, column 6)."
    )


def test_an_empty_model_folder_gets_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for role in ("teacher", "student"):
        error = one_sentence(refused(capsys, tmp_path, **{f"{role}_model_name_or_path": tmp_path / "empty"}))
        reason = "the folder has no config.json; name one that a model was saved to."
        assert error == f"The {role}'s tokenizer '{tmp_path / 'empty'}' cannot be loaded: {reason}"


def test_a_file_is_no_checkpoint_and_prompts_that_fill_max_length_leave_no_answers(tmp_path, capsys):
    (tmp_path / "checkpoint-1").write_text("a file")
    error = one_sentence(refused(capsys, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-1"))
    assert error.endswith("checkpoint-1, which is not a folder; write true for the newest.")
    error = one_sentence(refused(capsys, tmp_path, max_length=4))
    assert error == "No example has an answer within max_length 4; raise max_length or look at the data's columns."


def test_a_tracker_that_is_not_installed_gets_one_sentence(tmp_path, capsys, monkeypatch):
    class Missing(TrainerCallback):
        def __init__(self):
            raise RuntimeError("DVCLiveCallback requires dvclive to be installed.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "dvclive", Missing)
    error = one_sentence(refused(capsys, tmp_path, report_to="dvclive"))
    assert error == (
        "report_to dvclive cannot be used (dvclive is not installed). Install what it needs, or write another."
    )


def test_too_little_disk_for_one_checkpoint_is_told_before_a_weight_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(start, "load_models", lambda *_: pytest.fail("weights were loaded"))
    message = one_sentence(refused(capsys, tmp_path))
    assert re.search(
        r"^One checkpoint takes \d\.\d MB, but the disk of output_dir \S+out has only 1\.0 MB free", message
    )
    assert "set save_only_model true (0." in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"save_strategy": "no"}, {"save_only_model": True}])
def test_no_room_is_asked_for_what_is_not_written(tmp_path, capsys, monkeypatch, changes):
    def load_models(*_):
        raise BadRequest("The weights come next.")

    monkeypatch.setattr(start, "load_models", load_models)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    assert one_sentence(refused(capsys, tmp_path, **changes)) == "The weights come next."


TINY = {"max_steps": 1, "save_steps": 1, "max_train_samples": 16, "per_device_train_batch_size": 8}
TINY |= {"gradient_accumulation_steps": 1, "max_length": 120}


@pytest.fixture(scope="module")
def earlier_run(tmp_path_factory):
    """The output folder of a run that completed, and what it expected one checkpoint to take."""
    folder = tmp_path_factory.mktemp("earlier") / "out"
    asked = words({**QUICKSTART, **SHORT, **TINY, "output_dir": folder})
    expected = estimate_memory(parse_arguments(asked))
    assert run_kava.main(asked) == 0
    return folder, expected


def test_what_a_checkpoint_takes_is_known_before(earlier_run):
    folder, parts = earlier_run
    sizes = {file.name: file.stat().st_size for file in (folder / "checkpoint-1").iterdir()}
    student, projector, optimizer = (sizes[name] for name in ("model.safetensors", "projector.pth", "optimizer.pt"))
    for save_only_model, written in ((False, student + projector + optimizer), (True, student + projector)):
        training = SimpleNamespace(save_only_model=save_only_model)
        assert written == pytest.approx(checkpoint_bytes(parts, training), rel=0.05)


def test_sizes_are_shown_in_units_that_people_read():
    assert (size_text(2_500_000_000), size_text(1_200_000)) == ("2.50 GB", "1.2 MB")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_refused():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(BadRequest, match=r"^output_dir \S+ cannot be written to: Permission denied. Choose"):
                make_folder("output_dir", folder)
            with pytest.raises(BadRequest, match=r"^output_dir \S+below cannot be made: Permission denied. Choose"):
                make_folder("output_dir", folder / "below")
        finally:
            os.seteuid(0)


def test_a_read_only_disk_is_refused_although_permissions_allow_writing(tmp_path, capsys, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    error = one_sentence(refused(capsys, tmp_path))
    assert error == f"output_dir {tmp_path / 'out'} cannot be written to: Read-only file system. Choose another folder."


def test_trying_a_folder_leaves_nothing_in_it(tmp_path):
    assert make_folder("output_dir", tmp_path / "out") == tmp_path / "out"
    assert not list((tmp_path / "out").iterdir())


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_bad_request_leaves_an_earlier_run_as_it_was(tmp_path, capsys, earlier_run):
    shutil.copytree(earlier_run[0], tmp_path / "out")
    out = tmp_path / "out"
    before = contents(out)
    assert {"run_summary.json", "final_student", "final_projector.pth"} <= {path.name for path in out.iterdir()}
    (tmp_path / "data.jsonl").write_text("{\n")
    for changes in (
        {"learning_rate": "fast"},
        {"dataset_name": tmp_path / "data.jsonl"},
        {"student_model_name_or_path": tmp_path / "gone"},
        {"layer_mapping": "[[3, 9]]"},
        {"max_length": 4},
        {"resume_from_checkpoint": tmp_path / "gone"},
    ):
        assert refused(capsys, tmp_path, **changes)
        assert contents(out) == before, changes
