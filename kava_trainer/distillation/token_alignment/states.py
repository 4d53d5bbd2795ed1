"""The teacher's states at the student's tokens, where the two read the same text in tokens of their own."""

from collections.abc import Mapping
from typing import Any

import torch

from ...data.formats import ASKED
from ...data.token_alignment.batching import MASK, PACKED_LENGTHS, WIDEST
from ...data.token_alignment.ranges import RANGES, TEACHER_TOKENS, readers, seen_by
from ...models.attention.capture import Feature
from ...models.teacher import TeacherSource
from ..teachers.several import SeveralTeachers

OWN_TOKENS = -1
"""In place of a layer: the last states of a teacher at its own tokens, where these are others."""


def read_states(teacher: TeacherSource, inputs: Mapping[str, Any], own: bool = False) -> dict[Feature, torch.Tensor]:
    """The teacher's states on a batch [B, T, d_t] by layer, at the tokens of the student.

    Where the teacher reads tokens of its own, a student token has the mean of the states whose text overlaps its text,
    of those alone that its range says are compared; zeros where there are none, which `is_compared` leaves out.

    Those of several teachers are by `capture.of_teacher`.

    Args:
        teacher: gives the states at its own tokens.
        inputs: a batch of `collators`.
        own: whether the last layer's states at the teacher's own tokens [B, U, d_t] are wanted too, as `OWN_TOKENS`.
    """
    if isinstance(teacher, SeveralTeachers):
        return teacher.gathered(inputs, lambda source, seen: read_states(source, seen, own))
    if RANGES not in inputs:
        return teacher.features(inputs)
    read = {"input_ids": inputs[TEACHER_TOKENS], "attention_mask": inputs[MASK]}
    if PACKED_LENGTHS in inputs:
        read["packed_lengths"] = inputs[PACKED_LENGTHS]
    if "teacher_states" in inputs:
        read["teacher_states"] = inputs["teacher_states"]
    states = teacher.features(read)
    found = {layer: pooled(state, inputs[RANGES], inputs[WIDEST]) for layer, state in states.items()}
    return found | ({OWN_TOKENS: states[teacher.num_layers]} if own else {})


def pooled(states: torch.Tensor, ranges: torch.Tensor, widest: int) -> torch.Tensor:
    """Means of states over ranges of tokens.

    Args:
        states: [B, U, d].
        ranges: from which of the U tokens up to which, its last number [B, T, 2 or 3]; zeros come of an empty one.
        widest: the most tokens of any range.

    Returns:
        [B, T, d], in the type of the states; that of one token is its state itself. The sum is in float32.
    """
    start = ranges[..., 0]
    count = ranges[..., -1] - start
    total = torch.zeros(*start.shape, states.shape[-1], dtype=torch.float32, device=states.device)
    for place in range(widest):  # one after the other: no sum depends on what else is in the batch
        inside = (place < count).unsqueeze(-1)
        index = (start + place).clamp(max=states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        total += torch.where(inside, states.gather(1, index).float(), 0.0)
    return (total / count.clamp(min=1).unsqueeze(-1)).to(states.dtype)


def is_compared(inputs: Mapping[str, Any], mask: torch.Tensor, teachers: int = 1) -> torch.Tensor:
    """Where states are compared [B, T], of the tokens of `mask`, with any of so many teachers.

    Of an answer that the student wrote that is the answer alone, and of a teacher's other tokens what ranges compare.
    """
    found = compared_with_each(inputs, mask, teachers)
    return found.any(dim=0) if found.ndim == 3 else found


def compared_with_each(inputs: Mapping[str, Any], mask: torch.Tensor, teachers: int = 1) -> torch.Tensor:
    """Where states are compared with each of so many teachers [K, B, T]; [B, T] where that is the same for all."""
    if "origins" in inputs:
        mask = mask & (inputs["origins"] != ASKED)
    if not any(number < teachers for number in readers(inputs)):
        return mask
    found = [_overlaps(seen_by(inputs, number), mask) for number in range(teachers)]
    return torch.stack(found) if teachers > 1 else found[0]


def _overlaps(inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
    if RANGES not in inputs:
        return mask
    return mask & (inputs[RANGES][..., -1] > inputs[RANGES][..., 0])


def compared_items(inputs: Mapping[str, Any], num_items: torch.Tensor | None) -> torch.Tensor | None:
    """In how many places the states of an optimizer step are compared, of the counts of `LossTerms.loss`."""
    if num_items is None:
        return None
    return num_items[3] if "origins" in inputs or readers(inputs) else num_items[0]
