"""From rows with a prompt and an answer to examples with tokens and labels."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from ..utils.errors import BadRequest
from .formats import CELL_VERSION, PROMPT, check_types, find_format
from .row_locations import empty_answers, locate_rows, source_rows
from .rows.remarks import Found, as_text, gather, remark_problems
from .token_alignment.pair_encoder import (
    NO_READINGS,
    AnyEncoder,
    Readings,
    TeacherReading,
    TeacherTokenizers,
    counts_column,
    make_encoder,
    of_other_tokens,
    pair_features,
    readings_key,
)
from .token_alignment.ranges import add_counts, is_pair_column

FORMAT_VERSION = 1
"""Part of the preprocessing's cache key; raised whenever the same text is turned into other tokens."""

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int64")),
        "prompt_length": Value("int64"),
        "truncated": Value("bool"),
        "answer_text": Value("string"),
        "answered": Value("bool"),
        "remarks": Value("string"),
    }
)
"""Of encoded rows. Where none of the first ones has an answer, they could not be told from these."""

_TOKENS = ("input_ids", "labels")

_D = TypeVar("_D", Dataset, IterableDataset, DatasetDict, IterableDatasetDict)


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, and what tokenising cost: how many were cut and how many were dropped."""

    dataset: Dataset
    truncated: int
    dropped: int
    empty: list[int]
    """The rows, from 0 as `locate_rows` counts them, that were dropped because their answer is empty."""
    remarks: Found
    """What is to be told of rows, counted likewise."""
    token_alignment: dict[int, list[int]] = field(default_factory=dict)
    """How many tokens are aligned in each of the `ranges.KINDS` with each teacher that reads others."""


def encode(
    dataset: _D,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    assistant_turns: str = "last",
    teacher_tokenizer: TeacherTokenizers = None,
    token_alignment: str = "overlap",
) -> _D:
    """Turn a data set of questions, prompts, conversations or plain text into one that `KavaTrainer` trains on.

        >>> rows = Dataset.from_list([{"question": "What is 2+3?", "answer": "5"}])
        >>> encode(rows, tokenizer).column_names
        ['input_ids', 'labels']

    The answers alone have labels, and end with the end-of-text token. Examples without an answer are dropped. What a
    chat template leaves out of the rows, and the like, is told by `warnings`, with how many rows it concerns.

    Args:
        dataset: with the columns `question` and `answer`, `prompt` and `completion`, `messages` (beside them `tools`
            and `system`) or `text`, in memory, streamed, or several splits of either.
        tokenizer: of both models, or of the student; for conversations with a chat template.
        max_length: longest example in tokens of the student; longer ones are cut.
        assistant_turns: which answers of a conversation are learned, `last` or `all`.
        teacher_tokenizer: of the teacher, where its tokens are others; of several teachers a list.
        token_alignment: of which of its states a token learns the mean, `overlap` or `causal`, see `DataArguments`.

    Returns:
        The same kind of data set, with `input_ids` and `labels` (-100 where nothing is learned). Where the teacher has
        other tokens also `teacher_input_ids` and `teacher_ranges`, see `PairEncoder`; `teacher2_input_ids` and so on of
        the second of several. Of a stream the rows that cannot
        be used are left out; while it is read, the first row of each kind of warning is told.

    Raises:
        BadRequest: as `encode_dataset`; if `token_alignment` is neither; of a stream, if its columns are not known or a
            chat has no template.
        ValueError: for anything that is no data set.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        asked = (max_length, assistant_turns, teacher_tokenizer, token_alignment)
        splits = {name: encode(rows, tokenizer, *asked) for name, rows in dataset.items()}
        return cast(_D, type(dataset)(cast(Any, splits)))
    if token_alignment not in ("overlap", "causal"):
        raise BadRequest(f"token_alignment is {token_alignment!r};", "write overlap or causal.")
    others, causal = of_other_tokens(tokenizer, teacher_tokenizer), token_alignment == "causal"
    readings = {number: TeacherReading(own, causal=causal) for number, own in others.items()}
    if causal and not readings:
        warnings.warn("token_alignment causal has no effect without a teacher_tokenizer of other tokens.", stacklevel=2)
    if isinstance(dataset, IterableDataset):
        return cast(_D, _encode_stream(dataset, tokenizer, max_length, assistant_turns, readings))
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"encode takes a data set, and this is a {kind}; write Dataset.from_list(rows) for a list.")
    rows = dataset.with_format(None)
    encoded = encode_dataset(
        rows, tokenizer, max_length, "Tokenizing", assistant_turns=assistant_turns, readings=readings
    )
    for problem in remark_problems(encoded.remarks, "the data", "encoded", len(rows)):
        warnings.warn(str(problem), stacklevel=2)
    return cast(_D, encoded.dataset.select_columns(_token_columns(readings)))


