"""Which teacher a token learns from."""

import math

import pytest
import torch

from kava_trainer.distillation.teachers.routing import routing_entropy, teacher_shares


def test_fixed_weights_are_shares_where_a_teacher_has_something_to_teach():
    masks = torch.tensor([[True, True, False, False], [True, False, True, False]])
    shares = teacher_shares([1.0, 3.0], None, 1.0, list(masks))
    torch.testing.assert_close(shares, torch.tensor([[0.25, 1.0, 0.0, 0.0], [0.75, 0.0, 1.0, 0.0]]))


def test_a_token_goes_to_the_teacher_that_it_agrees_with():
    agreements = [torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.1])]
    shares = teacher_shares([1.0, 3.0], agreements, 0.1)
    first = math.exp(0.9 / 0.1) / (math.exp(0.9 / 0.1) + 3 * math.exp(0.1 / 0.1))
    assert shares[0].tolist() == pytest.approx([first, 0.25])
    assert shares.sum(dim=0).tolist() == pytest.approx([1.0, 1.0])


def test_the_router_has_no_gradient():
    agreement = torch.zeros(2, requires_grad=True)
    assert not teacher_shares([1.0, 1.0], [agreement, agreement], 0.1).requires_grad


def test_the_entropy_is_0_for_one_teacher_and_log_2_for_two_alike():
    shares = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    assert routing_entropy(shares).tolist() == pytest.approx([0.0, math.log(2)])


def test_shares_need_a_shape():
    with pytest.raises(ValueError, match="agreements"):
        teacher_shares([1.0], None, 0.1)
