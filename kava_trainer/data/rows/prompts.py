"""Rows that are prompts alone, which the student answers itself."""

from typing import Any

from datasets import Dataset, Features

from ..formats import find_format, known_format

_ANSWER_OF = {"prompt": "completion", "question": "answer"}


def with_answer_column(rows: Dataset) -> Dataset:
    """The same rows with a column for answers, empty where there is none; a conversation's last turn is its answer.

    Rows of any other kind stay as they are.
    """
    columns, known = rows.column_names, known_format(rows.column_names)
    if known == ("messages",):
        open_ended = any(_is_open(messages) for messages in rows["messages"])
        return _split(rows) if open_ended else rows
    asked = next((name for name in _ANSWER_OF if name in columns), None)
    if known is not None or asked is None:
        return rows
    return rows.add_column(_ANSWER_OF[asked], [None] * len(rows))


def have_answers(rows: Dataset) -> bool:
    """Whether any row has an answer, as far as its columns can tell."""
    names = find_format(rows.column_names)
    return names[0] in ("text", "messages") or any(bool(cell) for cell in rows[names[1]])


def _is_open(messages: Any) -> bool:
    """Whether a conversation waits for an answer."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def _split(rows: Dataset) -> Dataset:
    """Conversations as prompts and completions; both have the type of the whole, also where the first are empty."""
    kinds = {**rows.features, "prompt": rows.features["messages"], "completion": rows.features["messages"]}
    del kinds["messages"]
    return rows.map(_split_conversation, remove_columns=["messages"], features=Features(kinds))


def _split_conversation(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"] or []
    if _is_open(messages):
        return {"prompt": messages, "completion": []}
    return {"prompt": messages[:-1], "completion": messages[-1:]}
