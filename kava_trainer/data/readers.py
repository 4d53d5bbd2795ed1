"""The rows of a file of JSON or of delimited text, each cell as it stands there, and where such a file is broken."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, islice
from typing import IO, Any

from ..utils.files import json_fault, json_kind
from .formats import READ_COLUMNS

Row = tuple[int | None, dict[str, str | None]]
"""The line on which a row begins, counted from 1, or None where a row is no line; and its cells, see `store`."""

STRUCTURE = "\0"
"""Begins a stored cell that is JSON: a list, an object, or a text that begins with this character itself."""

_CHUNK = 2**20
_WIDE_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_LARGEST_CELL = 2**31 - 1


class BrokenFile(Exception):
    """A file that cannot be read."""

    def __init__(self, problem: str, remedy: str | None = "Mend the file.") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy
        self.file: str | None = None
        """Its path, once that is known."""


_AS_JSON = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each value


def store(value: Any) -> str:
    """A text, or the JSON of a list or an object, as one text that `restore` tells apart."""
    if isinstance(value, str) and not value.startswith(STRUCTURE):
        return value
    return STRUCTURE + _AS_JSON(value)


def restore(cell: str) -> Any:
    """Undo `store`."""
    return json.loads(cell[1:]) if cell.startswith(STRUCTURE) else cell


def json_rows(file: IO[bytes], of_lines: bool) -> Iterator[Row]:
    """The rows of JSON: an object a line, a list, objects over several lines, or one object around them.

    A number or a truth value is the text that stands in the file; null is an empty cell.

    Args:
        file: open for reading.
        of_lines: whether a single object can be nothing but a row.

    Raises:
        BrokenFile: with the line where it is broken.
    """
    lines = ((number, line) for number, line in _lines(file) if line.strip())
    head = [*islice(lines, 2)]
    if head and _line_problem(head[0][1]) is None and (of_lines or len(head) > 1):
        for number, line in chain(head, lines):
            yield number, _line_cells(number, line)
    elif head:
        yield from _whole_rows(_joined(chain(head, lines)), head[0] if of_lines else None)


def csv_rows(file: IO[bytes], delimiter: str) -> Iterator[Row]:
    """The rows under a header; every cell is text, and an empty or a missing one is None.

    Args:
        file: open for reading.
        delimiter: between two cells; where the header has none, the first of `,` `;` tab `|` that it has.

    Raises:
        BrokenFile: with the line where it is broken.
    """
    lines = (line + "\n" for _, line in _lines(file))
    skipped, first = 0, next(lines, "")
    while first and not first.strip():
        skipped, first = skipped + 1, next(lines, "")
    csv.field_size_limit(_LARGEST_CELL)  # else a cell of more than 131,072 characters is refused
    signs = (delimiter, ",", ";", "\t", "|")
    try:
        found = next((sign for sign in signs if len(next(csv.reader([first], delimiter=sign), [])) > 1), delimiter)
    except csv.Error as error:
        raise _csv_problem(error, skipped + 1, skipped + 1) from error
    rows = _delimited(csv.reader(chain([first], lines), delimiter=found, strict=True), skipped)
    header = [name or f"Unnamed: {place}" for place, name in enumerate(next(rows, (0, []))[1])]
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise BrokenFile(f"two of its columns are named {twice!r}.", "Rename one of them.")
    for line, cells in rows:
        if any(cells[len(header) :]):
            raise BrokenFile(
                f"Expected {len(header)} fields in line {line}, saw {len(cells)}.",
                f"Put a cell that holds {found!r} into quotes.",
            )
        yield line, {name: store(cell) if cell else None for name, cell in zip(header, cells, strict=False)}


READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".jsonl": partial(json_rows, of_lines=True),
    ".ndjson": partial(json_rows, of_lines=True),
    ".json": partial(json_rows, of_lines=False),
    ".csv": partial(csv_rows, delimiter=","),
    ".tsv": partial(csv_rows, delimiter="\t"),
}
"""What reads a file, by its ending."""


def _lines(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and lines of a file, without the mark that some editors begin UTF-8 with."""
    number, begun, chunk = 0, [b""], file.read(_CHUNK)
    marked = next((kind for mark, kind in _WIDE_MARKS.items() if chunk.startswith(mark)), None)
    if kind := marked or ("UTF-16" if b"\0" in chunk[:4] else None):
        raise BrokenFile(f"it is {kind} text where UTF-8 is needed.", f"Save it as UTF-8: {_as_utf8(kind)}")
    chunk = chunk.removeprefix(b"\xef\xbb\xbf")
    while chunk:  # plain iteration is slow where a file is remote
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0], begun = b"".join([*begun, lines[0]]), []  # joined once: a file may be one line
        begun.append(rest)
        for line in lines:
            number += 1
            yield number, _decoded(line, number)
        chunk = file.read(_CHUNK)
    if rest := b"".join(begun):
        yield number + 1, _decoded(rest, number + 1)


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = f"Save it as UTF-8, whose codec can't decode its byte 0x{line[error.start]:02x}; where it is Latin-1:"
        raise BrokenFile(f"line {number} is not UTF-8 text.", f"{remedy} {_as_utf8('LATIN1')}") from error


