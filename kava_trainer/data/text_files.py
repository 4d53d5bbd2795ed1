"""Files of JSON and delimited text as a data set, or a stream, in which every cell is what stands in the file."""

import gzip
import lzma
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.features.features import register_feature

from .formats import READ_COLUMNS, known_format
from .readers import READERS, BrokenFile, Row, restore, store

CHECKED_ROWS = 1000
"""Rows at the beginning of a stream's files that say which columns there are; all of them where it is no stream."""

READING_VERSION = "1"
"""Part of the cache's key; raised whenever the same file gives other cells."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may stand after another."""

_TABLE_ROWS, _STREAM_TABLE_ROWS = 1000, 100


@dataclass
class Cell:
    """The feature of a column of such files: text, or what a list or an object of JSON is in Python.

    In the table it is text, see `readers.store`; a column may hold both, and each row keeps its own keys.
    """

    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "string"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="KavaCell", init=False, repr=False)

    def __call__(self) -> Any:
        """The type of the table's column."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """From Python to the table."""
        return None if value is None else store(value)

    def decode_example(self, cell: str | None, token_per_repo_id: Any = None) -> Any:
        """From the table to Python."""
        return None if cell is None else restore(cell)


with warnings.catch_warnings():  # that this way of `datasets` may change, which a test would tell
    warnings.simplefilter("ignore", UserWarning)
    register_feature(Cell, "KavaCell")


def ending_of(name: str) -> str:
    """The ending of a file's name in small letters, without that of a compression."""
    name = name.lower()
    inner = next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)
    base = inner.replace("\\", "/").rpartition("/")[2]
    return base[base.rfind(".") :] if "." in base else ""


@dataclass
class TextFilesConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """Which files, and what they are where their names do not tell."""

    ending: str = ".json"


class TextFiles(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Reads such files as `datasets` does: from the disk or the hub, cached or streamed, compressed or not."""

    BUILDER_CONFIG_CLASS = TextFilesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        names = self.config.data_files
        dl_manager.download_config.extract_on_the_fly = True
        paths = dl_manager.extract(dl_manager.download(names))
        parts = {
            split: {"files": [dl_manager.iter_files(path) for path in paths[split]], "names": [*names[split]]}
            for split in names
        }
        checked = CHECKED_ROWS if dl_manager.is_streaming else None
        columns = {split: self._columns(split, checked, **part) for split, part in parts.items()}
        _check_alike(columns)
        self.info.features = datasets.Features({name: Cell() for part in columns.values() for name in part})
        size = {"table_rows": _STREAM_TABLE_ROWS if dl_manager.is_streaming else _TABLE_ROWS}
        return [datasets.SplitGenerator(name=split, gen_kwargs=part | size) for split, part in parts.items()]

    def _columns(self, split: str, checked: int | None, files: list[Any], names: list[str]) -> list[str]:
        """The columns of a split in the order in which they are met, within so many rows of each of its files.

        Of remote files that are streamed only the first is opened for it. Raises `BrokenFile` where there is no row.
        """
        found: dict[str, None] = {}
        for place, (paths, name) in enumerate(zip(files, names, strict=True)):
            if checked is None or place == 0 or "://" not in name:
                for cells in self._first_cells(paths, name, checked):
                    found.update(dict.fromkeys(cells))
        if not found:
            raise BrokenFile(f"its split {str(split)!r} holds no examples.", None)
        return [*found]

    def _first_cells(self, paths: Iterable[str], name: str, checked: int | None) -> Iterator[dict[str, str | None]]:
        """The cells of so many rows; a stream breaks where it comes to a broken one, and not here."""
        anything = False
        try:
            for _, cells in islice(self._rows(paths, name), checked):
                anything = True
                yield cells
        except BrokenFile:
            if checked is None or not anything:
                raise

    def _generate_shards(self, files: list[Any], names: list[str], table_rows: int) -> Iterator[str]:
        yield from names

    def _generate_tables(
        self, files: list[Any], names: list[str], table_rows: int
    ) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        schema = self.info.features.arrow_schema
        known = frozenset(schema.names)
        for shard, (paths, name) in enumerate(zip(files, names, strict=True)):
            rows, number = self._rows(paths, name), 0
            while taken := [*islice(rows, table_rows)]:
                for row in taken:
                    if not row[1].keys() <= known:
                        _check_columns(row, known, name)
                columns = [[cells.get(column) for _, cells in taken] for column in schema.names]
                arrays = [pa.array(column, type=pa.string()) for column in columns]
                yield (shard, number), pa.Table.from_arrays(arrays, schema=schema)
                number += 1

    def _rows(self, paths: Iterable[str], name: str) -> Iterator[Row]:
        """The rows of one file, or of all that lie in an archive. Raises `BrokenFile` with its name."""
        for path in paths:
            ending = next(filter(READERS.get, (ending_of(name), ending_of(path.split("::")[0]))), self.config.ending)
            try:
                with open(path, "rb") as file:  # which `datasets` makes open addresses and compressed files too
                    yield from READERS[ending](file)
            except BrokenFile as error:
                error.file = name
                raise
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                broken = BrokenFile(f"it is no whole {name.rpartition('.')[2]} file ({error}).", "Pack it again.")
                broken.file = name
                raise broken from error


def _check_alike(columns: Mapping[str, list[str]]) -> None:
    """Raise `BrokenFile` where splits are read by other columns: of them all only one set would be read.

    A split without answers, as many a test set is, may be there and not be used.
    """
    if len({names for part in columns.values() if (names := known_format(part))}) > 1:
        told = "; ".join(f"{split} has {', '.join(part)}" for split, part in columns.items())
        raise BrokenFile(f"its splits are read by different columns: {told}.", "Give all of them the same ones.")


def _check_columns(row: Row, known: frozenset[str], name: str) -> None:
    """Raise `BrokenFile` where a stream has come to a column that can't be left out and was not there before."""
    line, cells = row
    if late := READ_COLUMNS & cells.keys() - known:
        where = "a row" if line is None else f"line {line}"
        error = BrokenFile(
            f"{where} has the column {min(late)!r}, which none of the first {CHECKED_ROWS} rows has.",
            "Write it into the first row too, as null where it is empty, or leave streaming out.",
        )
        error.file = name
        raise error
