"""Which files a name means, and that what is on this machine is never looked for on the hub."""

import gzip

import fsspec
import pytest

from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data import files
from kava_trainer.data.files import is_file_name
from kava_trainer.data.splits import load_splits
from kava_trainer.data.stream_sources import open_rows
from kava_trainer.utils.errors import BadRequest

ROW = '{"text": "a"}\n'


@pytest.fixture
def no_hub(monkeypatch):
    def load(name, *arguments, **options):
        if "data_files" not in options:
            pytest.fail(f"{name} was looked for on the hub")

    monkeypatch.setattr(files, "load_dataset_builder", load)


def refusal(name):
    """What is said of it, loaded and streamed alike, in one line."""
    said = set()
    for read in (load_splits, open_rows):
        with pytest.raises(BadRequest) as caught:
            read(DataArguments(dataset_name=str(name)))
        said.add(str(caught.value))
    (line,) = said
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", ["data.txt", "data", "data.xlsx", "data.parquet.gz", "data.gz", "data.jsonl.lz4"])
def test_a_file_with_another_ending_is_refused_with_those_that_are_read(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(ROW)
    for path in (name, f"./{name}", tmp_path / name):
        said = refusal(path)
        assert said.startswith(f"The ending of the data file {name if path != tmp_path / name else path} does not say")
        assert said.endswith(
            "rename it to one of those that are read: .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz, .bz2, "
            ".xz, .zst behind it), .parquet and .arrow, in small or capital letters."
        )


@pytest.mark.parametrize(
    "name",
    ["gone.jsonl", "gone.TSV", "user/gone.csv.gz", "./gone", "../gone", "~/gone", "/gone", "a/b/gone", "./gone.x"],
)
def test_a_path_that_is_not_there_is_refused_without_a_look_at_the_hub(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal(name) or "there is no file or folder of that name" in refusal(name)


@pytest.mark.parametrize("name", ["me/gsm8k", "gsm8k", "me/data.v2", "me/gz"])
def test_what_may_be_on_the_hub_is_looked_for_there(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "load_dataset_builder", lambda *given: asked.append(given) or pytest.skip.Exception)
    with pytest.raises(BadRequest):
        load_splits(DataArguments(dataset_name=name))
    assert asked == [(name, None)]


@pytest.mark.parametrize("name", ["data[1].jsonl", "da ta é.jsonl", "what?.jsonl", "all*.jsonl", "data.v1.JSONL"])
def test_odd_names_mean_their_file(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(ROW * 3)
    (tmp_path / "data1.jsonl").write_text('{"text": "other"}\n')
    assert load_splits(DataArguments(dataset_name=name))[0]["text"] == ["a", "a"]


def test_a_file_packed_with_a_package_that_is_missing_says_so(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setattr(fsspec, "available_compressions", lambda: ["gzip"])
    assert refusal(tmp_path / "data.jsonl.zst").endswith(
        "is compressed with zstd; pip install zstandard, or unpack it."
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "data.csv",
            "text\nré\n".encode("latin-1"),
            "line 2 is not UTF-8 text. Save it as UTF-8, whose codec can't decode its byte 0xe9; where it is Latin-1: "
            "iconv -f LATIN1 -t UTF-8 OLD > NEW",
        ),
        (
            "data.jsonl",
            ROW.encode("utf-16"),
            "it is UTF-16 text where UTF-8 is needed. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        ),
        ("data.csv", b"question,answer\n", "its split 'train' holds no examples."),
        ("data.csv", b'text,note\n"a\n', "the quote that opens in line 2 is never closed: EOF inside string"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_sentence(tmp_path, no_hub, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name) == f"The data set '{tmp_path / name}' cannot be loaded: {expected}"


def test_the_broken_one_of_a_folder_is_named_by_its_place_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ROW * 3)
    (tmp_path / "data" / "test.jsonl").write_text(ROW + "[]\n")
    expected = f"The data set '{tmp_path}' cannot be loaded: in its data/test.jsonl, line 2 holds a list"
    assert refusal(tmp_path).startswith(expected)
    (tmp_path / "data" / "test.jsonl").write_text("\n")
    assert refusal(tmp_path) == f"The data set '{tmp_path}' cannot be loaded: its split 'test' holds no examples."


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jsonl", True), ("x/a.CSV.gz", True), ("a.parquet", True), ("a.arrow.gz", False), ("me/json", False)],
)
def test_names_of_files_are_told_from_others(name, expected):
    assert is_file_name(name) == expected


def test_files_that_are_not_on_this_machine_are_read_as_text_too():
    memory = fsspec.filesystem("memory")
    for number in range(2):
        row = f'{{"text": 0.{number}0}}\n{{"text": "NA"}}\n'
        memory.pipe(f"/kava/train-{number}.jsonl.gz", gzip.compress(row.encode()))
    memory.pipe("/kava/t.tsv", b"text\tnote\n007\tNA\n")
    for kind, name, options, expected in (
        ("json", "train-*.jsonl.gz", {}, [{"text": "0.00"}, {"text": "NA"}, {"text": "0.10"}, {"text": "NA"}]),
        ("csv", "t.tsv", {"sep": "\t"}, [{"text": "007", "note": "NA"}]),
    ):
        library = files.load_dataset_builder(kind, data_files=f"memory://kava/{name}", **options)
        assert list(files.as_text(library).as_streaming_dataset()["train"]) == expected
