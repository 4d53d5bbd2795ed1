"""Streams of examples: what they give, in what order, to whom, and what they need for it."""

import gc
import json
import sys
from collections import Counter
from itertools import islice

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from helpers.data import write_problems
from helpers.stream_child import stream_of
from helpers.trainers import make_trainer

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data import streaming
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.rows.encoder import Encoder
from kava_trainer.data.selection import first_examples
from kava_trainer.data.splits import load_splits
from kava_trainer.data.stream_sources import open_rows
from kava_trainer.data.streaming import open_stream, stream_loader
from kava_trainer.utils.errors import BadRequest

ROWS = 41


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", ROWS)


def key(example):
    return tuple(example["input_ids"]), tuple(example["labels"])


def keys(examples):
    return [key(example) for example in examples]


def all_rows(path, tokenizer):
    """The examples of a file as a map-style data set holds them."""
    data = Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    return keys(encode_dataset(data, tokenizer, 64, "test").dataset)


def arguments(folder, **changes):
    return KavaTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **changes)


def batches(stream, tokenizer, folder, count, workers=0, batch_size=2):
    args = arguments(folder, dataloader_num_workers=workers)
    loader = stream_loader(stream, DistillationCollator(tokenizer), args, batch_size)
    return list(islice(loader, count))


def as_shards(folder, rows, kind):
    """The same rows in the form that is asked for, and the name that stands for it."""
    parts = [rows[:15], rows[15:16], rows[16:]]
    if kind == "saved":
        Dataset.from_list(rows).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind in ("csv", "parquet", "json"):
        data, name = Dataset.from_list(rows), folder / f"data.{kind}"
        {"csv": data.to_csv, "parquet": data.to_parquet, "json": data.to_json}[kind](name)
        return name
    (folder / "parts").mkdir()
    for number, part in enumerate(parts):
        Dataset.from_list(part).to_json(folder / "parts" / f"part-{number}.jsonl")
    return folder / "parts" / "*.jsonl" if kind == "pattern" else folder / "parts"


@pytest.mark.parametrize("kind", ["pattern", "folder", "saved", "csv", "parquet", "json"])
def test_a_stream_gives_the_examples_that_a_loaded_data_set_has(tmp_path, tokenizer, problems, kind):
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    name = as_shards(tmp_path, rows, kind)
    expected = all_rows(problems, tokenizer)
    for shuffle_buffer in (0, 7):
        stream = stream_of(name, tokenizer, shuffle_buffer, held_out=4)
        found = keys(stream.one_pass())
        assert Counter(found) == Counter(expected[4:])
        assert (found == expected[4:]) == (shuffle_buffer == 0)
    train, _, total = load_splits(DataArguments(dataset_name=str(name)))
    assert total == ROWS
    assert len(train) == ROWS - 2


