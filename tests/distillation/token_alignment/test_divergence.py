import math

import pytest
import torch
from datasets import Dataset
from helpers.small_tokenizers import byte_level, sentence_pieces
from torch import nn

from kava_trainer import encode
from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.packing import halve, pack_step
from kava_trainer.distillation.chunked_loss import sum_in_chunks
from kava_trainer.distillation.logits_terms import TeacherLogits
from kava_trainer.distillation.losses import generalized_jsd_per_token
from kava_trainer.distillation.token_alignment import divergence
from kava_trainer.distillation.token_alignment.divergence import (
    SharedTokens,
    SpanDivergence,
    coinciding_spans,
    divergence_of_vocabularies,
    shared_tokens,
    span_log_probabilities,
)

TEXTS = ["Tom has 12 apples and 7 pears.", "你好 😀 b", "How many are there? an apple"]

BETAS = [0.0, 0.3, 1.0]


def ids(*numbers):
    return torch.tensor(numbers, dtype=torch.long)


SHARED = SharedTokens(ids(0, 2, 4), ids(3, 1, 0), ids(1, 3), ids(2, 4, 5), torch.tensor(4))


def slow_divergence(student, teacher, shared, temperature, beta):
    """One span by loops over plain numbers: of probabilities [V] and [V'] as lists."""

    def kl(left, right):
        return sum(a * math.log(a / b) - a + b for a, b in zip(left, right, strict=True))

    own, other = ([side[i] for i in of.tolist()] for side, of in ((student, shared.student), (teacher, shared.teacher)))
    if beta == 0:
        found = kl(other, own)
    elif beta == 1:
        found = kl(own, other)
    else:
        mixture = [beta * p + (1 - beta) * q for p, q in zip(other, own, strict=True)]
        found = beta * kl(other, mixture) + (1 - beta) * kl(own, mixture)
    rests = [sorted((side[i] for i in of.tolist()), reverse=True) for side, of in (
        (student, shared.student_rest), (teacher, shared.teacher_rest))]  # fmt: skip
    width = max(map(len, rests))
    ranked = [rest + [0.0] * (width - len(rest)) for rest in rests]
    return (found + sum(abs(a - b) for a, b in zip(*ranked, strict=True)) / 2) * temperature**2


