import torch
from helpers.data import random_examples

from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.packing import pack_step, spread


def test_batches_are_masked_by_length_not_by_the_padding_token(tokenizer):
    rows = random_examples(3)
    batch = DistillationCollator(tokenizer)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert all(batch["labels"][i, n:].eq(-100).all() for i, n in enumerate(lengths))
    expected = [
        (i * max(lengths) + t, row["labels"][t + 1])
        for i, row in enumerate(rows)
        for t in range(lengths[i] - 1)
        if row["labels"][t + 1] != -100
    ]
    assert list(zip(batch["answer_index"].tolist(), batch["next_tokens"].tolist(), strict=True)) == expected


def test_a_tokenizer_without_padding_token_pads_with_end_of_text(tokenizer):
    class NoPadding:
        pad_token_id, eos_token_id = None, 7

    batch = DistillationCollator(NoPadding())(
        [{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1, 2]}]
    )
    assert batch["input_ids"].tolist() == [[1, 7], [1, 2]]


def test_rows_hold_every_example_of_a_step_once_with_its_next_tokens():
    examples = random_examples(10, seed=4)
    batches = [JoiningCollator()(examples[start : start + 4]) for start in (0, 4, 8)]
    rows = pack_step(batches, budget=60)
    found = []
    for row in rows:
        assert row["input_ids"].shape == row["attention_mask"].shape == (1, sum(row["packed_lengths"]))
        assert row["attention_mask"].all()
        assert row["input_ids"].shape[1] <= 60
        labels = torch.full_like(row["input_ids"][0], -100)
        labels[row["answer_index"] + 1] = row["next_tokens"]
        found += zip(row["input_ids"][0].split(row["packed_lengths"]), labels.split(row["packed_lengths"]), strict=True)
    found = sorted((ids.tolist(), labels.tolist()) for ids, labels in found)
    assert found == sorted((example["input_ids"], example["labels"]) for example in examples)


def test_the_first_token_of_an_example_is_never_predicted_from_the_one_before():
    examples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    (row,) = pack_step([JoiningCollator()(examples)], budget=10)
    predicted = dict(zip(row["answer_index"].tolist(), row["next_tokens"].tolist(), strict=True))
    assert predicted == {0: 6, 1: 7, 3: 9}


def test_rows_are_dealt_out_so_that_the_last_micro_batch_has_one():
    rows = [{"row": index} for index in range(5)]
    assert [len(part) for part in spread(rows[:2], 4)] == [0, 0, 1, 1]
    assert [len(part) for part in spread(rows, 3)] == [3, 1, 1]
    assert [len(part) for part in spread(rows, 1)] == [5]
    for count in (1, 3, 8):
        assert [row for part in spread(rows, count) for row in part] == rows
