"""The columns that a data set may have, and what of a row is its prompt and what its answer."""

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

from datasets import ClassLabel

from ..utils.errors import BadRequest

IGNORED = -100
"""Label of a token that carries no language-model loss, as those of a prompt."""

WRITTEN, ASKED, SAMPLED = range(3)
"""Whose a token is, where a batch holds answers that the student wrote: of an example of the data; of the prompt of
such an answer, where nothing is learned; or of the answer, where the next-token loss has no part."""

_FORMATS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))

CELL_VERSION = 2
"""Part of the key of tokenised data sets; raised whenever a value of a typed column becomes other text."""

_BESIDE_A_CHAT = ("tools", "system")
"""Columns that are read beside chat messages: the functions that may be called, and a system message."""

READ_COLUMNS = frozenset(name for names in (*_FORMATS, _BESIDE_A_CHAT) for name in names)
"""Every column that can be part of what a row teaches."""

PROMPT = "Question: {question}\nAnswer:"
"""How a `question` becomes a prompt; the `answer` follows after one space."""

_NOTHING: tuple[Any, ...] = (None, "", [], {})

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Under which names a message may hold the reasoning before its answer."""


def known_format(columns: Sequence[str]) -> tuple[str, ...] | None:
    """The columns of prompt and answer; None where no known set of them is there."""
    return next((names for names in _FORMATS if set(names) <= set(columns)), None)


def find_format(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that are read: those of prompt and answer, then those that stand beside a chat.

    Raises:
        BadRequest: where no known set of columns is there.
    """
    if names := known_format(columns):
        may_be_chat = names[0] in ("messages", "prompt")
        return (*names, *(name for name in _BESIDE_A_CHAT if may_be_chat and name in columns))
    shown = [name if name == name.strip() else repr(name) for name in columns]
    raise BadRequest(
        f"The data set has the columns {', '.join(shown)}; KAVA reads "
        f"{', '.join(' + '.join(names) for names in _FORMATS)}.",
        _renaming(columns),
    )


def _renaming(columns: Sequence[str]) -> str:
    """What to do with columns of which no known set is there."""
    known = {name for names in _FORMATS for name in names}
    meant = {column: column.strip().lower() for column in columns if column not in known}
    if known_format([*columns, *meant.values()]):
        pairs = ", ".join(f"{own!r} to {name!r}" for own, name in meant.items() if name in known)
        return f"Rename {pairs}."
    if "conversations" in columns:
        return (
            'Make messages of the conversations: a list of {"role": ..., "content": ...} in place of '
            '{"from": ..., "value": ...}, with the roles system, user and assistant.'
        )
    if {"instruction", "output"} <= set(columns):
        return "Join instruction and input into a column prompt, and rename output to completion."
    return "Rename yours to one of these."


def check_types(features: Mapping[str, Any] | None, name: str) -> None:
    """Raise `BadRequest` where a column to be read has a type that does not say which text its values are.

    Args:
        features: types of the columns; None where they are not known.
        name: of the data set, for the message.
    """
    for column in find_format(list(features)) if features is not None else ():
        feature = cast(Mapping[str, Any], features)[column]
        if isinstance(feature, ClassLabel):
            raise BadRequest(
                f"The column {column!r} of {name!r} holds the numbers of classes, such as 0 for "
                f"{feature.int2str(0)!r};",
                "save it as a column of text.",
            )
        kind = str(getattr(feature, "dtype", ""))
        if kind.startswith(("float16", "float32", "timestamp", "date", "time", "duration")):
            raise BadRequest(
                f"The column {column!r} of {name!r} holds {kind} values, which can be written as text in more than one "
                "way;",
                "save it as a column of text.",
            )


