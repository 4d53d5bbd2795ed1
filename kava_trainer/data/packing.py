"""Packed rows: which examples of an optimizer step stand in one row, and how rows are dealt out, split and halved."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch

from .formats import ASKED
from .token_alignment.batching import LENGTHS, TeacherPart, cut, packed, taken_apart
from .token_alignment.ranges import renamed, seen_by, teachers_with_states


def pack_step(batches: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Make packed rows of all examples of one optimizer step.

    Args:
        batches: of `JoiningCollator`.
        budget: tokens of one row; a longer example gets a row of its own.

    Returns:
        Rows with `input_ids` and `attention_mask` [1, T], `packed_lengths`, `answer_index`, `next_tokens`,
        `next_index`, and `teacher_states` [1, T, d_t] by layer and `origins` [1, T] where the batches have them; where
        the teacher reads other tokens, also what `batching.packed` gives of these.
    """
    examples = [example for batch in batches for example in _examples(batch)]
    packs = plan_packs([len(example.input_ids) for example in examples], budget)
    return [_row([examples[i] for i in pack]) for pack in packs]


def as_many_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same examples in `count` packed rows or more, no more than there are examples: the longest are halved."""
    rows = list(rows)
    while len(rows) < count:
        _, place = max((row["input_ids"].numel(), i) for i, row in enumerate(rows) if len(row["packed_lengths"]) > 1)
        rows[place : place + 1] = cast(list[dict[str, Any]], halve(rows[place]))
    return rows


def spread(rows: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Deal rows out to `count` micro-batches, in order: Trainer counts these to know when a step ends.

    The last one always has exactly one row where there are several micro-batches; the first ones may stay empty.
    """
    if len(rows) <= count:
        return [[] for _ in range(count - len(rows))] + [[row] for row in rows]
    extra = len(rows) - count
    return [rows[: extra + 1], *([row] for row in rows[extra + 1 :])]


def halve(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Two halves of a row of `pack_step` or a batch of `DistillationCollator`; None where it has only one example."""
    lengths, (count, width) = row.get("packed_lengths"), row["input_ids"].shape
    examples = count if lengths is None else len(lengths)
    if examples == 1:
        return None
    half = examples // 2
    middle, axis = (half, 0) if lengths is None else (sum(lengths[:half]), 1)
    end = (count, width)[axis]
    parts = [_span(row, axis, 0, middle), _span(row, axis, middle, end)]
    parts[0] |= cut(row, axis, (0, middle), (0, half))
    parts[1] |= cut(row, axis, (middle, end), (half, examples))
    if lengths is not None:
        parts[0]["packed_lengths"], parts[1]["packed_lengths"] = lengths[:half], lengths[half:]
    return parts


def plan_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute examples over packs of at most `budget` tokens: the longest first, each where it fits best.

    Best-fit decreasing (Johnson 1974) needs at most 11/9 of the smallest possible number of packs, plus one.

    Args:
        lengths: tokens of each example.
        budget: tokens of one pack; a longer example gets a pack of its own.

    Returns:
        Indices into `lengths`, ascending within each pack; the fullest packs first.
    """
    packs: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [pack for pack in range(len(packs)) if used[pack] + lengths[index] <= budget]
        if not fitting:
            packs.append([])
            used.append(0)
            fitting = [len(packs) - 1]
        best = max(fitting, key=lambda pack: used[pack])
        packs[best].append(index)
        used[best] += lengths[index]
    order = sorted(range(len(packs)), key=lambda pack: (-used[pack], packs[pack]))
    return [sorted(packs[pack]) for pack in order]


def followed_positions(length: int, origins: torch.Tensor | None) -> torch.Tensor:
    """The positions of an example of so many tokens that are followed by one from which something may be learned.

    Args:
        length: its tokens.
        origins: whose each of them is [length]; all are of the data by default.
    """
    positions = torch.arange(length - 1)
    return positions if origins is None else positions[origins[1:] != ASKED]


@dataclass(frozen=True)
class _Example:
    input_ids: torch.Tensor
    answer_index: torch.Tensor
    next_tokens: torch.Tensor
    teacher_states: dict[int, dict[int, torch.Tensor]]
    """By the number of the teacher and the layer."""
    origins: torch.Tensor | None
    teachers: dict[int, TeacherPart]


def _examples(batch: dict[str, Any]) -> list[_Example]:
    """The examples that a batch of `JoiningCollator` holds end to end."""
    tokens = batch["input_ids"].split(batch["lengths"])
    index, following = (batch[name].split(batch["answers"]) for name in ("answer_index", "next_tokens"))
    states = {number: _states(seen_by(batch, number)) for number in teachers_with_states(batch)}
    origins = batch["origins"].split(batch["lengths"]) if "origins" in batch else [None] * len(tokens)
    teachers = taken_apart(batch)
    return [
        _Example(
            *parts,
            {number: {layer: part[i] for layer, part in own.items()} for number, own in states.items()},
            origins[i],
            {number: own[i] for number, own in teachers.items()},
        )
        for i, parts in enumerate(zip(tokens, index, following, strict=True))
    ]


def _states(batch: dict[str, Any]) -> dict[int, tuple[torch.Tensor, ...]]:
    """The states of the first teacher on each example, by layer."""
    read = batch.get(LENGTHS, batch["lengths"])
    return {layer: part.split(read) for layer, part in batch["teacher_states"].items()}


def _row(examples: list[_Example]) -> dict[str, Any]:
    input_ids = torch.cat([example.input_ids for example in examples]).unsqueeze(0)
    lengths = tuple(len(example.input_ids) for example in examples)
    starts = list(accumulate(lengths[:-1], initial=0))
    row = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "packed_lengths": lengths,
        "answer_index": torch.cat(
            [example.answer_index + start for example, start in zip(examples, starts, strict=True)]
        ),
        "next_tokens": torch.cat([example.next_tokens for example in examples]),
        "next_index": torch.cat(
            [
                followed_positions(len(example.input_ids), example.origins) + start
                for example, start in zip(examples, starts, strict=True)
            ]
        ),
    }
    origins = [example.origins for example in examples if example.origins is not None]
    if origins:
        row["origins"] = torch.cat(origins).unsqueeze(0)
    row |= packed({number: [example.teachers[number] for example in examples] for number in examples[0].teachers})
    for number, like in examples[0].teacher_states.items():
        joined = {layer: torch.cat([own.teacher_states[number][layer] for own in examples]) for layer in like}
        row |= renamed({"teacher_states": {layer: part.unsqueeze(0) for layer, part in joined.items()}}, number)
    return row


def _span(row: dict[str, Any], axis: int, start: int, stop: int) -> dict[str, Any]:
    """The part of a row or batch from `start` to `stop` along the axis of tokens (1) or of examples (0)."""
    width = row["input_ids"].shape[1] if axis == 0 else 1
    first, last = start * width, stop * width
    kept = (row["answer_index"] >= first) & (row["answer_index"] < last)
    followed = row["next_index"]
    part = {
        "answer_index": row["answer_index"][kept] - first,
        "next_tokens": row["next_tokens"][kept],
        "next_index": followed[(followed >= first) & (followed < last)] - first,
    }
    for name in ("input_ids", "attention_mask", "labels", "origins"):
        if name in row:
            part[name] = row[name].narrow(axis, start, stop - start)
    return part