def test_a_conversation_is_streamed_as_it_is_loaded(tmp_path, tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "2+3?", "note": 1}, {"role": "assistant", "content": "5"}]
    rows = [{"messages": turns, "source": "x"}, {"messages": turns[1:], "source": None}, {"messages": turns}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert keys(stream_of(path, tokenizer, 0, held_out=1).one_pass()) == all_rows(path, tokenizer)[1:]
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_example_falls_to_one_part_in_every_pass(tokenizer, problems, parts):
    stream = stream_of(problems, tokenizer)
    expected, orders = Counter(all_rows(problems, tokenizer)[3:]), []
    for number in range(3):
        found = [keys(stream.one_pass(number, part, parts)) for part in range(parts)]
        assert Counter(example for part in found for example in part) == expected
        assert max(map(len, found)) - min(map(len, found)) <= 1
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[1] == [keys(stream_of(problems, tokenizer).one_pass(1, part, parts)) for part in range(parts)]
    assert orders[0] != [keys(stream_of(problems, tokenizer, seed=6).one_pass(0, part, parts)) for part in range(parts)]


def test_files_are_mixed_too_where_no_row_is_held_out_from_them(tmp_path, tokenizer, problems):
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    for number in range(4):
        DatasetDict(train=Dataset.from_list(rows[10 * number : 10 * number + 10]))["train"].to_json(
            tmp_path / f"train-{number}.jsonl"
        )
    Dataset.from_list(rows[40:]).to_json(tmp_path / "test.jsonl")
    stream = stream_of(tmp_path, tokenizer, shuffle_buffer=2)
    expected = all_rows(problems, tokenizer)
    found = [keys(stream.one_pass(number)) for number in range(3)]
    assert all(Counter(order) == Counter(expected[:40]) for order in found)
    assert len({expected.index(order[0]) // 10 for order in found}) > 1


def test_held_out_rows_are_the_first_ones_or_those_of_the_test_split(tmp_path, problems):
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    _, held_out = open_rows(DataArguments(dataset_name=str(problems), max_eval_samples=5))
    assert held_out.to_list() == rows[:5]
    DatasetDict(train=Dataset.from_list(rows[:30]), test=Dataset.from_list(rows[30:])).save_to_disk(tmp_path / "both")
    for count, expected in ((3, 3), (None, ROWS - 30)):
        train, held_out = open_rows(DataArguments(dataset_name=str(tmp_path / "both"), max_eval_samples=count))
        assert held_out.to_list() == rows[30:][:expected]
        assert sum(map(len, train.tables(0, [0]))) == 30
    limited, _ = open_rows(DataArguments(dataset_name=str(problems), max_eval_samples=5, max_train_samples=9))
    assert [row for table in limited.tables(0, [0]) for row in table.to_pylist()] == rows[5:14]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("used", [1, 4, 13, 30])
def test_a_stream_goes_on_with_the_batch_after_the_last_one_that_was_used(tmp_path, tokenizer, problems, workers, used):
    stream = stream_of(problems, tokenizer)
    found = batches(stream, tokenizer, tmp_path, used + 6, workers)
    for batch in found[:used]:
        stream.note(batch["place"])
    state = stream.state()
    again = stream_of(problems, tokenizer)
    again.restore(state)
    for left, right in zip(found[used:], batches(again, tokenizer, tmp_path, 6, workers), strict=True):
        assert left["place"] == right["place"]
        assert left["input_ids"].tolist() == right["input_ids"].tolist()


def test_what_a_resumed_run_has_seen_is_read_and_not_tokenised_again(tmp_path, tokenizer, problems, monkeypatch):
    stream = stream_of(problems, tokenizer)
    for batch in batches(stream, tokenizer, tmp_path, 15):
        stream.note(batch["place"])
    again = stream_of(problems, tokenizer)
    again.restore(stream.state())
    calls, encode = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row: calls.append(row) or encode(self, row))
    batches(again, tokenizer, tmp_path, 1)
    assert len(calls) == 2


def test_rows_without_an_answer_are_passed_over_and_counted_in_the_place(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": "2+3=", "completion": "5" * (i % 3 > 0)}) + "\n" for i in range(31)))
    stream = stream_of(path, tokenizer, 0, held_out=1)
    assert [example["row"] for example in stream.one_pass()] == [i for i in range(1, 31) if i % 3 > 0]
    assert keys(stream.one_pass(start=4)) == keys(stream.one_pass())[3:]
    path.write_text(json.dumps({"prompt": "2+3=", "completion": ""}) * 1 + "\n" + '{"prompt": "", "completion": ""}\n')
    with pytest.raises(BadRequest, match="No example has an answer within max_length 64"):
        stream_of(path, tokenizer, held_out=1)


def test_the_first_examples_come_from_a_stream_as_from_a_data_set(tokenizer, problems):
    data = Dataset.from_list([{"input_ids": [i], "labels": [i]} for i in range(3)])
    assert first_examples(data, 2)["input_ids"] == [[0], [1]]
    assert len(first_examples(data, 9)) == 3
    stream = stream_of(problems, tokenizer)
    assert keys(first_examples(stream, 5)) == keys(stream.one_pass())[:5]
    assert first_examples(stream, 99)["answer_text"]


def test_more_parts_than_examples_are_named_in_place_of_waiting_for_ever(tmp_path, tokenizer, problems):
    stream = stream_of(problems, tokenizer, max_train_samples=1)
    found = batches(stream, tokenizer, tmp_path, 2, workers=2)
    assert "too few examples for 1 processes with 2 data workers each" in found[1]["problem"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"The data file \S+ is empty"),
        ("\n", "holds no examples to train on|cannot be loaded"),
        ('{"input": "a", "output": "b"}\n' * 9, "has the columns input, output; KAVA reads messages,"),
        (
            '{"text": "a"}\n' * 3,
            "ends within its first 3 rows, which are held out for evaluation. Set max_eval_samples",
        ),
        ('{"text": "a"}\n' * 5 + '{"text"\n', "line 6 is not valid JSON"),
        ('{"text": "a"}\n' * 5 + '["a"]\n', "line 6 holds a list where an object in braces is needed"),
        ('{"text": "a"}\n' * 5 + '{"text": ["a"]}\n', "."),
    ],
)
def test_what_is_no_stream_of_examples_is_refused(tmp_path, tokenizer, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(BadRequest, match=message):
        list(stream_of(tmp_path / "data.jsonl", tokenizer).one_pass())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", r"gone\.jsonl, which does not exist"),
        ("gone-*.jsonl", "which no file fits"),
        ("gone", "cannot be loaded: ."),
    ],
)
def test_files_that_are_not_there_are_refused(tmp_path, tokenizer, name, message):
    with pytest.raises(BadRequest, match=message):
        stream_of(tmp_path / name, tokenizer)
    with pytest.raises(BadRequest, match=message):
        load_splits(DataArguments(dataset_name=str(tmp_path / name)))


