"""Data files on the disk: which ones a name means, and where one of them is broken."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path

from datasets.utils import logging

from ..utils.errors import BadRequest, reason_of
from ..utils.files import absent, folder_problem
from .broken_files import broken_line, data_problem, skipped_line

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Which reader of `datasets` takes a file, by its ending."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Read a data set within the `with` block. Raises `BadRequest` in place of whatever a reader raises."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the readers log an error that they raise as well
    try:
        yield
    except BadRequest:
        raise
    except Exception as error:  # the readers raise many kinds for one cause: this cannot be read as a data set
        raise _unreadable(error, name) from error
    finally:
        logging.set_verbosity(level)


def matching_files(path: Path) -> list[Path]:
    """The file that a path means, or the files that fit it where it is a pattern."""
    if has_magic(str(path)) and not path.exists():
        return [file for file in map(Path, sorted(glob(str(path), recursive=True))) if file.is_file()]
    return [path]


def find_files(name: str, checked_lines: int | None = None) -> list[str]:
    """The data files that a name with a known ending means: one, or all that fit a pattern, without empty ones.

    Args:
        name: a path, or a pattern such as `data/*.jsonl`.
        checked_lines: look at so many lines of each jsonl file; all of them by default.

    Raises:
        BadRequest: if there is none, or a line would be passed over in silence; the message names file and line.
    """
    path = Path(name).expanduser()
    files = matching_files(path)
    if not files:
        raise BadRequest(f"dataset_name is the pattern {path}, which no file fits.")
    for file in files:
        if not file.is_file():
            raise BadRequest.of(absent("dataset_name", "file", str(file)))
    filled = [file for file in files if file.stat().st_size > 0]
    if not filled:
        raise BadRequest(f"The data file {path} is empty;", "name one that holds rows.")
    for file in filled if BUILDERS[path.suffix] == "json" else []:
        if problem := skipped_line(file, checked_lines):
            where = "" if len(files) == 1 else f"in {file}, "
            raise BadRequest(f"The data set {name!r} cannot be loaded: {where}{problem}.", "Mend the file.")
    return [str(file) for file in filled]


def _unreadable(error: Exception, name: str) -> BadRequest:
    """Why a data set could not be read, with the place to look at where a file is broken."""
    path = Path(name).expanduser()
    problem = data_problem(path) if path.is_file() else _folder_problem(path) or _pattern_problem(path)
    start = f"The data set {name!r} cannot be loaded:"
    if problem:
        return BadRequest(f"{start} {problem}.", "Mend the file.")
    reason = "it holds no examples." if isinstance(error, StopIteration) else reason_of(error.__cause__ or error)
    reason = re.sub(r" (in|starting at) row \d+$", "", reason)  # of a block, and counted from 0
    return BadRequest(f"{start} {reason}")


def _folder_problem(folder: Path) -> str | None:
    """The broken file of a folder that is a data set, if that can be told."""
    if problem := folder_problem(folder, ("state.json", "dataset_info.json", "dataset_dict.json")):
        return problem
    broken = ((file, broken_line(file)) for file in sorted(folder.glob("*.jsonl")))
    return next((f"in its {file.name}, {problem}" for file, problem in broken if problem), None)


def _pattern_problem(path: Path) -> str | None:
    """The first broken one of the files that fit a pattern, if that can be told."""
    broken = ((file, data_problem(file)) for file in matching_files(path) if file.is_file())
    return next((f"in {file}, {problem}" for file, problem in broken if problem), None)
