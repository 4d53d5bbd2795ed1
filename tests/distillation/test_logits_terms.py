from functools import partial

import pytest
import torch

from kava_trainer.distillation import logits_terms
from kava_trainer.distillation.chunked_loss import sum_in_chunks
from kava_trainer.distillation.logits_terms import LogitsTerms, TeacherLogits

STUDENT_WIDTH, TEACHER_WIDTH, TEMPERATURE = 6, 5, 2.0


def naive_sums(logits, teacher_logits, targets):
    kept, size = targets != -100, min(logits.shape[1], teacher_logits.shape[1])
    logs = logits[kept].log_softmax(-1)
    lm = -logs[range(len(logs)), targets[kept]].sum()
    p, q = ((side[kept, :size] / TEMPERATURE).softmax(-1) for side in (teacher_logits, logits))
    return {"lm": lm, "smoothing": -logs.mean(-1).sum() - lm, "kd": TEMPERATURE**2 * (p * (p.log() - q.log())).sum()}


@pytest.mark.parametrize("teacher_vocabulary", [7, 5, 9])
@pytest.mark.parametrize(
    "weights",
    [
        {"lm": 1.5},
        {"kd": 0.5},
        {"lm": 1.5, "kd": 0.5},
        {"lm": 0.0, "kd": 0.5},
        {"lm": 1.5, "smoothing": 0.3, "kd": 0.5},
    ],
)
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 7)])
def test_value_and_gradient_equal_the_naive_reference(shape, weights, teacher_vocabulary, monkeypatch):
    in_fours = partial(sum_in_chunks, chunk_bytes=4 * 7 * 4)
    monkeypatch.setattr(logits_terms, "sum_in_chunks", in_fours)
    torch.manual_seed(0)
    states = torch.randn(*shape, STUDENT_WIDTH, requires_grad=True)
    weight = torch.randn(7, STUDENT_WIDTH, requires_grad=True)
    teacher_states, teacher_weight = torch.randn(*shape, TEACHER_WIDTH), torch.randn(teacher_vocabulary, TEACHER_WIDTH)
    answers = torch.randperm(shape[0] * shape[1])[: max(1, shape[0] * shape[1] - 3)].sort().values
    targets = torch.randint(5, answers.shape)
    targets[3:4] = -100
    teacher = TeacherLogits(teacher_states, lambda own: own @ teacher_weight.T)
    kd = {"temperature": TEMPERATURE, "teachers": [teacher]} if "kd" in weights else {}
    terms = LogitsTerms(weights, answers, targets, 7, **kd)
    total, sums = terms(lambda own: own @ weight.T, [weight], states)
    rows, teacher_rows = states.flatten(0, 1)[answers], teacher_states.flatten(0, 1)[answers]
    expected = naive_sums(rows @ weight.T, teacher_rows @ teacher_weight.T, targets)
    reference = sum(own * expected[name] for name, own in weights.items())
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(sums, {name: expected[name].detach() for name in weights})
    found = torch.autograd.grad(total, (states, weight))
    for ours, naive in zip(found, torch.autograd.grad(reference, (states, weight)), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)


def test_a_batch_without_answers_gives_nothing_and_no_gradient():
    states, weight = torch.randn(2, 3, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    total, sums = LogitsTerms({"lm": 1.0}, nothing, nothing, 7)(lambda own: own @ weight.T, [weight], states)
    total.backward()
    assert total == sums["lm"] == 0
    assert not states.grad.any()
    assert not weight.grad.any()


def test_the_divergence_from_several_teachers_is_weighed_by_shares_that_sum_to_1():
    torch.manual_seed(0)
    states, weight = torch.randn(1, 6, 4), torch.randn(7, 4, requires_grad=True)
    heads = [torch.randn(7, 5) for _ in range(2)]
    inner = [torch.randn(1, 6, 5) for _ in range(2)]
    teachers = [
        TeacherLogits(own, partial(torch.nn.functional.linear, weight=head), share)
        for own, head, share in zip(inner, heads, (0.25, 0.75), strict=True)
    ]
    places, targets = torch.arange(5), torch.arange(5)

    def run(given, routing=None):
        names = {"kd": 1.0} if routing is None else {"kd": 1.0, "kd_routing_entropy": 0.0}
        terms = LogitsTerms(names, places, targets, 7, 1.0, 0.0, given, routing)
        total, sums = terms(partial(torch.nn.functional.linear, weight=weight), [weight], states)
        (gradient,) = torch.autograd.grad(total, weight)
        return total, gradient, sums

    alone = [run([own._replace(share=1.0)]) for own in teachers]
    total, gradient, _ = run(teachers)
    torch.testing.assert_close(total, 0.25 * alone[0][0] + 0.75 * alone[1][0])
    torch.testing.assert_close(gradient, 0.25 * alone[0][1] + 0.75 * alone[1][1])

    # The naive reference of the router: the overlap of both distributions, token by token.
    student = (states[0, :5] @ weight.T).softmax(-1)
    others = [(own[0, :5] @ head.T).softmax(-1) for own, head in zip(inner, heads, strict=True)]
    overlap = torch.stack([torch.minimum(student, own).sum(-1) for own in others])
    shares = (torch.tensor([0.25, 0.75]).log().unsqueeze(1) + overlap / 0.1).softmax(0).detach()
    divergences = torch.stack([(own * (own / student).log()).sum(-1) for own in others])
    expected = (shares * divergences).sum()
    total, gradient, sums = run(teachers, 0.1)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])
    torch.testing.assert_close(sums["kd_routing_entropy"], -(shares * shares.log()).sum())