def test_a_split_that_is_not_there_is_refused(tokenizer, problems):
    with pytest.raises(BadRequest, match="has no split 'dev'; set dataset_train_split to one of train"):
        stream_of(problems, tokenizer, dataset_train_split="dev")
    with pytest.raises(BadRequest, match="has no split 'dev'; set dataset_test_split to one of train"):
        stream_of(problems, tokenizer, dataset_test_split="dev")


def large_file(path, rows, last=""):
    """More than the 10 MB that a reader takes at once."""
    row = json.dumps({"prompt": "2+3=", "completion": "5", "note": "x" * 400}) + "\n"
    path.write_text(row * rows + last)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_line_far_down_is_named_when_it_is_read(tmp_path, tokenizer, workers):
    path = large_file(tmp_path / "data.jsonl", 30_000, '{"prompt"\n')
    stream = stream_of(path, tokenizer, shuffle_buffer=0)
    stream.restore({"turn": 0, "places": dict.fromkeys(range(max(workers, 1)), (0, 22_000))})
    args = arguments(tmp_path, dataloader_num_workers=workers)
    loader = stream_loader(stream, DistillationCollator(tokenizer), args, 64)
    last = next(batch for batch in loader if "problem" in batch)
    assert last["problem"].startswith(
        f"The data set '{path}' cannot be loaded: line 30001 is not valid JSON (Expecting"
    )


@pytest.mark.parametrize(
    ("kind", "place"), [("pattern", "in {folder}/part-1.jsonl, "), ("folder", "in its part-1.jsonl, ")]
)
def test_the_broken_one_of_several_files_is_named(tmp_path, tokenizer, problems, kind, place):
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(problems.read_text() + ("{\n" if number == 1 else ""))
    name = tmp_path / "*.jsonl" if kind == "pattern" else tmp_path
    with pytest.raises(BadRequest) as caught:
        list(stream_of(name, tokenizer).one_pass())
    expected = place.format(folder=tmp_path) + f"line {ROWS + 1} is not valid JSON"
    assert str(caught.value).startswith(f"The data set '{name}' cannot be loaded: {expected}")


@pytest.fixture
def chats(tmp_path, tokenizer):
    """30 conversations of which the 17th cannot be used, and a template for them."""
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    rows = [{"messages": turns if number != 17 else turns[:1]} for number in range(1, 31)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    yield tmp_path / "data.jsonl"
    tokenizer.chat_template = before


def test_a_row_that_cannot_be_used_is_named_by_its_number_in_the_file(tokenizer, chats):
    with pytest.raises(BadRequest, match=r"cannot be used: in line 17 of \S+data.jsonl, a conversation must"):
        stream_of(chats, tokenizer)


def test_a_row_that_the_template_refuses_is_named_by_its_number_in_the_file(tokenizer, chats):
    tokenizer.chat_template = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}x"
    rows = chats.read_text().replace('"role": "user", "content": "2+3?"}]', '"role": "assistant", "content": "5"}]')
    chats.write_text(rows)
    for held_out in (3, 20):
        with pytest.raises(BadRequest, match=r"in line 17 of \S+data.jsonl, the chat template refuses .*\(too short\)"):
            encoded_or_streamed(chats, tokenizer, held_out)


