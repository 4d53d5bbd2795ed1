import pytest
import torch
from transformers import AutoTokenizer

from kava_trainer.data.formats import ASKED, SAMPLED, WRITTEN
from kava_trainer.data.rows.encoder import Encoder
from kava_trainer.distillation.rollouts.examples import (
    Rollout,
    of_the_data,
    prompt_alone,
    prompt_of,
    rollout_of,
)
from kava_trainer.quickstart import STUDENT_FOLDER

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("generated", "answer", "ended", "empty"),
    [
        ([5, 6, 0, 0, 0], [5, 6, 0], True, False),
        ([5, 6, 9, 7], [5, 6, 9], True, False),
        ([5, 6, 7], [5, 6, 7], False, False),
        ([0, 0], [0], True, True),
        ([], [], False, True),
    ],
)
def test_nothing_counts_behind_the_end_of_text_and_an_answer_without_one_gets_none(generated, answer, ended, empty):
    rollout = rollout_of([1, 2], generated, end_tokens=(0, 9))
    assert (rollout.answer, rollout.ended, rollout.is_empty) == (answer, ended, empty)


def test_the_answer_alone_has_labels_and_each_token_says_whose_it_is():
    example = Rollout([1, 2, 3], [5, 0], ended=True).as_example()
    assert example["input_ids"].tolist() == [1, 2, 3, 5, 0]
    assert example["labels"].tolist() == [-100, -100, -100, 5, 0]
    assert example["origins"].tolist() == [ASKED] * 3 + [SAMPLED] * 2


def test_a_prompt_alone_teaches_nothing():
    example = prompt_alone([1, 2])
    assert example["labels"].tolist() == [-100, -100]
    assert example["origins"].tolist() == [ASKED, ASKED]


def test_an_example_of_the_data_stays_what_it_is():
    example = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2])}
    assert of_the_data(example)["origins"].tolist() == [WRITTEN, WRITTEN]
    assert of_the_data(example)["labels"] is example["labels"]


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([-100, -100, 3, 4], [1, 2]),
        ([-100, 2, -100, 4], [1]),
        ([1, 2, 3, 4], [1]),
        ([-100, -100, -100, -100], [1, 2, 3, 4]),
    ],
)
def test_a_prompt_is_all_before_the_first_label(labels, prompt):
    assert prompt_of({"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor(labels)}) == prompt


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_chat_s_prompt_is_what_the_template_puts_before_an_answer(turns):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    example = Encoder(("messages",), tokenizer, 64, turns)({"messages": messages})
    tokens = {name: torch.tensor(example[name]) for name in ("input_ids", "labels")}
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt_of(tokens) == tokenizer(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("answer", "share"), [([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4] * 2, 1 / 5), ([], 0.0)]
)
def test_repetition_is_the_share_of_runs_of_four_that_stood_there_before(answer, share):
    assert Rollout([1], answer, ended=False).repetition() == pytest.approx(share)
