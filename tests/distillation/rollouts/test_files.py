"""Rollouts in a file: what is written is what is read, anything else is refused, and data is mixed with it exactly."""

import json
from collections import Counter

import pytest
from datasets import Dataset
from helpers.bad_requests import other_tokenizer
from helpers.data import random_examples
from transformers import AutoTokenizer

from kava_trainer import rollout_examples
from kava_trainer.data.formats import ASKED, SAMPLED, WRITTEN
from kava_trainer.distillation.rollouts.examples import Rollout
from kava_trainer.distillation.rollouts.files import (
    as_dataset,
    mixed,
    mixed_counts,
    read_rollouts,
    tokenizer_digest,
    write_rollouts,
)
from kava_trainer.utils.errors import BadRequest

ENDED = Rollout([301, 26, 460], [26, 17, 0], ended=True)
CUT = Rollout([301], [9, 221], ended=False)


@pytest.fixture
def file(tmp_path, tokenizer):
    write_rollouts(tmp_path / "own.jsonl", [ENDED, CUT], tokenizer)
    return tmp_path / "own.jsonl"


def test_what_is_read_is_what_was_written_and_people_can_read_it_too(file, tokenizer):
    assert read_rollouts(file, tokenizer) == [ENDED, CUT]
    assert read_rollouts(file, tokenizer, longest=6, most=1) == [ENDED]
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert first == {
        "prompt": tokenizer.decode(ENDED.prompt),
        "answer": tokenizer.decode([26, 17]),
        "ended": True,
        "prompt_ids": [301, 26, 460],
        "answer_ids": [26, 17, 0],
        "tokenizer": tokenizer_digest(tokenizer),
    }
    assert (second["ended"], second["answer_ids"]) == (False, [9, 221])


def test_text_that_would_be_tokenised_otherwise_keeps_its_tokens(tmp_path, tokenizer):
    odd = Rollout([16, 16, 167], [79, 78, 254, 0], ended=True)
    again = tokenizer(tokenizer.decode(odd.answer[:3]))["input_ids"]
    assert again != odd.answer[:3]
    write_rollouts(tmp_path / "odd.jsonl", [odd], tokenizer)
    assert read_rollouts(tmp_path / "odd.jsonl", tokenizer) == [odd]


def test_answers_are_examples_with_the_tokens_labels_and_origins_of_a_rollout(file, tokenizer):
    rows = rollout_examples(file, tokenizer)
    for row, rollout in zip(rows, [ENDED, CUT], strict=True):
        example = rollout.as_example()
        assert {name: row[name] for name in example} == {name: own.tolist() for name, own in example.items()}
        assert row["prompt_length"] == len(rollout.prompt)
    assert rows[0]["origins"] == [ASKED] * 3 + [SAMPLED] * 3
    assert rows[0]["answer_text"] == tokenizer.decode([26, 17])


def test_lines_that_say_nothing_are_left_out(tmp_path, tokenizer):
    empty = [Rollout([5], [], ended=False), Rollout([5], [0], ended=True)]
    write_rollouts(tmp_path / "own.jsonl", [*empty, CUT], tokenizer)
    text = (tmp_path / "own.jsonl").read_text(encoding="utf-8")
    (tmp_path / "own.jsonl").write_text(f"\ufeff{text}\n", encoding="utf-8")  # as some editors save it
    assert read_rollouts(tmp_path / "own.jsonl", tokenizer, most=1) == [CUT]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: "{", "line 2 is not valid JSON"),
        (lambda row: "[1]", "line 2 is no rollout"),
        (lambda row: json.dumps({"question": "2+3?", "answer": "5"}), "line 2 is no rollout"),
        (lambda row: json.dumps({**row, "ended": 1}), "line 2 is no rollout"),
        (lambda row: json.dumps({**row, "tokenizer": "0" * 16}), "line 2 was written for another tokenizer"),
        (lambda row: json.dumps({**row, "answer_ids": [512]}), "answer_ids of line 2 is no list of this tokenizer's"),
        (lambda row: json.dumps({**row, "answer_ids": [True]}), "answer_ids of line 2 is no list"),
        (lambda row: json.dumps({**row, "prompt_ids": "5"}), "prompt_ids of line 2 is no list"),
        (lambda row: json.dumps({**row, "prompt_ids": [-1]}), "prompt_ids of line 2 is no list"),
        (lambda row: json.dumps({**row, "prompt_ids": []}), "line 2 has no prompt"),
        (
            lambda row: json.dumps({**row, "answer_ids": [5] * 9}),
            "line 2 holds 10 tokens, more than the 8 of max_length and on_policy_max_new_tokens together; raise one of",
        ),
    ],
)
def test_a_line_that_is_no_rollout_of_these_models_is_named(file, tokenizer, change, told):
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{change(json.loads(second))}\n")
    with pytest.raises(BadRequest, match=told):
        read_rollouts(file, tokenizer, longest=8)


