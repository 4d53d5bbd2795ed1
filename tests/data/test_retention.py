import gzip
import json

import pytest
from datasets import Dataset

from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data.retention import PROMPTS, RETENTION_TEXTS, describe_retention, load_retention
from kava_trainer.utils.errors import BadRequest

QUESTIONS = ["Ann has 3 pens. How many?", "Bob has 4 cups.", "  "]


def asked(**changes):
    return DataArguments(dataset_name="data", **changes)


def chat(*contents):
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def held_out(kind):
    if kind == "question":
        return Dataset.from_list([{"question": text, "answer": "7"} for text in QUESTIONS])
    if kind == "prompt":
        return Dataset.from_list([{"prompt": text, "completion": "7"} for text in QUESTIONS])
    if kind == "chat prompt":
        rows = [{"prompt": [{"role": "user", "content": text}], "completion": chat("", "", "7")["messages"][2:]}
                for text in QUESTIONS]  # fmt: skip
        return Dataset.from_list(rows)
    return Dataset.from_list([chat("Be brief.", text, "7") for text in QUESTIONS])


@pytest.mark.parametrize("kind", ["question", "prompt", "chat prompt", "messages"])
def test_by_default_it_is_what_people_wrote_of_the_prompts_without_any_template(tokenizer, kind):
    found = load_retention(asked(), held_out(kind), tokenizer)
    assert list(found["input_ids"]) == [tokenizer(text)["input_ids"] for text in QUESTIONS[:2]]
    assert list(found["labels"]) == list(found["input_ids"])


def test_all_that_the_user_says_of_a_conversation_is_read_and_no_answer(tokenizer):
    rows = Dataset.from_list([chat("Be brief.", "One pen.", "Yes.", "Two cups.", "No.")])
    (tokens,) = load_retention(asked(), rows, tokenizer)["input_ids"]
    assert tokens == tokenizer("One pen.\n\nTwo cups.")["input_ids"]


def test_plain_text_has_no_prompts_and_none_asks_for_no_figure(tokenizer):
    assert load_retention(asked(), Dataset.from_list([{"text": "Ann has pens."}]), tokenizer) is None
    assert load_retention(asked(retention_dataset_name="none"), held_out("question"), tokenizer) is None
    assert load_retention(asked(), None, tokenizer) is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["text", "prompt", "question"])
def test_a_named_data_set_is_read_by_its_text(tokenizer, tmp_path, column, streaming):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in QUESTIONS), encoding="utf-8")
    found = load_retention(asked(retention_dataset_name=str(path), streaming=streaming), held_out("prompt"), tokenizer)
    assert list(found["input_ids"]) == [tokenizer(text)["input_ids"] for text in QUESTIONS[:2]]


def test_the_test_split_is_read_where_there_is_one(tokenizer, tmp_path):
    for split, text in (("train", "Ann has pens."), ("test", "Bob has cups.")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    found = load_retention(asked(retention_dataset_name=str(tmp_path)), held_out("prompt"), tokenizer)
    assert list(found["input_ids"]) == [tokenizer("Bob has cups.")["input_ids"]]


@pytest.mark.parametrize(("name", "opened"), [("book.txt", open), ("book.TXT", open), ("book.txt.gz", gzip.open)])
def test_a_text_file_is_read_by_its_paragraphs(tokenizer, tmp_path, name, opened):
    with opened(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("Ann has\n3 pens.\n\n \n\nBob has cups.\n")
    found = load_retention(asked(retention_dataset_name=str(tmp_path / name)), held_out("prompt"), tokenizer)
    assert list(found["input_ids"]) == [tokenizer(text)["input_ids"] for text in ("Ann has\n3 pens.", "Bob has cups.")]


def test_the_first_texts_are_read_and_cut(tokenizer):
    rows = Dataset.from_list([{"question": f"{number} pens and cups", "answer": "7"} for number in range(310)])
    assert len(load_retention(asked(), rows, tokenizer)) == RETENTION_TEXTS
    few = load_retention(asked(max_eval_samples=3, max_length=2), rows, tokenizer)
    assert list(map(len, few["input_ids"])) == [2, 2, 2]
    told = describe_retention(asked(), few, 6.5)
    assert told == {"source": PROMPTS, "texts": 3, "tokens": 3, "chance": 6.5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"words": "Ann has pens."}\n',
            "has the columns words; its text is read from text, messages, prompt, question",
        ),
        ('{"text": "  "}\n', "holds no text of two tokens or more"),
        ('{"text": "Ann"}\n{broken', "retention_dataset_name cannot be read"),
        ('{"messages": [{"role": "user"}]}\n', "in its row 1, messages must hold messages such as"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_argument(tokenizer, tmp_path, content, said):
    (tmp_path / "own.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(BadRequest, match="retention_dataset_name") as refused:
        load_retention(asked(retention_dataset_name=str(tmp_path / "own.jsonl")), held_out("prompt"), tokenizer)
    assert said in str(refused.value)


def test_a_text_file_that_is_not_there_is_refused(tokenizer):
    with pytest.raises(BadRequest, match=r"retention_dataset_name names the file gone\.txt, which"):
        load_retention(asked(retention_dataset_name="gone.txt"), held_out("prompt"), tokenizer)


def test_a_path_that_is_not_there_and_a_configuration_of_nothing_are_mistakes():
    found = asked(retention_dataset_name="./gone", retention_dataset_config_name=None)
    assert [problem.argument for problem in found.problems()] == ["retention_dataset_name"]
    for name in (None, "none"):
        found = asked(retention_dataset_name=name, retention_dataset_config_name="de")
        assert [problem.argument for problem in found.problems()] == ["retention_dataset_config_name"]
