import pytest
import torch
from datasets import Dataset
from helpers.small_tokenizers import byte_level, sentence_pieces

from kava_trainer import encode
from kava_trainer.data.collators import DistillationCollator, JoiningCollator, separated
from kava_trainer.data.packing import as_many_rows, halve, pack_step

TEXTS = ["Tom has 12 apples.", "你好 😀", "How many are there in all? I do not know.", "7"]


@pytest.fixture(scope="module")
def examples():
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    return list(encode(rows, byte_level(), 64, teacher_tokenizer=sentence_pieces()))


def read_of(ids):
    """States that tell the token and the place: what a cache would give."""
    return {3: torch.stack([torch.tensor(ids).float(), torch.arange(len(ids)).float()], dim=1)}


def told(batch):
    """Of each student token of a batch its id with those of the teacher that it is aligned with, example by example."""
    found = []
    tokens, ranges = batch["teacher_input_ids"], batch["teacher_ranges"]
    for row, own in enumerate(batch["input_ids"]):
        real = own[batch["attention_mask"][row].bool()]
        pairs = [
            (int(token), tokens[row][start:end].tolist())
            for token, (start, end) in zip(real, ranges[row], strict=False)
        ]
        place = 0
        for length in batch.get("packed_lengths", (len(pairs),)):
            found.append(pairs[place : place + length])
            place += length
    return found


def expected(examples):
    return [
        [
            (token, example["teacher_input_ids"][start:end])
            for token, (start, end) in zip(example["input_ids"], example["teacher_ranges"], strict=True)
        ]
        for example in examples
    ]


def test_padded_examples_keep_their_ranges(examples):
    batch = DistillationCollator()(examples)
    assert told(batch) == expected(examples)
    assert batch["teacher_attention_mask"].sum(dim=1).tolist() == [len(own["teacher_input_ids"]) for own in examples]
    assert batch["teacher_widest"] == max(end - start for own in examples for start, end in own["teacher_ranges"])


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_packed_examples_keep_their_ranges(examples, budget):
    rows = pack_step([JoiningCollator()(examples[:2]), JoiningCollator()(examples[2:])], budget)
    assert sorted(own for row in rows for own in told(row)) == sorted(expected(examples))
    for row in rows:
        assert sum(row["teacher_packed_lengths"]) == row["teacher_input_ids"].numel()


def test_halves_keep_their_ranges(examples):
    for whole in (DistillationCollator()(examples), pack_step([JoiningCollator()(examples)], 1000)[0]):
        halves = halve(whole)
        assert [own for half in halves for own in told(half)] == told(whole)
        quarters = [quarter for half in halves for quarter in halve(half)]
        assert [own for quarter in quarters for own in told(quarter)] == told(whole)
    rows = as_many_rows(pack_step([JoiningCollator()(examples)], 1000), 4)
    assert sorted(own for row in rows for own in told(row)) == sorted(expected(examples))


def test_states_of_a_cache_are_those_of_the_teachers_tokens(examples):
    padded = DistillationCollator(read_states=read_of)(examples)
    packed = pack_step([JoiningCollator(read_of)(examples)], 1000)[0]
    for batch in (padded, packed, *halve(padded), *halve(packed)):
        states, ids = batch["teacher_states"][3], batch["teacher_input_ids"]
        mask = batch["teacher_attention_mask"].bool()
        assert torch.equal(states[..., 0][mask], ids[mask].float())
    starts = [0]
    for length in packed["teacher_packed_lengths"][:-1]:
        starts.append(starts[-1] + length)
    assert packed["teacher_states"][3][0, starts, 1].tolist() == [0.0] * len(starts)


def test_an_example_of_no_tokens_has_none_for_either(examples):
    empty = {name: [] for name in examples[0]}
    batch = DistillationCollator()([examples[0], empty])
    assert batch["input_ids"].shape[0] == batch["teacher_input_ids"].shape[0] == batch["teacher_ranges"].shape[0] == 2
    assert batch["teacher_ranges"][1].sum() == 0
    batch = DistillationCollator().for_training()([examples[0], empty])
    assert batch["input_ids"].shape[0] == batch["teacher_input_ids"].shape[0] == 1


def test_examples_of_two_kinds_are_no_batch(examples):
    plain = {name: examples[0][name] for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="Some examples of a batch have teacher_input_ids and teacher_ranges"):
        DistillationCollator()([examples[0], plain])
    with pytest.raises(ValueError, match="Give every token a range"):
        JoiningCollator()([{**examples[0], "teacher_ranges": [[0, 1]]}])


def test_answers_of_the_student_have_no_ranges(examples):
    with pytest.raises(ValueError, match="teacher's other tokens"):
        separated(JoiningCollator()(examples))


def test_one_tokenizer_leaves_batches_as_they_are():
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    same = encode(rows, byte_level(), 64, teacher_tokenizer=byte_level(60, trim=True))
    assert same.column_names == ["input_ids", "labels"]
    assert not any(name.startswith("teacher") for name in DistillationCollator()(list(same)))
