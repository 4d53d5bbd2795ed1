"""The columns of a row that are a prompt and an answer."""

from collections.abc import Mapping
from typing import Any

from ..utils.errors import BadRequest

_FORMATS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))

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


def _text(value: Any, name: str) -> str:
    """A cell as text: nothing for a missing one, `42` for the number 42."""
    if value is None or isinstance(value, (str, int, float)):
        return "" if value is None else str(value)
    raise ValueError(f"{name} must be text, but it is a {type(value).__name__}")


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """Chat messages with a role and text each."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{name} must be a list of messages, but it is a {type(value).__name__}")
    for message in value:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f'{name} must hold messages such as {{"role": "user", "content": "text"}}')
    return value


def prompt_and_answer(example: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, Any]:
    """Prompt and answer of one example: two texts, or two lists of chat messages.

    Of a conversation the last message is the answer; plain `text` is all answer.

    Raises:
        ValueError: if a cell is not what its column should hold, or a conversation does not end with the assistant.
    """
    if names == ("text",):
        return "", _text(example["text"], "text")
    if names == ("messages",):
        messages = _messages(example["messages"] or [], "messages")
        prompt, answer = messages[:-1], messages[-1:]
    elif isinstance(example[names[0]], list) or isinstance(example[names[1]], list):
        prompt, answer = (_messages(example[name] or [], name) for name in names)
    else:
        prompt, answer = (_text(example[name], name) for name in names)
        if names == ("question", "answer"):
            return PROMPT.format(question=prompt), f" {answer}" if answer else ""
        return prompt, answer
    if answer and answer[-1]["role"] != "assistant":
        raise ValueError(f"a conversation must end with the assistant, but this one ends with {answer[-1]['role']!r}")
    return prompt, answer


IGNORED = -100
"""Label of a token that carries no language-model loss."""


def prompt_kind(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What a row's prompt is: a `question`, a plain `prompt`, chat `messages`, or plain `text` that has none."""
    if names in (("question", "answer"), ("text",)):
        return names[0]
    return "messages" if isinstance(row[names[0]], list) else "prompt"