def test_a_file_that_is_none_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    told = {"empty": "hold no answer that says", "binary": "are not UTF-8", "gone": "cannot be read: No such file"}
    for name, part in told.items():
        with pytest.raises(BadRequest, match=part):
            read_rollouts(tmp_path / f"{name}.jsonl", tokenizer)


def test_the_digest_knows_the_meaning_of_token_ids_and_nothing_else(tmp_path, tokenizer, file):
    again = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    again.padding_side, again.chat_template = "left", "{{ messages }}"
    again("text", truncation=True, max_length=2)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    swapped = AutoTokenizer.from_pretrained(other_tokenizer(tmp_path))
    with pytest.raises(BadRequest, match="line 1 was written for another tokenizer"):
        read_rollouts(file, swapped)


def data_of(count):
    rows = [{**example, "answer_text": ""} for example in random_examples(count)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("written", "rollouts", "fraction", "counts"),
    [
        (10, 10, 0.5, (10, 10)),
        (10, 3, 0.5, (10, 10)),
        (3, 10, 0.3, (24, 10)),
        (500, 4500, 0.9, (500, 4500)),
        (7, 5, 1.0, (0, 5)),
        (99, 1, 0.01, (99, 1)),
    ],
)
def test_the_share_is_exact_and_every_row_of_both_is_there(written, rollouts, fraction, counts):
    assert mixed_counts(written, rollouts, fraction) == counts


def test_the_mixture_repeats_the_short_side_evenly_and_follows_from_the_seed(tokenizer):
    data = data_of(12)
    own = as_dataset([Rollout([5], [6, token], ended=False) for token in range(5)], tokenizer)
    rows = mixed(data, own, 0.5, seed=3)
    kinds = [row["origins"][-1] for row in rows]
    assert Counter(kinds) == {WRITTEN: 12, SAMPLED: 12}
    assert [row["input_ids"] for row in rows if row["origins"][-1] == WRITTEN] == data["input_ids"][:]
    answers = [row["input_ids"][-1] for row in rows if row["origins"][-1] == SAMPLED]
    assert answers == [place % 5 for place in range(12)]
    assert all(len(row["origins"]) == len(row["input_ids"]) == len(row["labels"]) for row in rows)
    assert rows[:] == mixed(data, own, 0.5, seed=3)[:]
    assert kinds != [row["origins"][-1] for row in mixed(data, own, 0.5, seed=4)]
    assert mixed(data, own, 1.0, seed=3) is own


@pytest.mark.parametrize(("sizes", "fraction"), [((5000, 10), 0.9), ((10, 500), 1e-9), ((2000, 1), 0.5)])
def test_a_share_for_which_rows_would_be_repeated_without_end_is_refused(sizes, fraction):
    with pytest.raises(BadRequest, match="would repeat some of them more than 100 times"):
        mixed_counts(*sizes, fraction)
