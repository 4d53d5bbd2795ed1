"""From rows with a prompt and an answer to examples with tokens and labels."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..utils.errors import BadRequest
from .formats import CELL_VERSION, IGNORED, PROMPT, find_format, prompt_and_answer
from .row_locations import empty_answers, locate_rows, source_rows

FORMAT_VERSION = 1
"""Part of the preprocessing's cache key; raised whenever the same text is turned into other tokens."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, and what tokenising cost: how many were cut and how many had no answer (left)."""

    dataset: Dataset
    truncated: int
    dropped: int
    empty: list[int]
    """The rows, from 0 as `locate_rows` counts them, that were dropped because their answer is empty."""


def encode_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, description: str, name: str = "the data"
) -> Encoded:
    """Tokenise a data set, drop the examples without an answer, and count what was cut and dropped.

    Args:
        dataset: examples with the columns of one of the known formats.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.
        description: name of the progress bar.
        name: of the data set, for messages that name rows.

    Returns:
        Examples with `input_ids`, `labels`, `prompt_length` and `answer_text`.

    Raises:
        BadRequest: if the columns are not known, a chat has no template, or no example has an answer.
    """
    names = find_format(dataset.column_names)

    def encode(example: dict[str, Any], index: int) -> dict[str, Any]:
        return _encode_numbered(example, (name, dataset, index), names, tokenizer, max_length)

    encoded = dataset.map(
        encode,
        with_indices=True,
        remove_columns=dataset.column_names,
        # `_fingerprint` is the data set's own content key (read in datasets 5.2.0)
        new_fingerprint=encoding_fingerprint(f"{dataset._fingerprint} {CELL_VERSION}", names, tokenizer, max_length),
        desc=description,
    )
    is_answered = list(encoded["answered"])
    answered = [row for row, found in enumerate(is_answered) if found]
    dropped = [row for row, found in enumerate(is_answered) if not found]
    texts = encoded.select(dropped)["answer_text"]
    empty = source_rows(dataset, [row for row, text in zip(dropped, texts, strict=True) if not text.strip()])
    if not answered:
        raise _no_answers(name, empty, len(encoded), max_length)
    return Encoded(
        dataset=encoded.select(answered).remove_columns(["truncated", "answered"]),
        truncated=sum(encoded["truncated"]),
        dropped=len(dropped),
        empty=empty,
    )


def encode_first(
    dataset: Dataset, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "the data"
) -> list[dict[str, Any]]:
    """What `encode_row` makes of the first rows; nothing is written. Raises `BadRequest` as `encode_dataset`."""
    names, rows = find_format(dataset.column_names), range(min(count, len(dataset)))
    encoded = [_encode_numbered(dataset[row], (name, dataset, row), names, tokenizer, max_length) for row in rows]
    if len(encoded) == len(dataset) and not any(example["answered"] for example in encoded):
        raise _no_answers(name, source_rows(dataset, empty_answers(encoded)), len(encoded), max_length)
    return encoded


def encode_row(
    row: Mapping[str, Any], names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Tokenise one row of a data set.

    Args:
        row: with the columns of one of the known formats.
        names: these columns, see `find_format`.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.

    Returns:
        What `encode_example` gives, the `answer_text`, and whether the row is `answered`; otherwise it teaches nothing.

    Raises:
        ValueError: if a cell is not what its column should hold.
        BadRequest: if the row is a chat and the tokenizer has no chat template.
    """
    prompt, answer = prompt_and_answer(row, names)
    if isinstance(answer, list) and not tokenizer.chat_template:
        raise BadRequest("The data set holds chat messages, but the tokenizer has no chat template;", "add one to it.")
    text = answer if isinstance(answer, str) else "".join(message["content"] for message in answer)
    encoded = encode_example(prompt, answer, tokenizer, max_length)
    return {**encoded, "answer_text": text, "answered": any(label != IGNORED for label in encoded["labels"][1:])}


def encode_example(prompt: Any, answer: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Turn one prompt and answer into tokens and labels.

    The text is tokenised as a whole, as the model will see it; the prompt is the part that its own tokens share with
    that. A complete answer always ends with the end-of-text token and learns it. A cut answer does not: it must not
    teach the student to stop in the middle.

    Args:
        prompt: text or chat messages that carry no language-model loss.
        answer: text or chat messages that do.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.

    Returns:
        `input_ids`, `labels` (-100 on the prompt), `prompt_length`, and whether the example was `truncated`. Without
        an answer left, `labels` holds nothing but -100.
    """
    prompt_tokens, tokens = _tokenize(prompt, answer, tokenizer) if answer else ([], [])
    prompt_length = _common_prefix(prompt_tokens, tokens)
    if prompt_length < len(tokens):
        tokens = _end_with_eos(tokens, tokenizer)
    kept = tokens[:max_length]
    return {
        "input_ids": kept,
        "labels": [IGNORED] * min(prompt_length, len(kept)) + kept[prompt_length:],
        "prompt_length": prompt_length,
        "truncated": len(kept) < len(tokens),
    }


def encoding_fingerprint(
    content: str, names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> str:
    """A hash of all that decides which tokens come out of some data, and of nothing else.

    `datasets` would hash the tokenizer object, whose state changes with use.

    Args:
        content: what tells the data from others.
        names: of `find_format`.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    vocabulary = json.dumps(state | {"truncation": None, "padding": None}, sort_keys=True)  # set by mere use
    text = [FORMAT_VERSION, PROMPT, vocabulary, str(tokenizer.chat_template), tokenizer.eos_token_id]
    parts = [*text, content, names, max_length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _encode_numbered(row: Mapping[str, Any], place: tuple[str, Dataset, int], *encoding: Any) -> dict[str, Any]:
    """`encode_row` of a row that is named where it cannot be used: the data set's name, itself, and the row in it."""
    name, dataset, index = place
    try:
        return encode_row(row, *encoding)
    except ValueError as error:
        where = locate_rows(name, source_rows(dataset, [index]))
        raise BadRequest(f"The data cannot be used: in {where}, {error}.") from error


def no_answers(max_length: int) -> BadRequest:
    """The refusal of a data set of which no answer is left within so many tokens."""
    what = f"No example has an answer within max_length {max_length};"
    return BadRequest(what, "raise max_length or look at the data's columns.")


def _no_answers(name: str, empty: list[int], count: int, max_length: int) -> BadRequest:
    if len(empty) < count:
        return no_answers(max_length)
    what = f"No example has an answer: it is empty in {locate_rows(name, empty)};"
    return BadRequest(what, "write one in every row, or look at the data's columns.")


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _tokenize(prompt: Any, answer: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt alone and of prompt and answer together."""
    if isinstance(answer, str):
        return tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    template: Any = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    return template(prompt, add_generation_prompt=True) if prompt else [], template(prompt + answer)


def _end_with_eos(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make end-of-text the last token; white space that a chat template leaves behind it is dropped."""
    eos = tokenizer.eos_token_id
    if eos in tokens:
        last = len(tokens) - 1 - tokens[::-1].index(eos)
        if not str(tokenizer.decode(tokens[last + 1 :])).strip():
            return tokens[: last + 1]
    return [*tokens, eos]
