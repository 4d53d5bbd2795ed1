"""Where rows of a data set stand, in words that lead to them, and which of them have no answer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from .broken_files import lines_of_rows
from .files import matching_files

MOST_LOCATED = 5
"""So many rows are named where more have the same fault."""


def locate_rows(name: str, rows: Sequence[int]) -> str:
    """Where rows of a data set, rising numbers from 0, stand for people, such as `lines 3, 9 of my_data.jsonl`.

    At most `MOST_LOCATED` of them are named.
    """
    shown, more = rows[:MOST_LOCATED], ", ..." if len(rows) > MOST_LOCATED else ""
    path = Path(name).expanduser()
    files = [file for file in matching_files(path) if file.is_file()] if path.suffix == ".jsonl" else []
    lines = lines_of_rows(files, shown)
    if lines is None:
        return f"{_numbered('row', [row + 1 for row in shown])}{more} of {name}"
    *others, (file, numbers) = [(file, _numbered("line", numbers)) for file, numbers in lines]
    return "; ".join([*(f"{found} of {other}" for other, found in others), f"{numbers}{more} of {file}"])


def _numbered(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def source_rows(dataset: Dataset, rows: Sequence[int]) -> list[int]:
    """Where rows, in rising order, stood before the data set was split: numbers from 0, in rising order too."""
    indices = dataset._indices  # there is no public way to ask a mixed data set (read in datasets 5.2.0)
    return list(rows) if indices is None or not rows else sorted(indices.column(0).take(rows).to_pylist())


def empty_answers(encoded: Iterable[Mapping[str, Any]]) -> list[int]:
    """Which of some examples of `encode_row`, counted from 0, have an empty answer."""
    return [row for row, example in enumerate(encoded) if not (example["answered"] or example["answer_text"].strip())]


def empty_problem(name: str, which: str, rows: Sequence[int]) -> str:
    """The sentence for `which` examples, of these `source_rows` of a data set, that were dropped as unanswered."""
    count = f"1 {which} example has" if len(rows) == 1 else f"{len(rows)} {which} examples have"
    return f"{count} an empty answer: {locate_rows(name, rows)}."
