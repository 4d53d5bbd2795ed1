"""Where a stream's rows come from: files and splits that are never loaded as a whole, and what identifies them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..config.data_arguments import DataArguments
from ..config.model_arguments import QUICKSTART
from ..quickstart import SPLIT_SIZES
from ..quickstart.problems import generate_problems
from ..utils.digests import read_samples
from ..utils.errors import BadRequest
from .files import find_builder, loading
from .formats import find_format
from .splits import HELD_OUT_LIMIT, find_test_split, find_train_split, saved_splits

TABLE_ROWS = 100
"""Rows that are taken from a reader at once; only these are ever turned into Python objects."""


def open_splits(arguments: DataArguments) -> tuple[dict[str, datasets.IterableDataset], dict[str, list[str]]]:
    """The splits of a data set, opened and not read, each as often as is asked for; and the files of each."""
    name = cast(str, arguments.dataset_name)
    path = Path(name).expanduser()
    if name == QUICKSTART:
        problems = {split: generate_problems(count, split) for split, count in SPLIT_SIZES.items()}
        digests = {split: [hashlib.sha256(json.dumps(rows).encode()).hexdigest()] for split, rows in problems.items()}
        return {s: Dataset.from_list(rows).to_iterable_dataset() for s, rows in problems.items()}, digests
    if (splits := saved_splits(path, arguments)) is not None:
        files = {split: [file["filename"] for file in part.cache_files] for split, part in splits.items()}
        return {split: part.to_iterable_dataset() for split, part in splits.items()}, files
    builder = find_builder(name, arguments.dataset_config_name)
    return dict(builder.as_streaming_dataset()), dict(builder.config.data_files or {})


def files_digest(files: Sequence[str]) -> str:
    """A hash of the names, the sizes, and the first and last 4 KiB of files, without reading the rest of them.

    What is no file here is taken by its name: the address of a file on the hub holds the revision that it belongs to.
    """
    digest = hashlib.sha256()
    for name in files:
        path = Path(name)
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + read_samples(path, 2, 2**12))
        else:
            digest.update(f"{name}\n".encode())
    return digest.hexdigest()


class Rows:
    """The rows of one split, read as often as is asked for, in bounded memory.

    Args:
        name: of the data set, for messages.
        purpose: what its rows are for, for messages.
        stream: what reads it.
        files: where it comes from.
        skipped: rows at the beginning that are left out.
        limit: read only so many rows after them; all by default.

    Raises:
        BadRequest: if there is no row, or the columns are not known.
    """

    def __init__(
        self,
        name: str,
        purpose: str,
        stream: datasets.IterableDataset,
        files: Sequence[str] = (),
        skipped: int = 0,
        limit: int | None = None,
    ) -> None:
        self.name, self.skipped = name, skipped
        first = next(_tables(name, stream), None)
        if first is None:
            raise BadRequest(f"The data set {name!r} holds no examples to {purpose} on.")
        self.column_names = first.column_names
        self.columns = find_format(self.column_names)
        self._whole = stream.select_columns(list(self.columns))
        self.features = self._whole.features
        kept = self._whole.skip(skipped) if skipped else self._whole
        self._kept = kept if limit is None else kept.take(limit)
        self.digest = files_digest(files) + f" {skipped} {limit}"

    def first(self, count: int) -> Dataset:
        """The first rows of the split, those that are left out included."""
        return Dataset.from_list(list(islice(self._plain_rows(), count)), features=self.features)

    def tables(self, shuffle_buffer: int, seed: list[int]) -> Iterator[pa.Table]:
        """All rows, a table of some at a time.

        Args:
            shuffle_buffer: rows that are mixed with each other; 0 leaves the order as it is. Where no row is left out
                the order of the files is mixed too.
            seed: the same order comes out for the same numbers.
        """
        rows = self._kept
        if shuffle_buffer:
            rows = rows.shuffle(generator=np.random.default_rng(seed), buffer_size=shuffle_buffer)
        return _tables(self.name, rows)

    def plain(self, table: pa.Table) -> list[dict[str, Any]]:
        """Rows as Python objects."""
        rows = table.to_pylist()
        return rows if self.features is None else [self.features.decode_example(row) for row in rows]

    def _plain_rows(self) -> Iterator[dict[str, Any]]:
        return (row for table in _tables(self.name, self._whole) for row in self.plain(table))


def _tables(name: str, stream: datasets.IterableDataset) -> Iterator[pa.Table]:
    """What a stream reads. Raises `BadRequest` where its files are broken."""
    # `iter` leaves all rows to every data worker, where a plain loop would deal out whole files among them.
    tables = stream.with_format("arrow").iter(batch_size=TABLE_ROWS)
    while True:
        with loading(name):
            table = next(tables, None)
        if table is None:
            return
        yield table


def open_rows(arguments: DataArguments) -> tuple[Rows, Dataset]:
    """The rows to train on, and those held out: of the test split, else the first ones, which are then left out.

    Raises:
        BadRequest: if the data cannot be found or read, a split does not exist, or nothing is left to train on.
    """
    name, count = cast(str, arguments.dataset_name), arguments.max_eval_samples or HELD_OUT_LIMIT
    with loading(name):
        splits, files_of = open_splits(arguments)
    train, test = find_train_split(splits, arguments), find_test_split(splits, arguments)
    files = files_of.get(arguments.dataset_train_split) or [f"{name} {arguments.dataset_config_name}"]
    rows = Rows(name, "train", train, files, count if test is None else 0, arguments.max_train_samples)
    held_out = (rows if test is None else Rows(name, "evaluate", test)).first(count)
    if next(rows.tables(0, [0]), None) is None:
        raise BadRequest(
            f"The data set {name!r} ends within its first {count} rows, which are held out for evaluation.",
            "Set max_eval_samples lower, name a dataset_test_split, or leave streaming out.",
        )
    return rows, held_out
