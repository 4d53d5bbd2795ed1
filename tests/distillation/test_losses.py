import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kava_trainer.distillation.chunked_loss import sum_in_chunks
from kava_trainer.distillation.losses import (
    generalized_jsd_loss,
    generalized_jsd_per_token,
    mercator_loss,
    mse_per_token,
    next_token_sum,
    relative_mse_per_token,
    token_mean,
)


def naive_mercator(student, target, mask, alpha, beta):
    total, count = 0.0, 0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                s, g = student[b, t].float(), target[b, t].float()
                cosine = (s @ g) / (s.norm() * g.norm())
                total = total + alpha * (1 - cosine) + beta * (s.norm().log() - g.norm().log()) ** 2
                count += 1
    return total / count


def naive_cross_entropy(logits, targets):
    losses = [
        -logits[b, k].float().log_softmax(-1)[targets[b, k]]
        for b in range(targets.shape[0])
        for k in range(targets.shape[1])
        if targets[b, k] != -100
    ]
    return sum(losses) / len(losses)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def states(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 1, 8), (1, 1, 3), (4, 13, 17)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.01), (0.3, 2.0)])
def test_mercator_value_and_gradient_equal_the_naive_reference(shape, dtype, tolerance, alpha, beta):
    student, target = states(shape, dtype, 0), states(shape, dtype, 1)
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) < 0.7
    mask[0, 0] = True
    loss = mercator_loss(student, target, mask, alpha, beta)
    reference = naive_mercator(student, target, mask, alpha, beta)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for ours, naive in zip(gradients(loss, student, target), gradients(reference, student, target), strict=True):
        torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance)