def _token_columns(readings: Readings) -> list[str]:
    """What of an example is read when it is learned from."""
    return [*_TOKENS, *filter(is_pair_column, pair_features(readings))]


def _encode_stream(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_turns: str,
    readings: Readings,
) -> IterableDataset:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    check_types(dataset.features, "the data")
    names = find_format(columns)
    encoder = make_encoder(names, tokenizer, max_length, assistant_turns, dataset.features, readings=readings)
    kept = _token_columns(readings)
    told: set[str] = set()

    def encode_one(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        try:
            example = encoder({name: cells[0] for name, cells in rows.items()})
        except ValueError as error:
            if "unusable" not in told:
                what = f"Row {numbers[0] + 1} cannot be used and is left out: {error}. Others like it are not told."
                warnings.warn(what, stacklevel=2)
            told.add("unusable")
            example = {"answered": False, "remarks": ""}
        _warn_of_first(example["remarks"], numbers[0], told)
        return {name: [example[name]] if example["answered"] else [] for name in kept}

    features = Features({name: kind for name, kind in (_FEATURES | pair_features(readings)).items() if name in kept})
    return dataset.map(
        encode_one, with_indices=True, batched=True, batch_size=1, remove_columns=columns, features=features
    )


def _warn_of_first(remarks: str, row: int, told: set[str]) -> None:
    """Warn of what was not `told` before; it is told then."""
    new = [remark for remark in json.loads(remarks or "[]") if as_text([remark]) not in told]
    told.update(as_text([remark]) for remark in new)
    for problem in remark_problems(gather([as_text(new)], row), "the data", "streamed", row + 1):
        warnings.warn(str(problem), stacklevel=3)


def encode_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    description: str,
    name: str = "the data",
    assistant_turns: str = "last",
    accepts_prompts: bool = False,
    readings: Readings = NO_READINGS,
) -> Encoded:
    """Tokenise a data set, drop the examples without an answer, and count what was cut and dropped.

    Args:
        dataset: examples with the columns of one of the known formats.
        tokenizer: the tokenizer of both models, or of the student.
        max_length: longest example in tokens.
        description: name of the progress bar.
        name: of the data set, for messages that name rows.
        assistant_turns: which answers of a conversation are learned, `last` or `all`.
        accepts_prompts: see `Encoder`.
        readings: how those teachers read the same whose tokens are others.

    Returns:
        Examples with `input_ids`, `labels`, `prompt_length` and `answer_text`; also what `PairEncoder` gives of each of
        the teachers in `readings`.

    Raises:
        BadRequest: if the columns are not known, or of a type that is no text, a chat has no template, a row cannot be
            used, or no example has an answer.
    """
    names = find_format(dataset.column_names)
    check_types(dataset.features, name)
    features = dataset.features
    encoder = make_encoder(names, tokenizer, max_length, assistant_turns, features, accepts_prompts, readings)

    def encode_numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
        return _encode_numbered(row, (name, dataset, index), encoder)

    # `_fingerprint` is the data set's own content key (read in datasets 5.2.0)
    tokens = encoding_fingerprint(dataset._fingerprint, names, tokenizer, max_length, assistant_turns)
    tokens = readings_key(readings, tokens)
    encoded = dataset.map(
        encode_numbered,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(_FEATURES | pair_features(readings)),
        new_fingerprint=_cache_key(tokens + ("prompts" if accepts_prompts else ""), tokenizer),
        desc=description,
    )
    is_answered = list(encoded["answered"])
    answered = [row for row, found in enumerate(is_answered) if found]
    dropped = [row for row, found in enumerate(is_answered) if not found]
    texts = [] if accepts_prompts else encoded.select(dropped)["answer_text"]
    empty = source_rows(dataset, [row for row, text in zip(dropped, texts, strict=False) if not text.strip()])
    if not answered:
        raise no_prompts(max_length) if accepts_prompts else _no_answers(name, empty, len(encoded), max_length)
    counts = {number: counts_column(number) for number in readings}
    told = ["truncated", "answered", "remarks", *counts.values()]
    return Encoded(
        dataset=encoded.select(answered).remove_columns(told),
        truncated=sum(encoded["truncated"]),
        dropped=len(dropped),
        empty=empty,
        remarks=_in_source(gather(encoded["remarks"]), dataset),
        token_alignment={number: add_counts(encoded[name]) for number, name in counts.items()},
    )