def _as_utf8(kind: str) -> str:
    return f"iconv -f {kind} -t UTF-8 OLD > NEW"


def _line_problem(line: str) -> str | None:
    """What is wrong with one line that should be a JSON object; None for an object."""
    try:
        fault = json_fault(lambda: line.rstrip("\r"), dict)
    except ValueError:  # int() takes 4,300 digits at most
        return _TOO_MANY_DIGITS
    return fault and fault[1]


def _line_cells(number: int, line: str) -> dict[str, str | None]:
    """The cells of a line that is one JSON object."""
    try:
        row = _READ.decode(line)
    except _Twice as error:
        raise BrokenFile(f"line {number} {error}.", _TAKE_OUT) from error
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BrokenFile(_named(number, line))
    cells = _cells(row, lambda: _WRITTEN.decode(line))
    if _may_hold_half_pair(line) and _is_no_text(cells):
        raise BrokenFile(f"line {number} {_HALF_PAIR}.")
    return cells


class _Twice(ValueError):
    """An object in which a key stands twice: which of its values counts is a matter of who reads it."""


_TAKE_OUT = "Take one of them out."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


_READ = json.JSONDecoder(object_pairs_hook=_object)

_TOO_MANY_DIGITS = "holds a number of more digits than can be read"

_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
"""Leaves numbers as they are written."""

_HALF_PAIR = r"holds half of a surrogate pair, such as \ud83d alone, which is no text"


def _may_hold_half_pair(source: str) -> bool:
    return "\\ud" in source or "\\uD" in source


def _is_no_text(cells: dict[str, str | None]) -> bool:
    try:
        "".join(part for pair in cells.items() for part in pair if part).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _cells(row: dict[str, Any], written: Callable[[], dict[str, Any]]) -> dict[str, str | None]:
    """A row's cells as they are stored; `written` gives the row with its numbers as they stand in the file."""
    cells: dict[str, str | None] = {}
    for name, value in row.items():
        if value is None or value is True or value is False:
            cells[name] = _WORDS[value]
        elif type(value) is int and value:  # which JSON can write in one way only, but for 0 and -0
            cells[name] = str(value)
        else:
            cells[name] = store(written()[name] if isinstance(value, (int, float)) else value)
    return cells


_WORDS = {None: None, True: "true", False: "false"}


def _joined(lines: Iterator[tuple[int, str]]) -> str:
    """Some lines in one text in which each has its number again."""
    parts, last = [], 1
    for number, line in lines:
        parts += ["\n" * (number - last), line]
        last = number
    return "".join(parts)


