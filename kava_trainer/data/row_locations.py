"""Where rows of a data set stand, in words that lead to them, and which of them have no answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset

from .files import matching_files
from .readers import READERS
from .text_files import ending_of

MOST_LOCATED = 5
"""So many rows are named where more have the same fault."""


def locate_rows(name: str, rows: Sequence[int]) -> str:
    """Where rows of a data set, rising numbers from 0, stand for people, such as `lines 3, 9 of my_data.jsonl`.

    At most `MOST_LOCATED` of them are named.
    """
    shown, more = rows[:MOST_LOCATED], ", ..." if len(rows) > MOST_LOCATED else ""
    path = Path(name).expanduser()
    files = [] if path.is_dir() else [file for file in matching_files(path) if file.is_file()]
    lines = _lines_of_rows(files, shown)
    if lines is None:
        return f"{_numbered('row', [row + 1 for row in shown])}{more} of {name}"
    *others, (file, numbers) = [(file, _numbered("line", numbers)) for file, numbers in lines]
    return "; ".join([*(f"{found} of {other}" for other, found in others), f"{numbers}{more} of {file}"])


def _lines_of_rows(files: Iterable[Path], rows: Sequence[int]) -> list[tuple[Path, list[int]]] | None:
    """The lines, counted from 1, on which rows of some files laid end to end begin; None where a row is no line.

    The rows are counted from 0 and rising.
    """
    found: dict[Path, list[int]] = {}
    wanted, last = set(rows), max(rows, default=-1)
    for position, (file, line) in enumerate(islice(_row_lines(files), last + 1)):
        if line is None:
            return None
        if position in wanted:
            found.setdefault(file, []).append(line)
    return [*found.items()] if sum(map(len, found.values())) == len(wanted) else None


def _row_lines(files: Iterable[Path]) -> Iterator[tuple[Path, int | None]]:
    """The file and the line of each row; None in place of the line where the rows of a file are no lines."""
    for file in files:
        read = READERS.get(ending_of(file.name))
        if read is None:
            yield file, None
            return
        with fsspec.open(str(file), "rb", compression="infer") as opened:
            yield from ((file, line) for line, _ in read(opened))


def _numbered(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def source_rows(dataset: Dataset, rows: Sequence[int]) -> list[int]:
    """Where rows, in rising order, stood before the data set was split: numbers from 0, in rising order too."""
    indices = dataset._indices  # there is no public way to ask a mixed data set (read in datasets 5.2.0)
    return list(rows) if indices is None or not rows else sorted(indices.column(0).take(rows).to_pylist())


def empty_answers(encoded: Iterable[Mapping[str, Any]]) -> list[int]:
    """Which of some examples of an `Encoder`, counted from 0, have an empty answer."""
    return [row for row, example in enumerate(encoded) if not (example["answered"] or example["answer_text"].strip())]


def empty_problem(name: str, which: str, rows: Sequence[int]) -> str:
    """The sentence for `which` examples, of these `source_rows` of a data set, that were dropped as unanswered."""
    count = f"1 {which} example has" if len(rows) == 1 else f"{len(rows)} {which} examples have"
    return f"{count} an empty answer: {locate_rows(name, rows)}."
