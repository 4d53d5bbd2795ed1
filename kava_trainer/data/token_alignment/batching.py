"""What the teacher reads of a batch, where its tokens are others than the student's: padded, packed, and cut."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from .ranges import PAIR_COLUMNS, RANGES, TEACHER_TOKENS, readers, renamed, seen_by, teachers_with_states

MASK, LENGTHS, PACKED_LENGTHS, WIDEST = (
    "teacher_attention_mask", "teacher_lengths", "teacher_packed_lengths", "teacher_widest",
)  # fmt: skip
"""Of a batch: which of the teacher's tokens are real, how many each example has, in a batch that is joined and in a
packed row, and the most tokens of a range."""


class TeacherPart(NamedTuple):
    """What the teacher reads of one example."""

    input_ids: torch.Tensor
    """[U]."""
    ranges: torch.Tensor
    """[T, 2], within these, or [T, 3] where the alignment is causal."""


Parts = dict[int, list[TeacherPart]]
"""What the teachers that read tokens of their own read of each example, by their numbers."""


def teacher_parts(examples: Sequence[Mapping[str, Any]], input_ids: Sequence[torch.Tensor]) -> Parts:
    """What the teachers read of each example; nothing of those that read what the student does.

    Args:
        examples: as a data set has them.
        input_ids: of the student [T], of those of them that are collated. Where one token stands for an example of no
            tokens, it does so for both.

    Raises:
        ValueError: if only some examples have such tokens, or not every token has a range of two or three numbers.
    """
    numbers = sorted({number for example in examples for number in readers(example)})
    return {number: _parts([seen_by(example, number) for example in examples], input_ids) for number in numbers}


def _parts(examples: Sequence[Mapping[str, Any]], input_ids: Sequence[torch.Tensor]) -> list[TeacherPart]:
    if not all(set(PAIR_COLUMNS) <= example.keys() for example in examples):
        raise ValueError(
            f"Some examples of a batch have {' and '.join(PAIR_COLUMNS)}, and others have not. Encode all of them with "
            "the same teacher_tokenizer."
        )
    filled = [example for example in examples if len(example["input_ids"])] or [{}]
    if len(filled) != len(input_ids):  # those of no tokens are kept
        filled = [example if len(example["input_ids"]) else {} for example in examples]
    parts = []
    for example, own in zip(filled, input_ids, strict=True):
        given = (example.get(name, nothing) for name, nothing in zip(PAIR_COLUMNS, ([0], [[0, 0]]), strict=True))
        ids, ranges = (torch.as_tensor(values, dtype=torch.long) for values in given)
        if ranges.shape not in ((len(own), 2), (len(own), 3)):
            raise ValueError(
                f"An example has {len(own)} input_ids and {RANGES} of shape {list(ranges.shape)}. Give every token a "
                "range of two or three numbers, without padding."
            )
        parts.append(TeacherPart(ids, ranges))
    return parts


def _of_one_width(ranges: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Ranges of several examples; where some have three numbers, as no example of no tokens has, all of them."""
    width = max(own.shape[1] for own in ranges)
    return [own if own.shape[1] == width else torch.cat([own, own[:, 1:]], dim=1) for own in ranges]


def widest(ranges: torch.Tensor) -> int:
    """The most tokens of some ranges [..., 2 or 3] whose states are compared; 0 where there are none."""
    return int((ranges[..., -1] - ranges[..., 0]).max()) if ranges.numel() else 0


def tokens_of(parts: Parts) -> dict[int, list[torch.Tensor]]:
    """The tokens of each example that each of these teachers reads [U]."""
    return {number: [part.input_ids for part in own] for number, own in parts.items()}


def padded(parts: Parts) -> dict[str, Any]:
    """Examples padded on the right: tokens and mask [B, U], and their ranges [B, T, 2 or 3]."""
    return _of_all({number: _padded(own) for number, own in parts.items()})


def joined(parts: Parts) -> dict[str, Any]:
    """Examples end to end, each with its own ranges, and how many tokens each has."""
    return _of_all({number: _joined(own) for number, own in parts.items()})


def packed(parts: Parts) -> dict[str, Any]:
    """A packed row: tokens and mask [1, U], the ranges [1, T, 2 or 3] in it, and the tokens of each example."""
    return _of_all({number: _packed(own) for number, own in parts.items()})


