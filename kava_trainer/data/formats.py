"""The columns that a data set may have, and what of a row is its prompt and what its answer."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..utils.errors import BadRequest

IGNORED = -100
"""Label of a token that carries no language-model loss, as those of a prompt."""

_FORMATS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))

CELL_VERSION = 2
"""Part of the key of tokenised data sets; raised whenever a value of a typed column becomes other text."""

READ_COLUMNS = frozenset(name for names in _FORMATS for name in names) | {"system", "tools"}
"""Every column that can be part of what a row teaches."""

PROMPT = "Question: {question}\nAnswer:"
"""How a `question` becomes a prompt; the `answer` follows after one space."""


def find_format(columns: list[str]) -> tuple[str, ...]:
    """The columns that hold prompt and answer. Raises `BadRequest` where no known set of columns is there."""
    for names in _FORMATS:
        if set(names) <= set(columns):
            return names
    raise BadRequest(
        f"The data set has the columns {', '.join(columns)}; KAVA reads "
        f"{', '.join(' + '.join(names) for names in _FORMATS)}.",
        "Rename yours to one of these.",
    )


def prompt_and_answer(example: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, Any]:
    """Prompt and answer of one example: two texts, or two lists of chat messages.

    Of a conversation the last message is the answer; plain `text` is all answer.

    Raises:
        ValueError: if a cell is not what its column should hold, or a conversation does not end with the assistant.
    """
    if names == ("text",):
        return "", _text(example["text"], "text")
    if names == ("messages",):
        messages = _messages(example["messages"], "messages")
        return _conversation(messages[:-1], messages[-1:])
    if any(isinstance(example[name], list) for name in names):
        return _conversation(*(_messages(example[name], name) for name in names))
    prompt, answer = (_text(example[name], name) for name in names)
    if names == ("question", "answer"):
        return PROMPT.format(question=prompt), f" {answer}" if answer else ""
    return prompt, answer


def prompt_kind(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What a row's prompt is: a `question`, a plain `prompt`, chat `messages`, or plain `text` that has none."""
    if names in (("question", "answer"), ("text",)):
        return names[0]
    return "messages" if isinstance(row[names[0]], list) else "prompt"


def _text(value: Any, name: str) -> str:
    """A cell as text.

    That is what stands in a file of text. Of a typed column a number is its shortest decimal (`42`, `0.5`, `1.0`), a
    truth value `true` or `false`; a missing cell and a float that is not a number are nothing.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float, Decimal)):
        return str(value)
    raise ValueError(f"{name} must be text, but it is a {type(value).__name__}")


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """Chat messages with a role and text each; none where the cell is empty."""
    value = value or []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{name} must be a list of messages, but it is a {type(value).__name__}")
    for message in value:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f'{name} must hold messages such as {{"role": "user", "content": "text"}}')
    return value


def _conversation(prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> tuple[Any, Any]:
    """Both parts, unless it is not the assistant that answers."""
    if answer and answer[-1]["role"] != "assistant":
        raise ValueError(f"a conversation must end with the assistant, but this one ends with {answer[-1]['role']!r}")
    return prompt, answer
