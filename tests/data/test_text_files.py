"""Files of text as data sets: the same cells loaded and streamed, from a file, a pattern or a folder, packed or not."""

import bz2
import gzip
import json
import lzma

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers.stream_child import stream_of

from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.formats import find_format, prompt_and_answer
from kava_trainer.data.row_locations import locate_rows
from kava_trainer.data.splits import load_splits
from kava_trainer.data.stream_sources import open_rows
from kava_trainer.data.text_files import CHECKED_ROWS, ending_of
from kava_trainer.utils.errors import BadRequest

WORDS = ["007", "1.0", "1e3", "2021-01-05", "2021-01-05T10:00:00Z", "NA", "None", "null", "true", "nan", "9" * 30]


def both_ways(name, **changes):
    """All rows of the training data, loaded and streamed; they are the same ones."""
    train, held_out, _ = load_splits(DataArguments(dataset_name=str(name), **changes))
    rows, first = open_rows(DataArguments(dataset_name=str(name), max_eval_samples=1, streaming=True, **changes))
    streamed = [row for table in rows.tables(0, [0]) for row in rows.plain(table)]
    if not changes.get("dataset_test_split"):
        streamed = [*first, *streamed]
    names = find_format(train.column_names)
    loaded = [*train, *(held_out or [])]
    key = json.dumps
    assert sorted(key({n: row[n] for n in names}) for row in loaded) == sorted(map(key, streamed))
    return streamed


def answers(rows):
    return [prompt_and_answer(row, find_format(list(row)))[1] for row in rows]


@pytest.mark.parametrize("late", ["unknown", 7, 0.5, True, None, "2021-01-05"])
@pytest.mark.parametrize("early", ["2021-01-05", 1, 2.5, False, "007"])
def test_types_that_are_mixed_over_the_rows_stay_text(tmp_path, early, late):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in [early] * 1100 + [late]))
    found = answers(both_ways(path))
    as_text = [value if isinstance(value, str) else json.dumps(value) for value in (early, late)]
    assert found == [as_text[0]] * 1100 + ["" if late is None else as_text[1]]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.json"])
def test_words_that_look_like_something_else_are_words(tmp_path, tokenizer, name):
    rows, path = [{"question": word, "answer": word} for word in WORDS], tmp_path / name
    if name.endswith("sv"):
        sign = "," if name == "data.csv" else "\t"
        path.write_text("".join(sign.join(row) + "\n" for row in [["question", "answer"], *([w, w] for w in WORDS)]))
    else:
        path.write_text(json.dumps(rows) if name == "data.json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert both_ways(path) == rows
    train, _, _ = load_splits(DataArguments(dataset_name=str(path)))
    encoded = encode_dataset(train, tokenizer, 64, "test")
    assert (encoded.dropped, set(encoded.dataset["answer_text"])) == (0, {f" {row['answer']}" for row in train})
    stream = stream_of(path, tokenizer, 0, held_out=1)
    assert [example["answer_text"] for example in stream.one_pass()] == [f" {word}" for word in WORDS[1:]]


def test_each_row_of_messages_has_its_own_keys_alone(tmp_path):
    first = [{"role": "user", "content": "2021-01-05"}, {"role": "assistant", "content": "7"}]
    call = {"id": "1", "function": {"name": "f", "arguments": {"day": "2021-01-05", "big": 10**30, "x": [1, "a"]}}}
    last = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "assistant", "content": "ok"}]
    chats = [{"messages": first}] * 1500 + [{"messages": last}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    found = both_ways(path)
    assert json.dumps(found) == json.dumps(chats)


def test_a_column_that_only_appears_late_is_kept_or_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * CHECKED_ROWS + '{"text": "b", "note": 1, "tools": [{"name": "f"}]}\n')
    train, _, _ = load_splits(DataArguments(dataset_name=str(path)))
    assert train.column_names == ["text", "note", "tools"]
    rows, _ = open_rows(DataArguments(dataset_name=str(path), max_eval_samples=1, streaming=True))
    message = f"line {CHECKED_ROWS + 1} has the column 'tools', which none of the first {CHECKED_ROWS} rows has. Write"
    with pytest.raises(BadRequest, match=message):
        list(rows.tables(0, [0]))
    path.write_text('{"text": "a"}\n' * CHECKED_ROWS + '{"text": "b", "note": 1}\n')
    assert both_ways(path)[-1] == {"text": "b"}


