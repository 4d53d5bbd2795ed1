"""Where a data file is broken: line numbers as a text editor counts them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from ..utils.files import json_fault, json_problem


def _line_problem(line: bytes) -> str | None:
    """What is wrong with one line of a jsonl file; None for an object and for an empty line."""
    fault = json_fault(lambda: line.decode("utf-8").rstrip("\r\n"), dict) if line.strip() else None
    return fault and fault[1]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and lines of a file, without the mark that some editors begin UTF-8 with."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def broken_line(path: Path) -> str | None:
    """The first line of a jsonl file that holds no JSON object, by its number from 1 and with the reason; else None."""
    problems = ((number, _line_problem(line)) for number, line in _lines(path))
    return next((f"line {number} {problem}" for number, problem in problems if problem), None)


def skipped_line(path: Path, checked: int | None = None) -> str | None:
    """The first line of a jsonl file that a reader takes without a word and cannot use; else None.

    Such are lines of JSON that hold no object, and bytes that are no text. It does not parse the lines, which takes
    long, and says nothing of a file whose first object is spread over several.
    """
    filled = ((number, line) for number, line in islice(_lines(path), checked) if line.strip())
    first = next(filled, (0, b""))
    if _line_problem(first[1]) is not None:
        return None
    for number, line in chain([first], filled):
        if (not line.lstrip().startswith(b"{") or not _is_text(line)) and (problem := _line_problem(line)):
            return f"line {number} {problem}"
    return None


def lines_of_rows(files: Iterable[Path], rows: Sequence[int]) -> list[tuple[Path, list[int]]] | None:
    """The lines, counted from 1, that hold rows of some jsonl files laid end to end; None where a row is no line.

    The rows are counted from 0 and rising; empty lines are no rows.
    """
    wanted, found = iter(rows), []
    row, position = next(wanted, None), 0
    for file in files:
        lines = []
        for number, line in _lines(file) if row is not None else ():
            if not line.strip():
                continue
            if position == row:
                if _line_problem(line) is not None:  # an object is spread over several lines
                    return None
                lines.append(number)
                row = next(wanted, None)
            position += 1
        found += [(file, lines)] if lines else []
    return found if row is None else None


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def data_problem(path: Path) -> str | None:
    """Where and how a `.jsonl` or `.json` file that could not be read is broken: a list, or an object a line.

    None where the reader's own words must do, as for any other file.
    """
    if path.suffix == ".jsonl":
        return broken_line(path)
    if path.suffix != ".json":
        return None
    with path.open("rb") as file:
        is_list = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return json_problem(path, list) if is_list else broken_line(path)
