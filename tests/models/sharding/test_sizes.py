"""What is whole on a rank, counted by hand."""

import pytest
import torch
from helpers.models import LORA, STUDENT_SIZE, tiny_llama, tiny_lora_llama
from torch import nn

from kava_trainer.models.sharding.sizes import gather_in, gathered_bytes

BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
"""Weights of a block: queries and output, keys and values, the three of the MLP, and two norms."""

ENDS = 512 * 32 + 32
"""Embeddings, which are the head too, and the last norm."""

TARGET = 32 * 64 + 64

ADAPTERS = LORA["lora_r"] * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
"""Weights of the adapters of a block."""


@pytest.mark.parametrize(
    ("computes_in", "expected"),
    [
        (None, 4 * 2 * (ENDS + TARGET) + 4 * (2 * BLOCK + 2 * BLOCK)),
        (torch.bfloat16, 4 * 2 * (ENDS + TARGET) + 2 * 2 * BLOCK + (2 + 4) * BLOCK),
    ],
)
def test_a_whole_student_is_gathered_with_its_gradients(computes_in, expected):
    assert gathered_bytes(tiny_llama(STUDENT_SIZE, 3), nn.Linear(32, 64), computes_in) == expected


def test_of_a_student_with_adapters_their_gradients_alone_are_gathered():
    student, target = tiny_lora_llama(STUDENT_SIZE, 3, lora_target_modules="all-linear"), nn.Linear(32, 64)
    ends = 4 * (ENDS + 2 * TARGET)
    assert gathered_bytes(student, target, None) == ends + 4 * 2 * (BLOCK + ADAPTERS) + 4 * 2 * ADAPTERS
    low = 2 * 2 * (BLOCK + ADAPTERS) + (2 + 4) * ADAPTERS
    assert gathered_bytes(student, target, torch.bfloat16) == ends + low


def test_the_embeddings_count_once_where_they_are_the_head_and_twice_elsewhere():
    sizes = [gathered_bytes(tiny_llama(STUDENT_SIZE, 2, tie=tie), nn.Identity(), None) for tie in (True, False)]
    assert sizes[1] - sizes[0] == 4 * 2 * 512 * 32


def test_blocks_alone_take_the_type_that_they_are_gathered_in():
    student = tiny_lora_llama(STUDENT_SIZE, 2)
    gather_in(student, torch.bfloat16)
    kinds = {("layers" in name, weight.dtype) for name, weight in student.named_parameters()}
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    assert {weight.requires_grad for name, weight in student.named_parameters() if "lora_" in name} == {True}
