"""Data sets by their names: files and folders on the disk, repositories on the hub, and what reads each."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape, glob, has_magic
from pathlib import Path

import datasets
import fsspec
from datasets import load_dataset_builder
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.utils import logging

from ..utils.errors import BadRequest, reason_of
from ..utils.files import absent, folder_problem
from .readers import READERS, BrokenFile
from .text_files import COMPRESSIONS, READING_VERSION, TextFiles, ending_of

TYPED = {".parquet": "parquet", ".arrow": "arrow"}
"""Which reader of `datasets` takes a file whose columns have types, by its ending."""

ENDINGS = (
    f"{', '.join(READERS)} (each also with {', '.join(COMPRESSIONS)} behind it), {' and '.join(TYPED)}, "
    "in small or capital letters"
)
"""Of the files that are read, in words."""

_CONFIGURED = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "chunksize"}
"""What the configuration of a repository may say of its files."""


def is_file_name(name: str) -> bool:
    """Whether a name has the ending of a data file."""
    ending = ending_of(name)
    return ending in READERS or (ending in TYPED and name.lower().endswith(ending))


def is_local(name: str) -> bool:
    """Whether a name can be nothing but a path on this machine, be it there or not."""
    path = os.path.expanduser(name)
    return name.startswith((".", "~")) or os.path.isabs(path) or name.count("/") > 1 or os.path.exists(path)


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


def find_files(name: str) -> list[Path]:
    """The data files that a name means: one, or all that fit a pattern, without empty ones.

    Raises:
        BadRequest: if there is none, or one has an ending that is not read.
    """
    path = Path(name).expanduser()
    files = matching_files(path)
    if not files:
        raise BadRequest(f"dataset_name is the pattern {path}, which no file fits.")
    for file in files:
        if not file.is_file():
            raise BadRequest.of(absent("dataset_name", "file", str(file)))
        if not is_file_name(str(file)):
            raise BadRequest(
                f"The ending of the data file {file} does not say what it holds;",
                f"rename it to one of those that are read: {ENDINGS}.",
            )
    filled = [file for file in files if file.stat().st_size > 0]
    if not filled:
        raise BadRequest(f"The data file {path} is empty;", "name one that holds rows.")
    return filled


def find_builder(name: str, config_name: str | None) -> datasets.DatasetBuilder:
    """What reads the data set of a name; nothing of it is read yet but the names of its files.

    Files of JSON and delimited text are read by `TextFiles`, wherever they are.

    Raises:
        BadRequest: if there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_builder(path, config_name)
    if is_file_name(name) or path.exists() or (has_magic(name) and "://" not in name):
        return _files_builder(find_files(name))
    if is_local(name):
        raise BadRequest(f"The data set {name!r} cannot be loaded: there is no file or folder of that name.")
    return as_text(load_dataset_builder(name, config_name))


def _files_builder(files: Sequence[Path]) -> datasets.DatasetBuilder:
    endings = {ending_of(file.name) for file in files}
    paths = [escape(str(file)) for file in files]
    if endings <= READERS.keys():
        _check_packages(map(str, files))
        return TextFiles(data_files=paths, hash=READING_VERSION)
    if len(endings) > 1:
        raise BadRequest(f"dataset_name fits files of different kinds: {', '.join(sorted(endings))}.", "Name one kind.")
    return load_dataset_builder(TYPED[endings.pop()], data_files=paths)


def _folder_builder(folder: Path, config_name: str | None) -> datasets.DatasetBuilder:
    """What reads a folder of files: `datasets`, unless it would leave some out or take none."""
    files = [file for file in folder.rglob("*") if is_file_name(file.name)]
    endings = {ending_of(file.name) for file in files}
    capital = next((file for file in files if ending_of(file.name) not in file.name), None)
    mixed = {".csv", ".tsv"} & endings and {".json", ".jsonl", ".ndjson"} & endings
    if capital and not endings <= READERS.keys():
        raise BadRequest(f"The ending of {capital} is in capital letters;", "write it in small ones.")
    kinds = {TYPED.get(ending, "text") for ending in endings}
    if (mixed or capital or len(kinds) > 1) and not _is_configured(folder):
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
        parts = {split: [file for file in part if is_file_name(file)] for split, part in found.items()}
        used = sorted({ending_of(file) for part in parts.values() for file in part})
        if len({TYPED.get(ending, "text") for ending in used}) > 1:
            what = f"The folder {folder} holds files of different kinds: {', '.join(used)}."
            raise BadRequest(what, "Keep one kind there, or name the files by a pattern.")
        if not TYPED.keys() & set(used):
            escaped = {split: [*map(escape, part)] for split, part in parts.items() if part}
            return TextFiles(data_files=escaped, hash=READING_VERSION)
    return as_text(load_dataset_builder(str(folder), config_name))


def _is_configured(folder: Path) -> bool:
    """Whether a folder says itself which of its files are which split."""
    card = folder / "README.md"
    return card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")


def as_text(builder: datasets.DatasetBuilder) -> datasets.DatasetBuilder:
    """A builder of `datasets`, or one that reads its files as text where they are JSON or delimited text."""
    if not isinstance(builder, (Json, Csv)):
        return builder
    asked, default = builder.config, type(builder.config)()
    for option in dataclasses.fields(asked):
        if option.name not in _CONFIGURED and getattr(asked, option.name) != getattr(default, option.name):
            raise BadRequest(
                f"The data set {builder.repo_id or builder.dataset_name!r} sets {option.name} for its files, which "
                "KAVA does not read;",
                "save its rows as jsonl and name that file.",
            )
    _check_packages(file for part in asked.data_files.values() for file in part)
    return TextFiles(
        data_files=asked.data_files,
        ending=".json" if isinstance(builder, Json) else ".tsv" if asked.sep == "\t" else ".csv",
        config_name=asked.name,
        dataset_name=builder.dataset_name,
        repo_id=builder.repo_id,
        base_path=builder.base_path,
        token=builder.token,
        storage_options=builder.storage_options,
        hash=READING_VERSION,
    )


def _check_packages(files: Iterator[str]) -> None:
    packed = next((file for file in files if file.lower().endswith(".zst")), None)
    if packed and "zstd" not in fsspec.available_compressions():
        raise BadRequest(f"The data file {packed} is compressed with zstd;", "pip install zstandard, or unpack it.")


def _unreadable(error: Exception, name: str) -> BadRequest:
    """Why a data set could not be read, with the place to look at where a file is broken."""
    path, start = Path(name).expanduser(), f"The data set {name!r} cannot be loaded:"
    cause = next((found for found in (error, error.__cause__) if isinstance(found, BrokenFile)), None)
    if cause is not None:
        return BadRequest(f"{start} {_place(path, cause.file)}{cause.problem}", cause.remedy)
    if problem := folder_problem(path, ("state.json", "dataset_info.json", "dataset_dict.json")):
        return BadRequest(f"{start} {problem}.", "Mend the file.")
    reason = "it holds no examples." if isinstance(error, StopIteration) else reason_of(error.__cause__ or error)
    if reason.startswith("BuilderConfig "):
        return BadRequest(f"{start} {reason}.", "Name one of these as dataset_config_name, or write null there.")
    return BadRequest(f"{start} {reason}")


def _place(named: Path, file: str | None) -> str:
    """Which file of a data set, where it is not the one that is named."""
    if file is None or named.resolve() == Path(file).resolve():
        return ""
    if named.is_dir() and Path(file).is_relative_to(named.resolve()):
        return f"in its {Path(file).relative_to(named.resolve())}, "
    return f"in {file}, "
