"""Which tokens of one model overlap each token of another, by the text that they stand for."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset

from .spans import Span

OF_TEACHER = "teacher_"
"""Before the name of what the teacher reads of an example."""

TEACHER_TOKENS, RANGES = PAIR_COLUMNS = (f"{OF_TEACHER}input_ids", f"{OF_TEACHER}ranges")
"""Columns of an example: what the teacher reads, and of which of these tokens each of the student's is made.

A range says from which token up to which, and may have a third number: up to which of them states are compared.
"""

_OF_ANY = re.compile("teacher[0-9]*_")


def of_teacher(number: int) -> str:
    """What stands before the names of what a teacher reads, by its number from 0: that of the first has none."""
    return OF_TEACHER if number == 0 else f"teacher{number + 1}_"


def seen_by(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A batch or an example, with what one of several teachers reads of it where that of the first one stands."""
    prefix = of_teacher(number)
    own = {OF_TEACHER + name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
    return {name: value for name, value in batch.items() if not _OF_ANY.match(name)} | own


def renamed(part: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a teacher reads, under the names that it has beside what the others read."""
    prefix = of_teacher(number)
    return {
        prefix + name.removeprefix(OF_TEACHER) if name.startswith(OF_TEACHER) else name: value
        for name, value in part.items()
    }


def is_pair_column(name: str) -> bool:
    """Whether a column is one of `PAIR_COLUMNS`, of any teacher."""
    return re.fullmatch("teacher[0-9]*_(input_ids|ranges)", name) is not None


def readers(batch: Mapping[str, Any]) -> list[int]:
    """The numbers of the teachers that read tokens of their own of a batch or an example."""
    return _numbers(batch, "ranges")


def teachers_with_states(batch: Mapping[str, Any]) -> list[int]:
    """The numbers of the teachers whose states a batch or an example brings along."""
    return _numbers(batch, "states")


def _numbers(batch: Mapping[str, Any], name: str) -> list[int]:
    found = (re.fullmatch(f"teacher([0-9]*)_{name}", own) for own in batch)
    return sorted(int(own[1] or 1) - 1 for own in found if own)


NONE = (0, 0)
"""The range of a token whose text no token of the other model stands for."""

ONE_TO_ONE, MERGED, LEFT_OUT = KINDS = ("one_to_one", "merged", "left_out")
"""How a token is aligned: with one that is its alone, with several or with one that others share, or not at all."""


def overlapping(student: Sequence[Span], teacher: Sequence[Span], causal: bool = False) -> list[tuple[int, ...]]:
    """Of each student token the teacher tokens whose text overlaps its text: from which up to which.

    Args:
        student: from which byte up to which each of its tokens goes, in a text that both read.
        teacher: likewise; those that stand for any text are in order.
        causal: also up to which of them end where the student's token ends, or before: their states know no text
            that the student has not read.

    Returns:
        Zeros where there is none, as for a token that stands for no text.
    """
    filled = [index for index, (start, end) in enumerate(teacher) if start < end]
    starts, ends = ([teacher[index][side] for index in filled] for side in (0, 1))
    found: list[tuple[int, ...]] = []
    for start, end in student:
        first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
        if start >= end or first > last:
            found.append((*NONE, 0) if causal else NONE)
            continue
        whole = (filled[first], filled[last] + 1)
        finished = bisect_right(ends, end) - 1
        found.append((*whole, filled[finished] + 1 if first <= finished else whole[0]) if causal else whole)
    return found


def compared_from_to(span: Sequence[int]) -> Span:
    """From which of the teacher's tokens up to which the states of a range are compared."""
    return span[0], span[-1]


def count_kinds(ranges: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens are aligned one to one, merged and left out, in the order of `KINDS`."""
    compared = [compared_from_to(own) for own in ranges]
    changes = [0] * (max((end for _, end in compared), default=0) + 1)
    for start, end in compared:
        changes[start] += 1
        changes[end] -= 1
    uses = list(accumulate(changes))
    left = sum(start == end for start, end in compared)
    single = sum(end - start == 1 and uses[start] == 1 for start, end in compared)
    return [single, len(ranges) - left - single, left]


def add_counts(counts: Iterable[Sequence[int]]) -> list[int]:
    """The sums of what `count_kinds` gave of several texts."""
    return [sum(own) for own in zip(*counts, strict=True)] or [0, 0, 0]


def aligned_tokens(examples: Sequence[Mapping[str, Any]]) -> int:
    """How many tokens of some examples have states of a teacher to be compared with; of several, of each at least."""
    counts = [0] * (1 + max((number for example in examples for number in readers(example)), default=0))
    for example in examples:
        for number in range(len(counts)):
            ranges = example.get(f"{of_teacher(number)}ranges") or ()
            left_out = sum(start == end for start, end in map(compared_from_to, ranges))
            counts[number] += len(example["input_ids"]) - left_out
    return min(counts)


def as_the_teacher_reads(examples: Dataset) -> Dataset:
    """Examples of `encode_dataset` in the first teacher's tokens; as they are, where these are the student's."""
    columns = examples.column_names
    names = {name: name.removeprefix(OF_TEACHER) for name in columns if name.startswith(OF_TEACHER) and name != RANGES}
    beside = [name for name in columns if _OF_ANY.match(name) and name not in names]
    beside += [name for name in names.values() if name in columns]
    return examples.remove_columns(beside).rename_columns(names)


def read_by_the_teacher(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of a list of examples."""
    columns = {f"{OF_TEACHER}{name}": name for name in ("input_ids", "labels", "prompt_length")}
    return [
        {
            **{name: own for name, own in example.items() if not _OF_ANY.match(name)},
            **{name: example[column] for column, name in columns.items() if column in example},
        }
        for example in examples
    ]
