import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from kava_trainer.config.arguments import KavaArguments, KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.rows.prompts import have_answers, with_answer_column
from kava_trainer.data.splits import load_splits
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.errors import BadRequest

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "2+3?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "5"}]


def encoded(rows, tokenizer, max_length=64):
    rows = with_answer_column(Dataset.from_list(rows))
    return encode_dataset(rows, tokenizer, max_length, "Tokenizing", accepts_prompts=True)


@pytest.mark.parametrize(
    ("row", "text"), [({"question": "2+3?"}, "Question: 2+3?\nAnswer:"), ({"prompt": "2+3="}, "2+3=")]
)
def test_a_prompt_alone_becomes_an_example_without_labels(tokenizer, row, text):
    (example,) = encoded([row], tokenizer).dataset
    assert example["input_ids"] == tokenizer(text)["input_ids"]
    assert example["labels"] == [-100] * len(example["input_ids"])
    assert example["prompt_length"] == len(example["input_ids"])


def test_a_row_with_an_answer_beside_it_is_what_it_always_was(tokenizer):
    rows = [{"question": "2+3?", "answer": "5"}, {"question": "1+1?", "answer": ""}]
    with_answer, alone = encoded(rows, tokenizer).dataset
    (plain,) = encode_dataset(Dataset.from_list(rows[:1]), tokenizer, 64, "Tokenizing").dataset
    assert with_answer == plain
    assert alone["input_ids"] == tokenizer("Question: 1+1?\nAnswer:")["input_ids"]


def test_a_conversation_that_waits_for_an_answer_ends_with_what_one_begins_with():
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    tokenizer.chat_template = TEMPLATE
    waits, answered = encoded([{"messages": ASKED}, {"messages": ANSWERED}], tokenizer).dataset
    assert waits["input_ids"] == tokenizer("<user>2+3?;<assistant>")["input_ids"]
    assert set(waits["labels"]) == {-100}
    (plain,) = encode_dataset(Dataset.from_list([{"messages": ANSWERED}]), tokenizer, 64, "Tokenizing").dataset
    assert answered["input_ids"] == plain["input_ids"]
    assert answered["labels"] == plain["labels"]
    (turns,) = encoded([{"prompt": ASKED}], tokenizer).dataset
    assert turns["input_ids"] == waits["input_ids"]


def test_many_conversations_that_wait_before_one_with_an_answer_are_read_too(tokenizer):
    rows = with_answer_column(Dataset.from_list([{"messages": ASKED}] * 1100 + [{"messages": ANSWERED}]))
    assert rows[0] == {"prompt": ASKED, "completion": []}
    assert rows[1100]["completion"] == ANSWERED[-1:]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_and_an_empty_one_too(tokenizer):
    found = encoded([{"prompt": "2+3="}, {"prompt": "2+3=" * 40}, {"prompt": " "}], tokenizer, 16)
    assert (len(found.dataset), found.dropped, found.empty) == (1, 2, [])


def test_an_end_of_text_that_the_tokenizer_puts_behind_any_text_is_no_part_of_a_prompt(tokenizer, monkeypatch):
    kind, plain = type(tokenizer), type(tokenizer).__call__

    def ending(self, text, **options):
        found = plain(self, text, **options)
        found["input_ids"] = [*found["input_ids"], self.eos_token_id]
        return found

    expected = tokenizer("2+3=")["input_ids"]
    monkeypatch.setattr(kind, "__call__", ending)
    (example,) = encoded([{"prompt": "2+3="}], tokenizer).dataset
    assert example["input_ids"] == expected


@pytest.mark.parametrize(
    ("rows", "answered"),
    [
        ([{"question": "a"}], False),
        ([{"prompt": "a"}], False),
        ([{"question": "a", "answer": ""}, {"question": "b", "answer": "c"}], True),
        ([{"messages": ASKED}], False),
        ([{"messages": ANSWERED}], True),
        ([{"text": "a"}], True),
    ],
)
def test_whether_there_are_answers_is_told_from_the_columns(rows, answered):
    assert have_answers(with_answer_column(Dataset.from_list(rows))) == answered


def asked(folder, rows, fraction):
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    training = KavaTrainingArguments(str(folder), use_cpu=True, on_policy_fraction=fraction)
    return KavaArguments(ModelArguments("a"), DataArguments(str(folder / "rows.jsonl")), training).data


def test_rows_may_lack_answers_only_where_the_student_writes_all_of_them(tmp_path):
    rows = [{"question": f"{i}+1?"} for i in range(40)]
    train, held_out, _ = load_splits(asked(tmp_path, rows, 1.0))
    assert (len(train), held_out) == (40, None)
    with pytest.raises(BadRequest, match="The data set has the columns question"):
        load_splits(asked(tmp_path, rows, 0.5))


def test_answers_that_are_there_are_held_out_as_ever(tmp_path):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(40)]
    train, held_out, _ = load_splits(asked(tmp_path, rows, 1.0))
    assert (len(train), len(held_out)) == (38, 2)