PACKERS = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".GZ": gzip.open}
ROWS = [{"question": f"q{n}", "answer": f"0{n}.10 é"} for n in range(30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
CONTENTS = {
    ".jsonl": LINES, ".JSONL": LINES, ".ndjson": LINES, ".json": json.dumps(ROWS), ".csv": TABLE, ".Csv": TABLE,
    ".tsv": TABLE.replace(",", "\t"), ".TSV": TABLE.replace(",", "\t"),
}  # fmt: skip


def write(path, content):
    with PACKERS[path.suffix if path.suffix in PACKERS else ""](path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", CONTENTS)
def test_endings_in_any_case_and_packed(tmp_path, ending, packed):
    path = write(tmp_path / f"data{ending}{packed}", CONTENTS[ending])
    assert both_ways(path) == ROWS
    assert ending_of(str(path)) == ending.lower()


@pytest.mark.parametrize(
    ("train", "test"),
    [(".jsonl.gz", ".jsonl"), (".JSONL", ".CSV"), (".jsonl", ".tsv"), (".CSV", ".csv"), (".json.xz", ".ndjson")],
)
def test_a_folder_of_them_has_its_splits(tmp_path, train, test):
    for split, ending in (("train", train), ("test", test)):
        bare = "." + ending.split(".")[1].lower()
        write(tmp_path / f"{split}{ending}", CONTENTS[bare])
    (tmp_path / "README.md").write_text("About these rows.")
    for name in (tmp_path, f"{tmp_path}/"):
        arguments = DataArguments(dataset_name=str(name))
        found, held_out, total = load_splits(arguments)
        assert ([*found], [*held_out], total) == (ROWS, ROWS, 30)
        rows, held_out = open_rows(arguments)
        assert [row for table in rows.tables(0, [0]) for row in rows.plain(table)] == ROWS == [*held_out]


def test_a_pattern_may_fit_files_of_several_kinds(tmp_path):
    for name, part in (("a.jsonl", ROWS[:9]), ("b.json", ROWS[9:])):
        write(tmp_path / name, json.dumps(part) if name == "b.json" else "".join(json.dumps(r) + "\n" for r in part))
    assert both_ways(tmp_path / "*") == ROWS
    Dataset.from_list(ROWS).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(BadRequest, match=r"files of different kinds: \.json, \.jsonl, \.parquet\. Name one"):
        load_splits(DataArguments(dataset_name=f"{tmp_path}/*"))


def test_a_repository_that_says_how_its_files_are_read_is_read_so(tmp_path):
    (tmp_path / "x.csv").write_text("question;answer\n01;2\n03;4\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  {}\n---\n"
    (tmp_path / "README.md").write_text(card.format("sep: ';'"))
    assert both_ways(tmp_path) == [{"question": "01", "answer": "2"}, {"question": "03", "answer": "4"}]
    (tmp_path / "README.md").write_text(card.format("skiprows: 1"))
    with pytest.raises(BadRequest, match="sets skiprows for its files, which KAVA does not read; save its rows"):
        load_splits(DataArguments(dataset_name=str(tmp_path)))


def test_a_changed_file_is_read_anew(tmp_path):
    for answer in ("a", "b"):
        (tmp_path / "data.jsonl").write_text(f'{{"text": "{answer}"}}\n' * 3)
        assert both_ways(tmp_path / "data.jsonl") == [{"text": answer}] * 3


@pytest.mark.parametrize("name", ["data.csv.gz", "data.csv", "data.TSV"])
def test_a_row_is_named_by_its_line_in_every_kind_of_file(tmp_path, name):
    path = write(tmp_path / name, 'text\n"a\nb"\n\nc\n"d\n\n"\ne\n')
    assert locate_rows(str(path), [0, 1, 3]) == f"lines 2, 5, 9 of {path}"
    lines = write(tmp_path / "data.jsonl.gz", '\n{"text": "a"}\n\n{"text": "b"}\n')
    assert locate_rows(str(lines), [1]) == f"line 4 of {lines}"
    whole = write(tmp_path / "data.json", '[{"text": "a"},\n{"text": "b"}]')
    assert locate_rows(str(whole), [1]) == f"row 2 of {whole}"


def test_a_packed_file_that_is_broken_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "data.jsonl.gz", LINES + "{\n")
    for arguments in (DataArguments(dataset_name=str(path)), DataArguments(dataset_name=str(path), streaming=True)):
        with pytest.raises(BadRequest, match=r"data.jsonl.gz' cannot be loaded: line 31 is not valid JSON"):
            open_rows(arguments) if arguments.streaming else load_splits(arguments)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadRequest, match="cannot be loaded: it is no whole gz file"):
        load_splits(DataArguments(dataset_name=str(path)))
    path.write_text(LINES)
    with pytest.raises(BadRequest, match="cannot be loaded: it is no whole gz file"):
        load_splits(DataArguments(dataset_name=str(path)))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 20, None], "int64", ["1", "20", ""]),
        ([1.0, 0.1, float("nan")], "float64", ["1.0", "0.1", ""]),
        ([True, False, None], "bool", ["true", "false", ""]),
        (["007", "NA", None], "string", ["007", "NA", ""]),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_typed_columns_become_plain_text(tmp_path, form, values, kind, expected):
    data = Dataset.from_dict({"text": values}, features=Features({"text": Value(kind)}))
    name = tmp_path / ("data.PARQUET" if form == "parquet" else "saved")
    data.to_parquet(name) if form == "parquet" else data.save_to_disk(name)
    train, test, _ = load_splits(DataArguments(dataset_name=str(name)))
    assert sorted(answers([*train, *test])) == sorted(expected)
    rows, first = open_rows(DataArguments(dataset_name=str(name), max_eval_samples=1, streaming=True))
    streamed = [row for table in rows.tables(0, [0]) for row in rows.plain(table)]
    assert answers([*first, *streamed]) == expected


