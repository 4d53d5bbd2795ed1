"""Whether the folders of a run can be written to and hold what it will save, found out before anything is loaded."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .console import apart, size_text
from .errors import BadRequest, Problem

_OTHER_FOLDER = "Choose another folder."


def is_utf8(value: Any) -> bool:
    """Whether all text in a value can be written to a file: a name of bytes that are not UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def make_folder(name: str, path: str | Path) -> Path:
    """Make the folder that an argument names, and write to it to see whether that works.

    Permissions alone do not tell: root has all of them on a disk that is read-only. What is written is gone at once.

    Raises:
        BadRequest: if it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{name} {folder} cannot be made: {error.strerror}.", _OTHER_FOLDER, name) from error
    _try_to_write(folder, f"{name} {folder} cannot be written to")
    return folder


def _try_to_write(folder: Path, problem: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"KAVA")
            file.flush()
    except OSError as error:
        raise BadRequest(f"{problem}: {error.strerror}.", _OTHER_FOLDER) from error


def existing_folder(path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def check_folder(name: str, path: str | Path) -> None:
    """Find out what `make_folder` would, without making the folder.

    Raises:
        BadRequest: if it cannot be made or written to.
    """
    there, folder = existing_folder(path), Path(path)
    what = "be written to" if there == folder.absolute() else "be made"
    if not there.is_dir():
        raise BadRequest(f"{name} {folder} cannot be made: {there} is a file.", _OTHER_FOLDER, name)
    _try_to_write(there, f"{name} {folder} cannot {what}")


def check_output_file(path: Path, is_own: Callable[[str], bool]) -> None:
    """Make sure, before any work is done, that the file of `--output` can be made and replaces nothing of the user's.

    Args:
        path: of the file.
        is_own: whether a text is what an earlier run of the same command has written; it may be replaced.

    Raises:
        BadRequest: if there is no folder for it, or something else is there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadRequest(f"--output {path} cannot be written;", "name a file in a folder that exists.")
    _try_to_write(path.absolute().parent, f"--output {path} cannot be written")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BadRequest(f"--output {path} is no plain file, so it cannot be replaced;", "name another file.")
    if not path.exists() or is_own(_text_of(path)):
        return
    raise BadRequest(
        f"--output {path} is there already, and this command did not write it, so it is not replaced.",
        "Name another file, or delete it.",
    )


def check_new_file(path: Path) -> None:
    """Make sure, before any work is done, that a new file can be made there. Raises `BadRequest` if not."""
    if path.is_symlink() or path.exists():
        raise BadRequest(f"{path} is there already, and is not replaced;", "name another file, or delete it.")
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"{path} cannot be written;", "name a file in a folder that exists.")
    _try_to_write(path.absolute().parent, f"{path} cannot be written")


def _text_of(path: Path) -> str:
    """The text of a file; nothing that is not UTF-8 is any command's own."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadRequest(f"--output {path} cannot be read: {error.strerror}.", "Name another file.") from error


@contextmanager
def no_empty_folders_if_refused(*paths: str | Path) -> Iterator[None]:
    """Where the request is refused, delete the folders that were not there before and are empty, and those above."""
    folders = _missing(paths)
    try:
        yield
    except BadRequest:
        _delete_empty(folders)
        raise


@contextmanager
def no_empty_folders(*paths: str | Path) -> Iterator[None]:
    """In the end delete the folders that were not there before and are empty, and those above, in any case."""
    folders = _missing(paths)
    try:
        yield
    finally:
        _delete_empty(folders)


def _missing(paths: Iterable[str | Path]) -> set[Path]:
    """Folders that are not there yet, among these and those above them."""
    return {folder for path in paths for folder in (Path(path), *Path(path).parents) if not folder.exists()}


def _delete_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            with suppress(OSError):  # another process was quicker
                folder.rmdir()


def check_cache_space(folder: Path, needed: int) -> None:
    """Make sure that the disk of a cache, which need not exist yet, holds so many bytes. Raises `BadRequest` if not."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if needed > free:
        shown = apart(needed, free, 2, size_text)
        raise BadRequest(
            f"The teacher cache would take {shown[0]} in {folder}, where {shown[1]} are free.",
            "Name a folder on a larger disk, write teacher_cache_dtype int8, or map fewer layers.",
        )


def missing_path(argument: str, value: str | None) -> Problem | None:
    """What is wrong with an argument that names a local file or folder which is not there; None for anything else.

    Local is what begins with `.`, `/` or `~`, or has more slashes than a hub id may. A pattern of files is left to its
    reader.
    """
    if not value or "://" in value or any(sign in value for sign in "*?["):
        return None
    is_local = value.startswith((".", "~")) or os.path.isabs(value) or value.count("/") > 1
    if not is_local or os.path.exists(os.path.expanduser(value)):  # pathlib raises on names too long for any file
        return None
    kind = "file" if Path(value).suffix[1:].isalpha() else "folder"
    return absent(argument, kind, value)


def absent(argument: str, kind: str, value: str) -> Problem:
    """What is wrong with an argument that names a file or folder which is not there."""
    what = f"{argument} names the {kind} {value}, which does not exist;"
    return Problem(argument, what, "write the path of one that is there, or an id on the hub.")


def json_kind(value: object) -> str:
    """What a JSON value that is no object is called."""
    words = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return words.get(type(value), "null")


def json_mistake(error: json.JSONDecodeError) -> str:
    """Where a text is no JSON and why, as words that go on; a comma too many is named as such."""
    text, found = error.doc, error.msg.startswith("Illegal trailing comma")  # which Python 3.13 tells of itself
    comma = error.pos if found else len(text[: error.pos].rstrip()) - 1
    after = text[comma + 1 :].lstrip()[:1]
    if comma < 0 or text[comma] != "," or after not in ("}", "]"):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    line = text.count("\n", 0, comma) + 1
    return f"in line {line} a comma stands before {after}, with nothing between them; take that comma out"


def json_fault(read: Callable[[], str], kinds: type | tuple[type, ...]) -> tuple[int, str] | None:
    """The line (0 for no single one) where a text is no JSON value of these kinds, and why not; None if it is one."""
    try:
        value = json.loads(read())
    except OSError as error:
        return 0, f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return 0, "is not UTF-8 text"
    except json.JSONDecodeError as error:
        return error.lineno, f"is not valid JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return 0, "is nested too deeply"
    return None if isinstance(value, kinds) else (0, f"holds {json_kind(value)} where an object in braces is needed")


def json_problem(path: Path, kinds: type | tuple[type, ...]) -> str | None:
    """What is wrong with a file that should be one JSON value of one of these kinds; None if it is."""
    fault = json_fault(lambda: path.read_text(encoding="utf-8-sig"), kinds)
    return fault and f"{f'line {fault[0]}' if fault[0] else 'it'} {fault[1]}"


def folder_problem(folder: Path, names: Iterable[str]) -> str | None:
    """Which of these files of a folder is there and holds no JSON object, and why not; None if all do."""
    for name in names:
        if (folder / name).is_file() and (problem := json_problem(folder / name, dict)):
            return f"in its {name}, {problem}"
    return None