def _whole_rows(text: str, first_line: tuple[int, str] | None) -> Iterator[Row]:
    """The rows of a text that is not an object a line.

    Args:
        text: all of it.
        first_line: of a file that should have an object a line, to be named where it has not.
    """
    try:
        values = _values(text, _READ)
    except _Twice as error:
        raise BrokenFile(f"it {error}.", _TAKE_OUT) from error
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{_json_problem(error)}." if first_line is None else _named(*first_line)) from error
    if first_line is not None and not isinstance(values[0], (dict, list)):
        raise BrokenFile(_named(*first_line))
    unwrap = first_line is None and len(values) == 1
    written, may_hold_half_pair = cache(lambda: _rows_in(_values(text, _WRITTEN), unwrap)), _may_hold_half_pair(text)
    for place, row in enumerate(_rows_in(values, unwrap)):
        if not isinstance(row, dict):
            raise BrokenFile(f"its row {place + 1} holds {json_kind(row)} where an object in braces is needed.")
        cells = _cells(row, partial(lambda at: written()[at], place))
        if may_hold_half_pair and _is_no_text(cells):
            raise BrokenFile(f"its row {place + 1} {_HALF_PAIR}.")
        yield None, cells


def _named(number: int, line: str) -> str:
    return f"line {number} {_line_problem(line)}."


def _values(text: str, decoder: json.JSONDecoder) -> list[Any]:
    """The JSON values that stand in a text one after another."""
    values, end = [], 0
    while rest := re.compile(r"\S").search(text, end):
        value, end = decoder.raw_decode(text, rest.start())
        values.append(value)
    return values


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is not valid JSON ({error.msg}, column {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"it {_TOO_MANY_DIGITS}"


def _rows_in(values: list[Any], unwrap: bool) -> list[Any]:
    """The rows that some JSON values hold; `unwrap` for a single one that may hold rows within an object."""
    rows = [row for value in values for row in (value if isinstance(value, list) else [value])]
    if rows and all(isinstance(row, str) for row in rows):
        return [{"text": row} for row in rows]
    return _unwrapped(rows[0]) if unwrap and isinstance(values[0], dict) else rows


def _unwrapped(value: dict[str, Any]) -> list[Any]:
    """The rows of one object: the list of objects that it has, or its columns, or itself."""
    lists = {name: cell for name, cell in value.items() if isinstance(cell, list) and cell}
    items = [item for cell in lists.values() for item in cell]
    if lists and len(lists) == len(value) and not any(isinstance(item, dict) for item in items):
        if len({len(cell) for cell in lists.values()}) > 1:
            lengths = ", ".join(f"{name} {len(cell)}" for name, cell in lists.items())
            raise BrokenFile(f"its columns are not equally long: {lengths}.")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    tables = {name: cell for name, cell in lists.items() if all(isinstance(item, dict) for item in cell)}
    if not tables or READ_COLUMNS & set(value):
        return [value]
    if len(tables) > 1:
        raise BrokenFile(f"it holds several lists of rows: {', '.join(tables)}.", "Write each to a file of its own.")
    return next(iter(tables.values()))


def _delimited(reader: Any, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader that are not blank, each with the line on which it begins."""
    while True:
        line = reader.line_num + skipped + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _csv_problem(error, line, reader.line_num + skipped) from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _csv_problem(error: csv.Error, begin: int, line: int) -> BrokenFile:
    if "unexpected end of data" in str(error):
        return BrokenFile(f"the quote that opens in line {begin} is never closed: EOF inside string", None)
    if "expected after" in str(error):
        what = f"line {line} has a quote that closes before its cell ends."
        return BrokenFile(what, 'Write a quote within a quoted cell twice, as in "say ""yes""".')
    if "new-line character" in str(error):
        what = f"line {line} has a carriage return within a cell that is not in quotes."
        return BrokenFile(what, "Put that cell into quotes; where all lines end so: tr '\\r' '\\n' < OLD > NEW")
    return BrokenFile(f"line {line} cannot be read: {error}.")