def taken_apart(batch: Mapping[str, Any]) -> Parts:
    """The examples that `joined` made one of; nothing of teachers that read what the student does."""
    return {number: _taken_apart(seen_by(batch, number)) for number in readers(batch)}


def cut(row: Mapping[str, Any], axis: int, tokens: tuple[int, int], examples: tuple[int, int]) -> dict[str, Any]:
    """What the teachers read of a part of a batch, with their states there where it holds them.

    Args:
        row: a packed row or a padded batch.
        axis: along which it is cut, of examples (0) or of tokens (1).
        tokens: from which place up to which along that axis, as the student reads it.
        examples: which of them these are.
    """
    with_states, own = teachers_with_states(row), readers(row)
    return _of_all({n: _cut(seen_by(row, n), axis, tokens, examples) for n in sorted({*with_states, *own})})


def _of_all(by_teacher: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What the teachers read, each under names of its own."""
    return {name: value for number, own in by_teacher.items() for name, value in renamed(own, number).items()}


def _padded(parts: Sequence[TeacherPart]) -> dict[str, Any]:
    ids, ranges = ([part[side] for part in parts] for side in (0, 1))
    return {
        TEACHER_TOKENS: pad_sequence(ids, batch_first=True),
        MASK: pad_sequence([torch.ones_like(own) for own in ids], batch_first=True),
        RANGES: pad_sequence(_of_one_width(ranges), batch_first=True),
        WIDEST: max(map(widest, ranges)),
    }


def _joined(parts: Sequence[TeacherPart]) -> dict[str, Any]:
    ids, ranges = ([part[side] for part in parts] for side in (0, 1))
    return {TEACHER_TOKENS: torch.cat(ids), RANGES: torch.cat(_of_one_width(ranges)), LENGTHS: list(map(len, ids))}


def _taken_apart(batch: Mapping[str, Any]) -> list[TeacherPart]:
    ids, ranges = batch[TEACHER_TOKENS].split(batch[LENGTHS]), batch[RANGES].split(batch["lengths"])
    return [TeacherPart(*own) for own in zip(ids, ranges, strict=True)]


def _packed(parts: Sequence[TeacherPart]) -> dict[str, Any]:
    lengths = tuple(len(part.input_ids) for part in parts)
    starts = accumulate(lengths[:-1], initial=0)
    ids = torch.cat([part.input_ids for part in parts]).unsqueeze(0)
    moved = [_moved(part.ranges, start) for part, start in zip(parts, starts, strict=True)]
    ranges = torch.cat(_of_one_width(moved))
    return {
        TEACHER_TOKENS: ids,
        MASK: torch.ones_like(ids),
        PACKED_LENGTHS: lengths,
        RANGES: ranges.unsqueeze(0),
        WIDEST: widest(ranges),
    }


def _moved(ranges: torch.Tensor, by: int) -> torch.Tensor:
    """The same ranges further on; those of nothing stay what they are."""
    return torch.where(ranges[..., 1:2] > ranges[..., :1], ranges + by, 0)


def _cut(row: Mapping[str, Any], axis: int, tokens: tuple[int, int], examples: tuple[int, int]) -> dict[str, Any]:
    states = row.get("teacher_states", {})
    if RANGES not in row:  # it reads what the student does
        return {"teacher_states": _narrowed(states, axis, *tokens)}
    ranges = row[RANGES].narrow(axis, tokens[0], tokens[1] - tokens[0])
    lengths = row.get(PACKED_LENGTHS)
    start, stop = examples if lengths is None else (sum(lengths[: examples[0]]), sum(lengths[: examples[1]]))
    part = {name: row[name].narrow(axis, start, stop - start) for name in (TEACHER_TOKENS, MASK)}
    part |= {RANGES: ranges if lengths is None else _moved(ranges, -start), WIDEST: row[WIDEST]}
    if lengths is not None:
        part[PACKED_LENGTHS] = lengths[slice(*examples)]
    if states:
        part["teacher_states"] = _narrowed(states, axis, start, stop)
    return part


def _narrowed(states: Mapping[Any, torch.Tensor], axis: int, start: int, stop: int) -> dict[Any, torch.Tensor]:
    return {layer: own.narrow(axis, start, stop - start) for layer, own in states.items()}
