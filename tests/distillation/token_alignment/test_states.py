import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_llama
from helpers.small_tokenizers import byte_level, sentence_pieces

from kava_trainer import encode
from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.packing import halve, pack_step
from kava_trainer.data.token_alignment.batching import widest
from kava_trainer.distillation.token_alignment.states import compared_items, is_compared, pooled, read_states
from kava_trainer.models.packed_attention import enable_packing
from kava_trainer.models.teacher import OnlineTeacher

TEXTS = ["Tom has 12 apples.", "你好 😀 b", "How many are there in all? I do not know."]


def some_ranges(rows, count, tokens):
    starts = torch.randint(0, tokens, (rows, count))
    ends = torch.minimum(starts + torch.randint(0, 4, (rows, count)), torch.tensor(tokens))
    return torch.stack([starts, ends], dim=-1)


def slow_means(states, ranges):
    means = torch.zeros(*ranges.shape[:2], states.shape[-1])
    for row in range(ranges.shape[0]):
        for token in range(ranges.shape[1]):
            start, *_, end = ranges[row, token].tolist()
            if end > start:
                means[row, token] = states[row, start:end].float().mean(dim=0)
    return means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_mean_of_its_states(dtype):
    torch.manual_seed(0)
    states, ranges = torch.randn(2, 9, 5).to(dtype), some_ranges(2, 12, 9)
    found = pooled(states, ranges, widest(ranges))
    assert found.dtype == dtype
    torch.testing.assert_close(found, slow_means(states, ranges).to(dtype))


def test_one_state_is_itself_and_none_is_zero():
    states = torch.randn(1, 4, 3).bfloat16()
    ranges = torch.tensor([[[2, 3], [0, 0], [3, 4]]])
    found = pooled(states, ranges, 1)
    assert torch.equal(found[0, [0, 2]], states[0, [2, 3]])
    assert found[0, 1].tolist() == [0, 0, 0]
    assert pooled(states, torch.zeros(1, 2, 2, dtype=torch.long), 0).shape == (1, 2, 3)


def test_values_of_any_size_beside_it_change_no_mean():
    """A running sum over all tokens would lose what a large state leaves of the others."""
    states = torch.tensor([[[1e8], [1.0], [2.0]]])
    assert pooled(states, torch.tensor([[[1, 3]]]), 2).item() == 1.5


@pytest.fixture(scope="module", params=["overlap", "causal"])
def examples(request):
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    if request.param == "overlap":
        return list(encode(rows, byte_level(), 64, teacher_tokenizer=sentence_pieces()))
    return list(encode(rows, sentence_pieces(), 64, teacher_tokenizer=byte_level(), token_alignment="causal"))


def test_the_teacher_reads_its_own_tokens(examples):
    teacher = OnlineTeacher(tiny_llama(16, 2), [1, 2])
    batch = DistillationCollator()(examples)
    found = read_states(teacher, batch)
    for row, example in enumerate(examples):
        alone = {"input_ids": torch.tensor([example["teacher_input_ids"]])}
        states = teacher.features({**alone, "attention_mask": torch.ones_like(alone["input_ids"])})
        for layer in (1, 2):
            expected = slow_means(states[layer], torch.tensor([example["teacher_ranges"]]))[0]
            torch.testing.assert_close(found[layer][row, : len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_packed_rows_and_their_halves_have_the_same_states(examples):
    model = tiny_llama(16, 2)
    enable_packing(model)
    teacher = OnlineTeacher(model, [2])
    padded = DistillationCollator()(examples)
    states = read_states(teacher, padded)[2]
    expected = torch.cat([states[i, : len(example["input_ids"])] for i, example in enumerate(examples)])
    row = pack_step([JoiningCollator()(examples)], 1000)[0]
    torch.testing.assert_close(read_states(teacher, row)[2][0], expected, atol=1e-5, rtol=1e-4)
    halves = [read_states(teacher, half)[2][0] for half in halve(row)]
    torch.testing.assert_close(torch.cat(halves), expected, atol=1e-5, rtol=1e-4)


def test_causal_ranges_leave_out_what_has_read_ahead():
    """Of the tokens that are compared no state changes where the text behind them does."""
    rows = Dataset.from_list([{"text": text} for text in ("Tom has 12 apples.", "Tom has 12 appl")])
    read = {"teacher_tokenizer": byte_level(), "max_length": 64}
    teacher = OnlineTeacher(tiny_llama(16, 2), [2])
    shares = {}
    for rule in ("overlap", "causal"):
        whole, cut_off = (
            DistillationCollator()([own]) for own in encode(rows, sentence_pieces(), token_alignment=rule, **read)
        )
        ours, theirs = whole["input_ids"][0], cut_off["input_ids"][0]
        same = next(i for i in range(len(theirs)) if ours[i] != theirs[i])
        compared = is_compared(whole, whole["attention_mask"].bool())[0, :same]
        states = [read_states(teacher, batch)[2][0, :same][compared] for batch in (whole, cut_off)]
        shares[rule] = compared.float().mean().item(), torch.allclose(*states, atol=1e-6)
    assert shares["overlap"][0] > shares["causal"][0] > 0
    assert not shares["overlap"][1]
    assert shares["causal"][1]


def test_an_example_of_no_tokens_stands_beside_others_and_alone(examples):
    empty = {name: [] for name in examples[0]}
    assert is_compared(DistillationCollator()([empty, examples[0]]), torch.tensor(True)).any()
    (row,) = pack_step([JoiningCollator()([empty]), JoiningCollator()([examples[0]])], 1000)
    assert is_compared(row, row["attention_mask"].bool()).any()


def test_a_range_has_two_or_three_numbers(examples):
    plain = {**examples[0], "teacher_ranges": [own[:2] for own in examples[0]["teacher_ranges"]]}
    (row,) = pack_step([JoiningCollator()([plain]), JoiningCollator()([examples[1]])], 1000)
    assert row["teacher_ranges"].shape[2] == len(examples[1]["teacher_ranges"][0])
    for wrong in ([own[:1] for own in plain["teacher_ranges"]], [[*own, 0, 0] for own in plain["teacher_ranges"]]):
        with pytest.raises(ValueError, match="range of two or three numbers"):
            DistillationCollator()([{**plain, "teacher_ranges": wrong}])


def test_a_pair_of_one_tokenizer_is_read_as_ever(examples):
    plain = [{name: example[name] for name in ("input_ids", "labels")} for example in examples]
    batch, teacher = DistillationCollator()(plain), OnlineTeacher(tiny_llama(16, 2), [2])
    assert torch.equal(read_states(teacher, batch)[2], teacher.features(batch)[2])
    mask = batch["attention_mask"].bool()
    assert is_compared(batch, mask) is mask
    assert compared_items(batch, torch.tensor([7, 1, 2])) == 7


def test_tokens_without_a_state_are_not_compared(examples):
    batch = DistillationCollator()(examples)
    found = is_compared(batch, batch["attention_mask"].bool())
    for row, example in enumerate(examples):
        expected = [end > start for start, *_, end in example["teacher_ranges"]]
        assert found[row, : len(expected)].tolist() == expected
        assert not found[row, len(expected) :].any()
    assert compared_items(batch, torch.tensor([7, 1, 2, 5])) == 5
