import copy
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from helpers.trainers import loss_lines, make_trainer

from kava_trainer import encode
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.formats import find_format
from kava_trainer.data.row_locations import locate_rows, source_rows
from kava_trainer.data.splits import load_splits
from kava_trainer.utils.errors import BadRequest

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROBLEM = {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}


def answer_text(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def encode_one(example, tokenizer, max_length=256):
    return encode_dataset(Dataset.from_list([example]), tokenizer, max_length, "test").dataset[0]


@pytest.mark.parametrize(
    ("example", "prompt", "answer"),
    [
        (PROBLEM, "Question: What is 2+3?\nAnswer:", " 2+3=<<2+3=5>>5\n#### 5"),
        ({"prompt": "2+3=", "completion": "5"}, "2+3=", "5"),
        ({"prompt": "2+3=", "completion": 5}, "2+3=", "5"),
        ({"text": "Five is 5."}, "", "Five is 5."),
    ],
)
def test_only_the_answer_carries_labels_and_it_ends_with_end_of_text(tokenizer, example, prompt, answer):
    row = encode_one(example, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}{answer}<|endoftext|>"
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == prompt
    assert answer_text(tokenizer, row) == f"{answer}<|endoftext|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == row["labels"][-1]


@pytest.fixture
def chat_tokenizer(tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = before


def test_chat_messages_use_the_template_and_learn_the_last_answer(chat_tokenizer):
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "2+3?"), ("assistant", "5")]
    row = encode_one({"messages": [{"role": role, "content": content} for role, content in turns]}, chat_tokenizer)
    assert answer_text(chat_tokenizer, row) == "5<|endoftext|>"
    assert row["answer_text"] == "5"


def test_a_conversational_prompt_and_completion_use_the_template(chat_tokenizer):
    example = {
        "prompt": [{"role": "user", "content": "2+3?"}],
        "completion": [{"role": "assistant", "content": "5"}],
    }
    assert answer_text(chat_tokenizer, encode_one(example, chat_tokenizer)) == "5<|endoftext|>"


def test_chat_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(BadRequest, match="no chat template"):
        encode_one({"messages": [{"role": "assistant", "content": "x"}]}, tokenizer)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"messages": '[{"role": "assistant", "content": "x"}]'}, "must be a list of messages, but it is a str"),
        ({"messages": [{"from": "gpt", "value": "x"}]}, "must hold messages such as"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with the assistant"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "whose content is a list of parts, where a text",
        ),
        (
            {"prompt": [{"role": "user", "content": []}], "completion": []},
            "prompt holds a message whose content is a list",
        ),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": "x"}]}, "prompt must be a list of messages"),
        ({"question": "x", "answer": {"value": "x"}}, "answer must be text"),
        ({"text": ["x"]}, "text must be text"),
    ],
)
def test_odd_cells_are_refused_with_their_row(tokenizer, example, message):
    with pytest.raises(BadRequest, match=f"The data cannot be used: in row 1 of the data, .*{message}"):
        encode_one(example, tokenizer)


def test_truncation_is_counted_and_a_cut_answer_does_not_learn_to_stop(tokenizer):
    long, short = {"prompt": "a b c d e f g h", "completion": " 1 2 3 4 5 6 7 8 9"}, {"prompt": "a", "completion": "1"}
    prompt_only = {"prompt": "a b c d e f g h i j k l m n o p q r s t u v", "completion": "1"}
    encoded = encode_dataset(Dataset.from_list([long, short, prompt_only]), tokenizer, 20, "test")
    assert (len(encoded.dataset), encoded.truncated, encoded.dropped) == (2, 2, 1)
    assert len(encoded.dataset[0]["input_ids"]) == 20
    assert encoded.dataset[0]["labels"][-1] != tokenizer.eos_token_id
    assert encoded.dataset[1]["labels"][-1] == tokenizer.eos_token_id


def test_rows_are_named_by_file_and_line_where_a_row_is_a_line(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(f'{{"text": "{n}"}}\n\n' for n in range(4)))
    second.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(9)))
    assert locate_rows(str(first), [0, 2]) == f"lines 1, 5 of {first}"
    assert locate_rows(str(tmp_path / "*.jsonl"), [3, 4, 8]) == f"line 7 of {first}; lines 1, 5 of {second}"
    assert locate_rows(str(second), range(9)) == f"lines 1, 2, 3, 4, 5, ... of {second}"
    second.write_text('{\n"text": "a"\n}\n{\n"text": "b"\n}\n')
    assert locate_rows(str(second), [1]) == f"row 2 of {second}"
    assert locate_rows("openai/gsm8k", [1, 3]) == "rows 2, 4 of openai/gsm8k"