def encode_first(dataset: Dataset, count: int, encoder: AnyEncoder, name: str = "the data") -> list[dict[str, Any]]:
    """What an `Encoder` makes of the first rows; nothing is written. Raises `BadRequest` as `encode_dataset`."""
    rows = range(min(count, len(dataset)))
    encoded = [_encode_numbered(dataset[row], (name, dataset, row), encoder) for row in rows]
    if len(encoded) == len(dataset) and not any(example["answered"] for example in encoded):
        if encoder.accepts_prompts:
            raise no_prompts(encoder.max_length)
        raise _no_answers(name, source_rows(dataset, empty_answers(encoded)), len(encoded), encoder.max_length)
    return encoded


def remarks_on(encoded: Sequence[Mapping[str, Any]], dataset: Dataset) -> Found:
    """The remarks on the first rows of a data set, given what `encode_first` made of them."""
    return _in_source(gather(example["remarks"] for example in encoded), dataset)


def encoding_fingerprint(
    content: str,
    names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_turns: str = "last",
) -> str:
    """A hash of all that decides which tokens come out of some data, and of nothing else.

    `datasets` would hash the tokenizer object, whose state changes with use.

    Args:
        content: what tells the data from others.
        names: of `find_format`.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.
        assistant_turns: which answers of a conversation are learned.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    vocabulary = json.dumps(state | {"truncation": None, "padding": None}, sort_keys=True)  # set by mere use
    text = [FORMAT_VERSION, PROMPT, vocabulary, str(tokenizer.chat_template), tokenizer.eos_token_id]
    parts = [*text, content, names, max_length, *([assistant_turns] if assistant_turns != "last" else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _cache_key(tokens: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The key of a tokenised data set.

    Args:
        tokens: its `encoding_fingerprint`, which names streams too, and stays the same for those of earlier versions.
        tokenizer: whose template may write control tokens by their names, such as `bos_token`.
    """
    named = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    parts = [tokens, CELL_VERSION, [*_FEATURES], named, bool(getattr(tokenizer, "split_special_tokens", False))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _encode_numbered(row: Mapping[str, Any], place: tuple[str, Dataset, int], encoder: AnyEncoder) -> dict[str, Any]:
    """What becomes of a row, which is named where it cannot be used: the data set's name, itself, and the row in it."""
    name, dataset, index = place
    try:
        return encoder(row)
    except ValueError as error:
        raise unusable(locate_rows(name, source_rows(dataset, [index])), error) from error


def unusable(where: str, error: ValueError) -> BadRequest:
    """The refusal of a data set of which one row cannot be used."""
    return BadRequest(f"The data cannot be used: in {where}, {error}.", "Change it, or leave it out.")


def no_answers(max_length: int) -> BadRequest:
    """The refusal of a data set of which no answer is left within so many tokens."""
    what = f"No example has an answer within max_length {max_length};"
    return BadRequest(what, "raise max_length or look at the data's columns.")


def no_prompts(max_length: int) -> BadRequest:
    """The refusal of a data set of which no prompt leaves room for an answer within so many tokens."""
    what = f"No example has a prompt that leaves room for an answer within max_length {max_length};"
    return BadRequest(what, "raise max_length or look at the data's columns.")


def _no_answers(name: str, empty: list[int], count: int, max_length: int) -> BadRequest:
    if len(empty) < count:
        return no_answers(max_length)
    what = f"No example has an answer: it is empty in {locate_rows(name, empty)};"
    return BadRequest(what, "write one in every row, or look at the data's columns.")


def _in_source(found: Found, dataset: Dataset) -> Found:
    """The same remarks, on rows as they stood before the data set was split."""
    return {
        kind: {detail: source_rows(dataset, rows) for detail, rows in details.items()}
        for kind, details in found.items()
    }