def unread_columns(columns: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """The columns of a data set that nothing reads, where its rows are like this one."""
    names = find_format(columns)
    plain = prompt_kind(row, names) != "messages"
    return [name for name in columns if name not in names or (plain and name in _BESIDE_A_CHAT)]


def prompt_and_answer(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, Any]:
    """Prompt and answer of one row: two texts, or two lists of chat messages.

    Of a conversation the last message is the answer; plain `text` is all answer. A `system` column stands before the
    messages as a system message, where they do not begin with one.

    Args:
        row: with the columns that are read.
        names: these columns, see `find_format`.

    Raises:
        ValueError: if a cell is not what its column should hold, or a conversation does not end with the assistant.
    """
    if names[0] == "text":
        return "", _text(row["text"], "text")
    if names[0] == "messages":
        messages = _messages(row["messages"], "messages")
        return _conversation(_under_system(messages[:-1], messages, row, names), messages[-1:])
    if any(isinstance(row[name], list) for name in names[:2]):
        asked, given = (_messages(row[name], name) for name in names[:2])
        return _conversation(_under_system(asked, asked, row, names), given)
    prompt, answer = (_text(row[name], name) for name in names[:2])
    if names[0] == "question":
        return PROMPT.format(question=prompt), f" {answer}" if answer else ""
    return prompt, answer


def written_text(cell: Any, name: str) -> str:
    """What people wrote in a cell that is plain text or the beginning of a chat: the text, or the user's messages.

    Args:
        cell: of a column `text`, `question`, `prompt` or `messages`.
        name: of the column.

    Raises:
        ValueError: if the cell is not what its column should hold.
    """
    if name != "messages" and not isinstance(cell, list):
        return _text(cell, name)
    said = [message["content"] for message in _messages(cell, name) if message["role"] == "user"]
    return "\n\n".join(said)


def tools_of(row: Mapping[str, Any], names: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """The functions that a chat may call, as JSON schemas: the `tools` column, as a list or as JSON text; else None.

    Raises:
        ValueError: if the cell holds anything else.
    """
    if "tools" not in names or row["tools"] in _NOTHING:
        return None
    tools = _from_json(row["tools"])
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of JSON schemas, or the JSON text of one")
    return tools or None


def has_two_systems(row: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a `system` column is not used because the row's messages begin with another system message."""
    cell = row[names[0]]
    if "system" not in names or not row["system"] or not isinstance(cell, list) or not cell:
        return False
    return cell[0].get("role") == "system" and cell[0].get("content") != row["system"]


def prompt_kind(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What a row's prompt is: a `question`, a plain `prompt`, chat `messages`, or plain `text` that has none."""
    if names[0] in ("question", "text"):
        return names[0]
    return "messages" if isinstance(row[names[0]], list) or names[0] == "messages" else "prompt"


def is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a message says nothing: neither text nor calls nor reasoning."""
    return not message.get("tool_calls") and not any(
        str(message.get(name) or "").strip() for name in ("content", *_REASONING)
    )


def without_filler(value: Any, feature: Any) -> Any:
    """A cell without the keys that it holds only because other rows of a typed column have them.

    Arrow gives each object of a column the keys of all of them, with None for those that it did not have. What is
    stored as JSON text stays as it is: there None is somebody's own.

    Args:
        value: the cell.
        feature: its type, of `Dataset.features`; None where it is not known.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_filler(own, feature.get(key)) for key, own in value.items() if own is not None}
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [without_filler(own, inner) for own in value]
    return value


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


def _from_json(value: Any) -> Any:
    """What JSON text stands for; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Chat messages with a role and text each, without keys that hold None; none where the cell is empty.

    An assistant may say nothing, as where it calls a function.
    """
    value = value or []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{name} must be a list of messages, but it is a {type(value).__name__}")
    for message in value:
        if isinstance(message.get("content"), list):
            raise ValueError(f"{name} holds a message whose content is a list of parts, where a text is needed")
        silent = message.get("role") == "assistant" and message.get("content") is None
        silent = silent and not ({"from", "value"} & message.keys())
        if not isinstance(message.get("role"), str) or not (silent or isinstance(message.get("content"), str)):
            raise ValueError(f'{name} must hold messages such as {{"role": "user", "content": "text"}}')
    return [{key: own for key, own in message.items() if own is not None} for message in value]


def _under_system(
    prompt: list[dict[str, Any]], messages: list[dict[str, Any]], row: Mapping[str, Any], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The prompt of some messages, with the row's `system` column before it where they have no system message."""
    if "system" not in names or (messages and messages[0]["role"] == "system"):
        return prompt
    system = _text(row["system"], "system")
    return [{"role": "system", "content": system}, *prompt] if system.strip() else prompt


def _conversation(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Both parts, unless it is not the assistant that answers."""
    if answer and answer[-1]["role"] != "assistant":
        raise ValueError(f"a conversation must end with the assistant, but this one ends with {answer[-1]['role']!r}")
    return prompt, answer