def test_rows_are_told_where_they_stood_before_the_data_was_split():
    data = Dataset.from_list([{"text": str(n)} for n in range(40)])
    half = data.train_test_split(test_size=20, seed=0)["test"].select(range(10))
    assert [int(half[n]["text"]) for n in range(10)] != list(range(10))
    assert source_rows(half, [0, 3, 7]) == sorted(int(half[n]["text"]) for n in (0, 3, 7))
    assert source_rows(data, [4, 5]) == [4, 5]
    assert source_rows(half, []) == []


def test_an_example_without_an_answer_is_dropped(tokenizer):
    rows = [PROBLEM, *({"question": "why?", "answer": answer} for answer in ("", None, " \n"))]
    encoded = encode_dataset(Dataset.from_list(rows), tokenizer, 256, "test")
    assert (len(encoded.dataset), encoded.dropped, encoded.empty) == (1, 3, [1, 2, 3])


def test_no_answers_at_all_is_refused(tokenizer):
    with pytest.raises(BadRequest, match="No example has an answer within max_length 3"):
        encode_dataset(Dataset.from_list([PROBLEM]), tokenizer, 3, "test")


def test_unknown_columns_are_named(tokenizer):
    with pytest.raises(BadRequest, match=r"has the columns foo; KAVA reads messages, prompt \+ completion"):
        encode_dataset(Dataset.from_list([{"foo": "x"}]), tokenizer, 10, "test")


def test_tokenizing_is_cached_by_content(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(PROBLEM) + "\n")
    arguments = DataArguments(dataset_name=str(path))
    prints = {}
    for name, max_length in (("first", 64), ("again", 64), ("longer", 65)):
        train, _, _ = load_splits(arguments)
        encoded = encode_dataset(train, tokenizer, max_length, "test").dataset
        prints[name] = (encoded._fingerprint, encoded.cache_files[0]["filename"])
        tokenizer(["use changes", "a tokenizer's state"], truncation=True, padding=True, max_length=3 + len(name))
    assert prints["first"] == prints["again"] != prints["longer"]


ROWS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(40)]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


WRITERS = {
    "data.jsonl": write_jsonl,
    "data.json": lambda path: path.write_text(json.dumps(ROWS)),
    "data.csv": lambda path: Dataset.from_list(ROWS).to_csv(str(path)),
    "data.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(str(path)),
    "folder": lambda path: Dataset.from_list(ROWS).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_local_data_is_read_and_a_part_is_held_out(tmp_path, name):
    WRITERS[name](tmp_path / name)
    train, test, total = load_splits(DataArguments(dataset_name=str(tmp_path / name)))
    assert (len(train), len(test), total) == (38, 2, 40)
    assert not set(train["question"]) & set(test["question"])


def test_an_arrow_file_is_read(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "folder"))
    file = next((tmp_path / "folder").glob("*.arrow"))
    assert load_splits(DataArguments(dataset_name=str(file)))[2] == 40


def test_named_splits_and_sample_limits(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:9])).save_to_disk(str(tmp_path / "both"))
    arguments = DataArguments(dataset_name=str(tmp_path / "both"), max_train_samples=5, max_eval_samples=3)
    train, test, total = load_splits(arguments)
    assert (len(train), len(test), total) == (5, 3, 40)
    for name in ("train", "test"):
        with pytest.raises(BadRequest, match=f"has no split 'nope'; set dataset_{name}_split to one of train, test"):
            load_splits(DataArguments(dataset_name=str(tmp_path / "both"), **{f"dataset_{name}_split": "nope"}))


@pytest.mark.parametrize(
    ("splits", "arguments", "expected"),
    [
        (("train", "validation"), {}, (40, 40)),
        (("test",), {"dataset_train_split": "test"}, (38, 2)),
        (("train", "test"), {"dataset_test_split": "train"}, (38, 2)),
    ],
)
def test_training_examples_are_never_evaluated_on(tmp_path, splits, arguments, expected):
    rows = {name: [{"text": f"{name} {i}"} for i in range(40)] for name in splits}
    DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(str(tmp_path / "d"))
    train, test, _ = load_splits(DataArguments(dataset_name=str(tmp_path / "d"), **arguments))
    assert (len(train), len(test)) == expected
    assert not set(train["text"]) & set(test["text"])


def test_missing_empty_and_broken_data_are_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"gone\.jsonl, which does not exist"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "gone.jsonl")))
    with pytest.raises(BadRequest, match="cannot be loaded"):
        load_splits(DataArguments(dataset_name="nobody/nothing"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadRequest, match="empty"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "empty.jsonl")))
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(BadRequest, match="broken"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "broken.jsonl")))


def test_boundary_tokens_that_merge_belong_to_the_answer(tokenizer):
    row = encode_one({"prompt": "Question", "completion": ": x"}, tokenizer, 50)
    assert row["input_ids"][: row["prompt_length"]] == tokenizer("Question")["input_ids"]
    assert row["input_ids"][:-1] == tokenizer("Question: x")["input_ids"]