@pytest.mark.parametrize("kind", ["float32", "float16", "date32", "time32[s]"])
def test_typed_columns_that_could_be_written_in_several_ways_are_refused(tmp_path, kind):
    data = Dataset.from_dict({"text": [1, 2, 3]}, features=Features({"text": Value("int32")}))
    data.cast_column("text", Value(kind)).to_parquet(tmp_path / "data.parquet")
    for read in (load_splits, open_rows):
        with pytest.raises(BadRequest, match="which can be written as text in more than one way; save it as a column"):
            read(DataArguments(dataset_name=str(tmp_path / "data.parquet")))


def test_the_numbers_of_classes_are_no_answers(tmp_path):
    features = Features({"question": Value("string"), "answer": ClassLabel(names=["A", "B"])})
    Dataset.from_dict({"question": ["x", "y", "z"], "answer": [0, 1, 0]}, features=features).save_to_disk(
        tmp_path / "d"
    )
    for read in (load_splits, open_rows):
        with pytest.raises(
            BadRequest, match=r"'answer' of .* holds the numbers of classes, such as 0 for 'A'; save it"
        ):
            read(DataArguments(dataset_name=str(tmp_path / "d")))


def test_splits_that_are_read_by_different_columns_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    for other, told in (
        ('{"prompt": "a", "completion": "b"}\n', "prompt, completion"),
        ('{"text": "a"}\n', "text"),
        ('{"question": "a", "answer": "b", "messages": []}\n', "question, answer, messages"),
    ):
        write(tmp_path / "test.jsonl", other)
        message = f"its splits are read by different columns: train has question, answer; test has {told}. Give all"
        for read in (load_splits, open_rows):
            with pytest.raises(BadRequest, match=message):
                read(DataArguments(dataset_name=str(tmp_path)))
    write(tmp_path / "test.jsonl", '{"question": "a", "answer": "b", "note": "c"}\n')
    assert load_splits(DataArguments(dataset_name=str(tmp_path)))[1]["note"] == ["c"]
    write(tmp_path / "test.jsonl", '{"question": "without an answer"}\n')
    write(tmp_path / "validation.jsonl", LINES)
    arguments = DataArguments(dataset_name=str(tmp_path), dataset_test_split="validation")
    assert [*load_splits(arguments)[1]] == [*open_rows(arguments)[1]] == ROWS


def test_no_file_of_a_folder_is_left_out_for_its_kind(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for name in ("b.jsonl", "b.csv", "b.json"):
        write(tmp_path / name, CONTENTS[name[1:]])
        for read in (load_splits, open_rows):
            with pytest.raises(BadRequest, match=rf"holds files of different kinds: \{name[1:]}, \.parquet\. Keep one"):
                read(DataArguments(dataset_name=str(tmp_path)))
        (tmp_path / name).unlink()
    (tmp_path / "a.parquet").rename(tmp_path / "train.parquet")
    write(tmp_path / "notes.csv", TABLE)
    train, held_out, total = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert (total, len(train) + len(held_out)) == (30, 30)


def test_typed_files_with_capital_endings_are_not_left_out_of_a_folder(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
    write(tmp_path / "test.JSONL", LINES)
    with pytest.raises(BadRequest, match=r"The ending of \S+test\.JSONL is in capital letters; write it in small ones"):
        load_splits(DataArguments(dataset_name=str(tmp_path)))