def slow_span(logits, tokens, temperature):
    """Probabilities of what may be said over a span, as a list."""
    chances = torch.softmax(logits.double() / temperature, dim=-1)
    product = 1.0
    for place, token in enumerate(tokens[1:], start=1):
        product *= chances[place, token].item() if token >= 0 else 1.0
    return [chance * product for chance in chances[0].tolist()]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_value_is_that_of_loops_over_probabilities(beta, temperature):
    torch.manual_seed(0)
    own, other = torch.randn(3, 2, 5), torch.randn(3, 3, 6)
    tokens, others = torch.tensor([[1, 2], [0, -1], [4, 4]]), torch.tensor([[0, 5, 1], [2, -1, -1], [3, 3, -1]])
    sides = [span_log_probabilities(*side, temperature) for side in ((own, tokens), (other, others))]
    found = divergence_of_vocabularies(*sides, SHARED, temperature, beta)
    for span in range(3):
        chances = (slow_span(own[span], tokens[span].tolist(), temperature),)
        chances += (slow_span(other[span], others[span].tolist(), temperature),)
        assert found[span].item() == pytest.approx(slow_divergence(*chances, SHARED, temperature, beta), rel=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_small_steps(beta):
    torch.manual_seed(1)
    own, other = torch.randn(2, 2, 5, requires_grad=True), torch.randn(2, 1, 6)
    tokens, others = torch.tensor([[1, 2], [0, -1]]), torch.tensor([[0], [2]])
    target = span_log_probabilities(other, others, 1.0)

    def value(logits):
        return divergence_of_vocabularies(span_log_probabilities(logits, tokens, 1.0), target, SHARED, 1.0, beta).sum()

    (gradient,) = torch.autograd.grad(value(own), own)
    for place in ((0, 0, 1), (0, 1, 2), (0, 1, 0), (1, 0, 4), (1, 1, 3)):
        step = torch.zeros_like(own)
        step[place] = 1e-2
        slope = (value(own.detach() + step) - value(own.detach() - step)) / 2e-2
        assert gradient[place].item() == pytest.approx(slope.item(), abs=2e-4)


def test_spans_are_those_of_the_text_whatever_states_are_compared():
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    found = []
    for rule in ("overlap", "causal"):
        examples = list(encode(rows, sentence_pieces(), 64, teacher_tokenizer=byte_level(), token_alignment=rule))
        for batch in (DistillationCollator()(examples), pack_step([JoiningCollator()(examples)], 1000)[0]):
            found.append(coinciding_spans(batch, torch.tensor(sentence_pieces().eos_token_id)))
    for overlap, causal in zip(found[:2], found[2:], strict=True):
        assert len(overlap.student) > 5
        assert all(torch.equal(one, other) for one, other in zip(overlap, causal, strict=True))


@pytest.mark.parametrize("beta", BETAS)
def test_one_vocabulary_in_another_order_has_the_divergence_of_one(beta):
    torch.manual_seed(2)
    own, other, order = torch.randn(4, 7), torch.randn(4, 7), torch.randperm(7)
    shared = SharedTokens(torch.arange(7), order, ids(), ids(), torch.tensor(0))
    moved = torch.empty_like(other)
    moved[:, order] = other
    single = torch.full((4, 1), 3)
    sides = [span_log_probabilities(side.unsqueeze(1), single, 2.0) for side in (own, moved)]
    expected = generalized_jsd_per_token(own, other, 2.0, beta)
    torch.testing.assert_close(divergence_of_vocabularies(*sides, shared, 2.0, beta), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_never_below_nothing_and_nothing_where_both_say_the_same(beta):
    torch.manual_seed(3)
    shared = SharedTokens(ids(0, 1), ids(0, 1), ids(2, 3), ids(3, 2), torch.tensor(0))
    for scale in (0.1, 3.0):
        own, other = (torch.log_softmax(scale * torch.randn(50, 4), dim=-1) - torch.rand(50, 1) for _ in range(2))
        assert divergence_of_vocabularies(own, other, shared, 1.0, beta).min() >= -1e-6
    turned = own[:, [0, 1, 3, 2]]
    assert divergence_of_vocabularies(own, turned, shared, 1.0, beta).abs().max() < 1e-6


def test_tokens_are_shared_by_the_bytes_that_they_stand_for():
    student, teacher = byte_level(), sentence_pieces()
    shared = shared_tokens(student, teacher)
    pairs = dict(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    assert pairs[student.eos_token_id] == teacher.eos_token_id
    named = {student.convert_ids_to_tokens(own): teacher.convert_ids_to_tokens(other) for own, other in pairs.items()}
    assert named["a"] == "a"
    assert named["Ġ"] == "▁"
    assert named["Ċ"] == "<0x0A>"
    assert named["a"] != "<0x61>"  # a piece before its byte
    assert "Question" not in named
    for of, rest, tokenizer in ((0, shared.student_rest, student), (1, shared.teacher_rest, teacher)):
        assert {*shared[of].tolist(), *rest.tolist()} == {*tokenizer.get_vocab().values()}
        assert not {*shared[of].tolist()} & {*rest.tolist()}


def batch_of(ranges, teacher, ids, next_index=None):
    following = torch.arange(len(ids) - 1) if next_index is None else torch.tensor(next_index)
    return {
        "input_ids": torch.tensor([ids]),
        "teacher_input_ids": torch.tensor([teacher]),
        "teacher_ranges": torch.tensor([ranges]),
        "next_index": following,
    }


END = torch.tensor(9)


@pytest.mark.parametrize(
    ("ranges", "student", "teacher"),
    [
        ([[0, 1], [1, 2], [2, 3]], [[0], [1]], [[0], [1]]),  # the first has nothing before it
        ([[0, 1], [1, 3], [3, 4]], [[0], [1]], [[0, 1], [2, -1]]),
        ([[0, 1], [1, 2], [1, 2]], [[0, 1]], [[0]]),
        ([[0, 1], [1, 3], [2, 4]], [[0, 1]], [[0, 1, 2]]),
        ([[0, 0], [0, 1], [1, 2]], [[1]], [[0]]),  # the teacher has nothing before its first
        ([[0, 1], [1, 2], [0, 0]], [[0]], [[0]]),
    ],
)
def test_spans_end_where_tokens_of_both_end(ranges, student, teacher):
    last = max(end for _, end in ranges)
    found = coinciding_spans(batch_of(ranges, list(range(last)), [1, 2, 9]), END)
    assert found.student.tolist() == student
    assert found.teacher.tolist() == teacher


def test_a_span_that_may_be_cut_is_left_out():
    whole = coinciding_spans(batch_of([[0, 1], [1, 2], [2, 3]], [1, 2, 3], [1, 2, 9]), END)
    cut = coinciding_spans(batch_of([[0, 1], [1, 2], [2, 3]], [1, 2, 3], [1, 2, 3]), END)
    assert (whole.student.tolist(), cut.student.tolist()) == ([[0], [1]], [[0]])
    broken = coinciding_spans(batch_of([[0, 1], [1, 2], [0, 0], [1, 2], [2, 3]], [1, 2, 3], [1, 2, 3, 4, 9]), END)
    assert broken.student.tolist() == [[3]]  # the second and the fourth token are parts of one of the teacher's
    long = [[0, 1], *([[1, 2]] * 9), [2, 3]]
    assert coinciding_spans(batch_of(long, [1, 2, 3], [1] * 10 + [9]), END).student.tolist() == [[9]]


@pytest.fixture(scope="module")
def data():
    student, teacher = byte_level(), sentence_pieces()
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    return list(encode(rows, student, 64, teacher_tokenizer=teacher)), shared_tokens(student, teacher)


def heads():
    torch.manual_seed(4)
    embed = nn.Embedding(400, 6), nn.Embedding(400, 5)
    return embed, (nn.Linear(6, 400, bias=False), nn.Linear(5, 310, bias=False))


def run(batch, shared, beta=0.0, weight=1.0):
    """Total, sum and the gradient of the student's head on a batch, whose models see the current token alone."""
    embed, (head, teacher_head) = heads()
    states = embed[1](batch["teacher_input_ids"]).detach()
    targets = batch["input_ids"].flatten()[batch["next_index"] + 1]
    terms = SpanDivergence(
        weight, batch, batch["next_index"], targets, TeacherLogits(states, teacher_head), shared, 400, 1.5, beta
    )
    total, sums = terms(head, list(head.parameters()), embed[0](batch["input_ids"]))
    total.backward()
    return total, sums["kd"], head.weight.grad


@pytest.mark.parametrize("beta", BETAS)
def test_padded_packed_and_halved_batches_add_up_to_the_same(data, beta):
    examples, shared = data
    total, found, gradient = run(DistillationCollator()(examples), shared, beta)
    assert found > 0
    assert total.item() == pytest.approx(found.item())
    row = pack_step([JoiningCollator()(examples)], 1000)[0]
    for parts in ([row], halve(row), halve(DistillationCollator()(examples))):
        several = [run(part, shared, beta) for part in parts]
        assert sum(own[1].item() for own in several) == pytest.approx(found.item(), rel=1e-4)
        torch.testing.assert_close(sum(own[2] for own in several), gradient, atol=1e-5, rtol=1e-3)


def test_a_batch_is_the_sum_over_its_spans(data):
    """Against loops over the ranges of each example."""
    examples, shared = data
    embed, (head, teacher_head) = heads()
    expected = 0.0
    for example in examples:
        tokens, others, ranges = (example[name] for name in ("input_ids", "teacher_input_ids", "teacher_ranges"))
        place = 0
        while place < len(tokens):
            (start, end), size = ranges[place], 1
            while place + size < len(tokens) and ranges[place + size][0] < end:
                end, size = max(end, ranges[place + size][1]), size + 1
            if end > start > 0 and place > 0:
                sides = []
                for embedding, to_logits, read, first, count in (
                    (embed[0], head, tokens, place, size), (embed[1], teacher_head, others, start, end - start),
                ):  # fmt: skip
                    before = embedding(torch.tensor(read[first - 1 : first - 1 + count]))
                    sides.append(slow_span(to_logits(before), read[first : first + count], 1.5))
                expected += size * slow_divergence(*sides, shared, 1.5, 0.0)
            place += size
    found = run(DistillationCollator()(examples), shared)[1]
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_only_counted_tokens_count_and_the_weight_is_in_the_total(data):
    examples, shared = data
    batch = DistillationCollator()(examples)
    total, found, _ = run(batch, shared, weight=3.0)
    assert total.item() == pytest.approx(3 * found.item())
    none = {**batch, "input_ids": batch["input_ids"]}
    embed, (head, teacher_head) = heads()
    states = embed[1](batch["teacher_input_ids"]).detach()
    ignored = torch.full_like(batch["next_index"], -100)
    terms = SpanDivergence(1.0, none, batch["next_index"], ignored, TeacherLogits(states, teacher_head), shared, 400)
    total, sums = terms(head, list(head.parameters()), embed[0](batch["input_ids"]))
    total.backward()
    assert sums["kd"] == 0
    assert not head.weight.grad.any()


def test_nobody_guesses_which_tokens_are_shared(data):
    batch = DistillationCollator()(data[0])
    with pytest.raises(ValueError, match="give KavaTrainer the tokenizers, as processing_class and teacher_tokenizer"):
        SpanDivergence(
            1.0, batch, batch["next_index"], batch["next_index"], TeacherLogits(torch.zeros(1), None), None, 400
        )


def test_chunks_are_as_small_as_the_larger_vocabulary_asks(data, monkeypatch):
    examples, shared = data
    widths = []

    def noting(function, rows, weights, parameters, width):
        widths.append(width)
        return sum_in_chunks(function, rows, weights, parameters, width)

    monkeypatch.setattr(divergence, "sum_in_chunks", noting)
    batch = DistillationCollator()(examples)
    run(batch, shared)
    wider = shared._replace(teacher_rest=torch.cat([shared.teacher_rest, torch.arange(310, 20_000)]))
    embed, (head, _) = heads()
    teacher_head = nn.Linear(5, 20_000, bias=False)
    states, targets = (
        embed[1](batch["teacher_input_ids"]).detach(),
        batch["input_ids"].flatten()[batch["next_index"] + 1],
    )
    terms = SpanDivergence(1.0, batch, batch["next_index"], targets, TeacherLogits(states, teacher_head), wider, 400)
    terms(head, list(head.parameters()), embed[0](batch["input_ids"]))
    places = widths[0] // 400
    assert widths == [400 * places, len(wider.teacher) * places + len(wider.teacher_rest) * places]