def test_anybody_can_encode_a_data_set(tokenizer):
    rows = [PROBLEM, {"question": "why?", "answer": ""}, {"question": "2+2?", "answer": "4"}]
    whole = encode_dataset(Dataset.from_list(rows), tokenizer, 256, "test").dataset.select_columns(
        ["input_ids", "labels"]
    )
    for given in (Dataset.from_list(rows), Dataset.from_list(rows).with_format("torch")):
        assert encode(given, tokenizer, max_length=256).to_list() == whole.to_list()
    for stream in (Dataset.from_list(rows).to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))):
        encoded = encode(stream, tokenizer, max_length=256)
        assert isinstance(encoded, IterableDataset)
        assert list(encoded) == list(encoded) == whole.to_list()
    splits = encode(DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])), tokenizer)
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 1}
    with pytest.raises(BadRequest, match="has the columns foo; KAVA reads"):
        encode(Dataset.from_list([{"foo": "x"}]), tokenizer)
    with pytest.raises(BadRequest, match="has the columns foo; KAVA reads"):
        encode(Dataset.from_list([{"foo": "x"}]).to_iterable_dataset(), tokenizer)


def test_what_is_to_be_told_of_encoded_rows_is_a_warning(chat_tokenizer):
    turns = [{"role": "user", "content": "2+3?", "name": "Ann"}, {"role": "assistant", "content": "5"}]
    with pytest.warns(
        UserWarning, match="In 2 of 2 encoded rows the chat template leaves out .*: name of user messages"
    ):
        encode(Dataset.from_list([{"messages": turns}] * 2), chat_tokenizer)
    with pytest.raises(BadRequest, match="in row 2 of the data, a conversation must end"):
        encode(Dataset.from_list([{"messages": turns}, {"messages": turns[:1]}]), chat_tokenizer)


def test_of_a_stream_the_first_row_of_each_kind_is_told(chat_tokenizer):
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    named = [turns[0] | {"name": "Ann"}, turns[1] | {"weight": 1}]
    order = [turns, turns[:1], named, turns, turns[:1], named, named[:1]]
    stream = Dataset.from_list([{"messages": messages} for messages in order]).to_iterable_dataset()
    with pytest.warns(UserWarning, match="Row [23]") as told:
        assert len(list(encode(stream, chat_tokenizer, assistant_turns="all"))) == 4
    lines = sorted(str(one.message).split(". Give the tokenizer")[0] for one in told)
    left_out = "In 1 of 3 streamed rows the chat template leaves out what the data holds:"
    assert lines[:2] == [
        f"{left_out} name of user messages. Row 3 of the data",
        f"{left_out} weight of assistant messages. Row 3 of the data",
    ]
    assert lines[2].startswith("Row 2 cannot be used and is left out: a conversation must end with the assistant")
    assert len(lines) == 3


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.eos_token = None
    with pytest.raises(BadRequest, match="has no end-of-text token, so a student could never learn to stop; set its"):
        encode(Dataset.from_list([PROBLEM]), own)


@pytest.mark.parametrize("given", ["data.csv", [{"text": "a"}]])
def test_only_data_sets_are_encoded(tokenizer, given):
    with pytest.raises(ValueError, match=r"takes a data set, and this is a \w+; write Dataset\.from_list"):
        encode(given, tokenizer)


def test_encoded_data_is_trained_on(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.train_dataset = encode(Dataset.from_list([PROBLEM] * 16), tokenizer)
    trainer.train()
    assert len(loss_lines(trainer)) == 2


@pytest.mark.parametrize(
    ("feature", "told"),
    [
        (ClassLabel(names=["yes", "no"]), "holds the numbers of classes, such as 0 for 'yes'"),
        (Value("float32"), "holds float32 values"),
        (Value("timestamp[s]"), "holds timestamp"),
    ],
)
def test_types_that_are_no_text_are_refused_of_data_sets_in_memory_too(tokenizer, feature, told):
    features = Features({"prompt": Value("string"), "completion": feature})
    rows = Dataset.from_dict({"prompt": ["a"], "completion": [0]}, features=features)
    for data in (rows, rows.to_iterable_dataset(), DatasetDict(train=rows)):
        with pytest.raises(BadRequest, match=f"column 'completion' of 'the data' {told}"):
            encode(data, tokenizer)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["Question", "Answer"], "Rename 'Question' to 'question', 'Answer' to 'answer'."),
        (["question", " answer"], "has the columns question, ' answer'; KAVA reads .* Rename ' answer' to 'answer'."),
        (["conversations", "id"], "Make messages of the conversations"),
        (["instruction", "input", "output"], "Join instruction and input into a column prompt"),
        (["foo"], "Rename yours to one of these."),
    ],
)
def test_columns_under_other_names_are_told_what_to_become(columns, said):
    with pytest.raises(BadRequest, match=said):
        find_format(columns)