def encoded_or_streamed(path, tokenizer, held_out):
    """The stream behind so many rows, and these themselves."""
    stream_of(path, tokenizer, held_out=held_out)
    _, rows = open_rows(DataArguments(dataset_name=str(path), max_eval_samples=held_out))
    encode_dataset(rows, tokenizer, 64, "test", str(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_far_down_that_cannot_be_used_is_left_out_and_counted(tmp_path, tokenizer, chats, monkeypatch, workers):
    monkeypatch.setattr(streaming, "CHECKED_ROWS", 10)
    stream = stream_of(chats, tokenizer, shuffle_buffer=0)
    assert [example["row"] for example in stream.one_pass()] == [row for row in range(1, 28) if row != 14]
    found = batches(stream, tokenizer, tmp_path, 20, workers)  # a pass and a half
    assert not any("problem" in batch for batch in found)
    reasons = [reason for batch in found for reason in batch["refused"]]
    assert set(reasons) == {"a conversation must end with the assistant, but this one ends with 'user'"}
    assert len(reasons) == 2


def test_rows_that_were_left_out_are_told_once_and_counted(tmp_path, tokenizer, chats, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "CHECKED_ROWS", 10)
    trainer = make_trainer(tmp_path / "run", tokenizer, max_steps=8)
    trainer.train_dataset = stream_of(chats, tokenizer, shuffle_buffer=0)
    trainer.train()
    assert capsys.readouterr().out.count("A row of the stream cannot be used and is left out: a conversation must") == 1
    told = [problem for problem in trainer.problems if problem["kind"] == "data"]
    assert [problem["action"] for problem in told] == [
        "left out rows of the stream that cannot be used, 2 times so far"
    ]


def test_what_is_to_be_told_of_the_first_rows_of_a_stream_is_kept(tmp_path, tokenizer, chats):
    rows = chats.read_text().splitlines()[:9]
    rows[5] = rows[5].replace('"content": "2+3?"', '"content": "2+3?", "name": "Ann"')
    chats.write_text("\n".join(rows))
    stream = stream_of(chats, tokenizer)
    assert stream.checked == 6
    assert stream.remarks == {"left out": {"name of user messages": [5]}}


def test_every_turn_of_a_streamed_conversation_is_learned_where_asked(tmp_path, tokenizer):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        rows, _ = open_rows(DataArguments(dataset_name=str(tmp_path / "chat.jsonl"), max_eval_samples=2))
        last, every = (open_stream(rows, tokenizer, 64, 0, 5, turns) for turns in ("last", "all"))
        whole = encode_dataset(rows.first(9), tokenizer, 64, "test", assistant_turns="all").dataset
        assert keys(every.one_pass()) == keys(whole)[2:]
        assert keys(last.one_pass()) != keys(every.one_pass())
        assert last.digest == open_stream(rows, tokenizer, 64, 0, 5).digest != every.digest
    finally:
        tokenizer.chat_template = before


def test_the_digest_knows_the_files_and_what_becomes_of_them(tmp_path, tokenizer, problems):
    copy = tmp_path / "other_folder" / problems.name
    copy.parent.mkdir()
    copy.write_bytes(problems.read_bytes())
    digest = stream_of(problems, tokenizer).digest
    assert stream_of(copy, tokenizer).digest == digest
    changed = bytearray(problems.read_bytes())
    changed[-5] ^= 1
    others = [
        stream_of(problems, tokenizer, held_out=4).digest,
        stream_of(problems, tokenizer, max_train_samples=9).digest,
    ]
    for content in (bytes(changed), problems.read_bytes() + b"\n"):
        copy.write_bytes(content)
        others.append(stream_of(copy, tokenizer).digest)
    rows, _ = open_rows(DataArguments(dataset_name=str(problems), max_eval_samples=3))
    others.append(open_stream(rows, tokenizer, 32, 8, 5).digest)
    others.append(stream_of("quickstart", tokenizer).digest)
    assert len({digest, *others}) == 7


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for number in range(9000):
            file.write(json.dumps({"question": f"What is {number}+{7 * number}?", "answer": f"{8 * number}"}) + "\n")
    stream = stream_of(path, tokenizer, shuffle_buffer=500)
    loader = iter(stream_loader(stream, DistillationCollator(tokenizer), arguments(tmp_path), 10))
    blocks, arrow = [], []
    for number, batch in enumerate(islice(loader, 850), start=1):
        stream.note(batch["place"])
        if number in (150, 850):
            gc.collect()
            blocks.append(sys.getallocatedblocks())
            arrow.append(pa.total_allocated_bytes())
    assert blocks[1] - blocks[0] < 7000 / 2, "not even half an object is kept of each of the 7000 examples between"
    assert arrow[1] <= arrow[0] + 2**20