def test_mercator_is_zero_at_equal_states_and_knows_direction_from_length():
    student = states((1, 3, 4), torch.float32, 0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert mercator_loss(student, student.detach(), mask).item() == pytest.approx(0, abs=1e-6)
    assert mercator_loss(student, -student.detach(), mask, beta=0.0).item() == pytest.approx(2, abs=1e-6)
    scaled = mercator_loss(student, math.e * student.detach(), mask, alpha=1.0, beta=0.5)
    assert scaled.item() == pytest.approx(0.5, abs=1e-6)


def test_a_zero_state_gives_a_finite_loss_and_gradient():
    student = torch.zeros(1, 2, 4, requires_grad=True)
    loss = mercator_loss(student, torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_masked_garbage_changes_neither_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    results = []
    for filler in (0.0, garbage):
        student, target = states((2, 3, 4), torch.float32, 0), states((2, 3, 4), torch.float32, 1)
        with torch.no_grad():
            student[~mask], target[~mask] = filler, filler
        loss = mercator_loss(student, target, mask)
        loss.backward()
        results.append((loss, student.grad, target.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[1][1][~mask] == 0).all()


def test_all_masked_gives_zero_loss_and_zero_gradient():
    student = states((2, 3, 4), torch.float32, 0)
    loss = mercator_loss(student, states((2, 3, 4), torch.float32, 1), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_micro_batches_with_num_items_add_up_to_the_mean_over_tokens():
    student, target = states((4, 5, 6), torch.float32, 0), states((4, 5, 6), torch.float32, 1)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    whole = mercator_loss(student, target, mask)
    parts = [
        mercator_loss(student[i : i + 1], target[i : i + 1], mask[i : i + 1], num_items=mask.sum()) for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_next_tokens_equals_the_naive_reference(dtype):
    logits = states((10, 11), dtype, 0)
    targets = torch.tensor([3, -100, 7, 0, -100, -100, -100, -100, 10, 1])
    total, reference = next_token_sum(logits, targets), 5 * naive_cross_entropy(logits[None], targets[None])
    torch.testing.assert_close(total, reference, rtol=1e-5, atol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    ours, naive = (gradients(value, logits)[0] for value in (total, reference))
    torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance)


def test_without_next_tokens_the_sum_is_zero():
    logits = states((2, 5), torch.float32, 0)
    total = next_token_sum(logits, torch.full((2,), -100))
    total.backward()
    assert total.item() == 0
    assert (logits.grad == 0).all()


def test_token_mean_ignores_masked_values():
    values = torch.tensor([[1.0, float("nan")], [3.0, 5.0]])
    assert token_mean(values, torch.tensor([[True, False], [True, True]])).item() == 3


def test_mse_is_the_mean_over_the_width_and_ignores_what_is_masked():
    student, target = states((2, 3, 5), torch.float32, 0), states((2, 3, 5), torch.float32, 1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with torch.no_grad():
        target[0, 2] = float("nan")
    per_token = mse_per_token(student, target, mask)
    for b, t in [(0, 0), (0, 1), (1, 0)]:
        assert per_token[b, t].item() == pytest.approx(((student[b, t] - target[b, t]) ** 2).sum().item() / 5)
    assert per_token[~mask].abs().sum() == 0
    (gradient,) = gradients(per_token.sum(), student)
    torch.testing.assert_close(gradient[0, 0], 2 * (student[0, 0] - target[0, 0]).detach() / 5)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("inf")])
def test_the_relative_squared_error_equals_the_naive_reference_and_ignores_what_is_masked(dtype, tolerance, garbage):
    student, target = states((2, 3, 5), dtype, 0), states((2, 3, 5), dtype, 1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with torch.no_grad():
        student[~mask], target[~mask] = garbage, garbage
    per_token = relative_mse_per_token(student, target, mask)
    assert per_token.dtype == torch.float32
    pairs = [(student[b, t].float(), target[b, t].float()) for b, t in [(0, 0), (0, 1), (1, 0)]]
    naive = torch.stack([((s - g) @ (s - g)) / (g @ g) for s, g in pairs])
    torch.testing.assert_close(per_token[mask], naive)
    assert per_token[~mask].abs().sum() == 0
    for ours, other in zip(
        gradients(per_token.sum(), student, target), gradients(naive.sum(), student, target), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)
        assert (ours[~mask] == 0).all()


def test_the_relative_squared_error_has_no_scale_and_is_finite_at_a_target_of_zero():
    student, mask = states((1, 3, 4), torch.float32, 0), torch.ones(1, 3, dtype=torch.bool)
    target = student.detach() * 2
    torch.testing.assert_close(relative_mse_per_token(student, target, mask), torch.full((1, 3), 0.25))
    torch.testing.assert_close(relative_mse_per_token(1e-4 * student, 1e-4 * target, mask), torch.full((1, 3), 0.25))
    nothing = relative_mse_per_token(student, torch.zeros(1, 3, 4), mask)
    (gradient,) = gradients(nothing.sum(), student)
    assert nothing.isfinite().all()
    assert gradient.isfinite().all()


def naive_jsd(student, teacher, temperature, beta):
    q, p = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))
    if beta in (0, 1):
        left, right = (p, q) if beta == 0 else (q, p)
        return (left * (left / right).log()).sum(-1) * temperature**2
    m = beta * p + (1 - beta) * q
    mixed = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    return mixed * temperature**2


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_generalised_jsd_value_and_gradient_equal_the_naive_reference(beta, temperature):
    student, teacher = states((6, 11), torch.float32, 0), states((6, 11), torch.float32, 1).detach()
    ours = generalized_jsd_per_token(student, teacher, temperature, beta)
    reference = naive_jsd(student, teacher, temperature, beta)
    torch.testing.assert_close(ours, reference.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        *(gradients(x.sum(), student)[0] for x in (ours, reference)), rtol=1e-4, atol=1e-6, check_dtype=False
    )
    assert (ours > 0).all()
    same = generalized_jsd_per_token(teacher, teacher, temperature, beta)
    torch.testing.assert_close(same, torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_chunks_change_neither_value_nor_gradient(rows):
    hidden, head = states((7, 5), torch.float32, 0), torch.nn.Linear(5, 11)
    targets = torch.tensor([3, 1, -100, 7, 0, 2, 10])
    seen = []

    def chunk(hidden, targets):
        seen.append(len(hidden))
        logits = head(hidden)
        return torch.stack([next_token_sum(logits, targets), logits.square().sum()])

    parameters = (hidden, *head.parameters())
    weights = torch.tensor([1.0, 0.3])
    own = list(head.parameters())
    total, sums = sum_in_chunks(chunk, (hidden, targets), weights, own, vocabulary=11, chunk_bytes=4 * 11 * rows)
    assert seen == [len(part) for part in hidden.split(rows)]
    whole = chunk(hidden, targets)
    torch.testing.assert_close(sums, whole)
    torch.testing.assert_close(total, whole @ weights)
    assert not sums.requires_grad
    ours, reference = (torch.autograd.grad(0.7 * value, parameters) for value in (total, whole @ weights))
    torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        torch.testing.assert_close(sum_in_chunks(chunk, (hidden, targets), weights, own, 11, 44 * rows)[0], total)


def test_a_chunked_sum_can_be_differentiated_only_once_and_leaves_frozen_tensors_alone():
    hidden, head = states((7, 5), torch.float32, 0), torch.nn.Linear(5, 11)
    head.bias.requires_grad_(False)
    own = list(head.parameters())
    total, _ = sum_in_chunks(lambda rows: head(rows).square().sum().unsqueeze(0), (hidden,), torch.ones(1), own, 11)
    total.backward(retain_graph=True)
    assert head.bias.grad is None
    assert head.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="differentiated only once"):
        total.backward()


def test_a_profiler_that_watches_modules_can_count_a_chunked_sum():
    hidden, head = states((7, 5), torch.float32, 0), torch.nn.Linear(5, 11, bias=False)
    own = list(head.parameters())
    with FlopCounterMode(display=False) as counter:
        total, _ = sum_in_chunks(lambda rows: head(rows).sum().unsqueeze(0), (hidden,), torch.ones(1), own, 11)
        total.backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 5 * 11


def test_nothing_in_chunks_is_zero_and_has_a_gradient():
    hidden, head = states((0, 5), torch.float32, 0), torch.nn.Linear(5, 11)
    own = list(head.parameters())
    total, _ = sum_in_chunks(lambda rows: head(rows).sum().unsqueeze(0), (hidden,), torch.ones(1), own, 11)
    total.backward()
    assert total.item() == 0
    assert (head.weight.grad == 0).all()


def test_the_divergence_is_a_mean_over_the_tokens_that_count():
    student, teacher = states((2, 4, 11), torch.float32, 0), states((2, 4, 11), torch.float32, 1).detach()
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    loss = generalized_jsd_loss(student, teacher, mask, 2.0, 0.3, num_items=10)
    reference = naive_jsd(student[mask], teacher[mask], 2.0, 0.3).sum() / 10
    torch.testing.assert_close(loss, reference.float(), rtol=1e-4, atol=1e-6)
    ours, naive = (gradients(x, student)[0] for x in (loss, reference))
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_the_total_is_the_weighted_sum_of_the_terms_in_half_precision_too(dtype, grad):
    torch.manual_seed(0)
    states, head, targets = torch.randn(8000, 8), torch.nn.Linear(8, 1000), torch.randint(0, 1000, (8000,))

    def chunk(states, targets):
        return torch.stack([100 * next_token_sum(head(states), targets), next_token_sum(head(states), targets)])

    weights = torch.tensor([1.0, 0.5])
    with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
        total, sums = sum_in_chunks(chunk, (states, targets), weights, list(head.parameters()), 1000)
    assert sums.dtype == torch.float32
    assert sums[0] > 2 * torch.finfo(torch.float16).max
    assert total.item() == pytest.approx((sums[0] + 0.5 * sums[1]).item(), rel=1e-6)
