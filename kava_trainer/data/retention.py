"""A second held-out text, of which nothing is learned: it shows what a student keeps of its teacher's language."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config.data_arguments import NO_RETENTION, DataArguments
from ..utils.errors import BadRequest
from ..utils.files import absent
from .files import loading
from .formats import find_format, written_text
from .splits import read_splits
from .stream_sources import open_splits
from .text_files import ending_of
from .token_alignment.pair_encoder import TeacherReading

RETENTION_TEXTS = 300
"""So many texts are read at most; at most `max_eval_samples` where that is less."""

PROMPTS = "the held-out prompts"
"""The source of the text where none is named."""

_COLUMNS = ("text", "messages", "prompt", "question")
"""Columns of a data set that may hold the text, the first of them that is there."""

_SPLITS = ("test", "validation", "train")
"""Splits that are read, the first of them that is there: nothing is trained on any of them."""


def load_retention(
    asked: DataArguments,
    held_out: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher: TeacherReading | None = None,
) -> Dataset | None:
    """The text to measure retained language on, tokenised as plain text without a chat template.

    Args:
        asked: its `retention_dataset_name` says where the text comes from.
        held_out: rows of the data set to learn from; by default the text is what people wrote of their prompts.
        tokenizer: of both models, or of the student.
        teacher: how the teacher reads the same, where its tokens are others.

    Returns:
        `input_ids` and `labels` of texts of two tokens or more, each cut to `max_length`; with a
        `teacher` its `teacher_input_ids` and `teacher_labels` of the same text. None where nothing is held out or
        wanted, and by default where the held-out rows have no prompts.

    Raises:
        BadRequest: if the named data cannot be read, or holds no text.
    """
    name = asked.retention_dataset_name
    if name == NO_RETENTION or not held_out:
        return None
    count = min(RETENTION_TEXTS, asked.max_eval_samples or RETENTION_TEXTS)
    texts = _prompts(held_out) if name is None else _named_texts(name, asked)
    encoded = _encode(islice(texts, count), tokenizer, asked.max_length, teacher)
    if name is not None and len(encoded) == 0:
        raise BadRequest(f"retention_dataset_name {name} holds no text of two tokens or more;", "name another.")
    return encoded if len(encoded) else None


def describe_retention(
    asked: DataArguments, retention: Dataset | None, chance: float | None = None
) -> dict[str, Any] | None:
    """On what retained language is measured: `source`, `texts`, and `tokens`, the predicted ones; None where it is not.

    Args:
        asked: of the run.
        retention: see `load_retention`.
        chance: the cross-entropy in nats of a guess among all tokens, which is noted too.
    """
    if retention is None:
        return None
    source, tokens = asked.retention_dataset_name or PROMPTS, sum(len(row) - 1 for row in retention["input_ids"])
    return {"source": source, "texts": len(retention), "tokens": tokens, "chance": chance}


def _prompts(held_out: Dataset) -> Iterator[str]:
    """What people wrote of the prompts of a data set; nothing where it is plain text."""
    column = find_format(held_out.column_names)[0]
    if column == "text":
        return iter(())
    return filter(None, (written_text(row[column], column).strip() for row in held_out.select_columns([column])))


def _named_texts(name: str, asked: DataArguments) -> Iterator[str]:
    """The texts of a data set of its own that are not empty."""
    if ending_of(name) == ".txt":
        yield from _paragraphs(name)
        return
    config_name = asked.retention_dataset_config_name
    source = replace(asked, dataset_name=name, dataset_config_name=config_name, dataset_train_split="train")
    for number, row in enumerate(_rows(name, source)):
        if text := _text_of(row, name, number):
            yield text


def _rows(name: str, source: DataArguments) -> Iterator[Mapping[str, Any]]:
    """The rows of the split that is read."""
    splits: Mapping[str, Iterable[Mapping[str, Any]]]
    try:
        with loading(name):
            splits = open_splits(source)[0] if source.streaming else read_splits(source)
            yield from next(splits[split] for split in (*_SPLITS, *splits) if split in splits)
    except BadRequest as error:  # whose sentences are of a data set to learn from
        raise BadRequest(f"retention_dataset_name cannot be read: {error}") from error


def _text_of(row: Mapping[str, Any], name: str, number: int) -> str:
    column = next((column for column in _COLUMNS if column in row), None)
    if column is None:
        what = f"retention_dataset_name {name} has the columns {', '.join(row)}; its text is read from"
        raise BadRequest(f"{what} {', '.join(_COLUMNS)}.", "Rename yours to text.")
    try:
        return written_text(row[column], column).strip()
    except ValueError as error:
        what = f"retention_dataset_name {name} cannot be used: in its row {number + 1}, {error}."
        raise BadRequest(what, "Change it, or leave it out.") from error


def _paragraphs(name: str) -> Iterator[str]:
    """The parts of a text file between empty lines."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadRequest.of(absent("retention_dataset_name", "file", name))
    with loading(name), fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig") as file:
        yield from filter(None, map(str.strip, re.split(r"\n\s*\n", file.read())))


def _encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, teacher: TeacherReading | None
) -> Dataset:
    if teacher is not None:
        return _encode_for_both(texts, tokenizer, max_length, teacher)
    tokens = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    kept = [own for own in tokens if len(own) >= 2]
    return Dataset.from_dict({"input_ids": kept, "labels": kept})


def _encode_for_both(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, teacher: TeacherReading
) -> Dataset:
    """The same text for both; the teacher's ends where the student's is cut."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "teacher_input_ids": []}
    for text in texts:
        own = tokenizer(text, return_offsets_mapping=True)
        tokens, last = (
            own["input_ids"][:max_length],
            max((end for _, end in own["offset_mapping"][:max_length]), default=0),
        )
        others = teacher.tokenizer(text[:last])["input_ids"][: teacher.max_length]
        if min(len(tokens), len(others)) >= 2:
            columns["input_ids"].append(tokens)
            columns["teacher_input_ids"].append(others)
    return Dataset.from_dict({**columns, **{name.replace("input_ids", "labels"): own for name, own in columns.items()}})
