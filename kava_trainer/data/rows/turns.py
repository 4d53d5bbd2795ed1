"""Where in a rendered conversation each turn is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .template import ChatTemplate, Message

_PROBES = ("A", "B")
"""Two texts of a message that share nothing: what stays the same around both is the template's own."""


@dataclass(frozen=True)
class Span:
    """Which characters of a rendered conversation one turn teaches."""

    start: int
    end: int
    nested: bool
    """Whether it was found by comparing the conversation with its own beginnings; else by other words in its place."""


def find_turn(
    chat: ChatTemplate, messages: Sequence[Message], index: int, tools: list[Message] | None, text: str
) -> Span | None:
    """What one message of a conversation teaches: all that it adds to the prompt for it.

    Args:
        chat: the template.
        messages: of the conversation.
        index: of the message.
        tools: that may be called.
        text: of the conversation.

    Returns:
        Its characters in the text; None where they cannot be told from the others.
    """
    before = chat.attempt(messages[:index], tools, prompts=True) if index else None
    until = chat.attempt(messages[: index + 1], tools)
    nested = before is not None and until is not None and text.startswith(before) and text.startswith(until)
    if before is not None and until is not None and nested and len(before) < len(until):
        return Span(len(before), len(before) + len(_ended(chat, until[len(before) :])), True)
    frame = _frame(chat, messages, index, tools)
    closing = _frame(chat, messages[: index + 1], index, tools)
    if frame is None or closing is None:
        return None
    opened = before if before is not None and text.startswith(before) else frame[0]
    start, end = common_prefix(opened, text), len(text) - common_prefix(frame[1][::-1], text[::-1])
    closed = _ended(chat, closing[1])
    end += len(closed) if text.startswith(closed, end) else 0
    return Span(start, end, index == 0) if start < end else None  # before a first message there is no prompt


def opening(chat: ChatTemplate, messages: Sequence[Message], index: int, tools: list[Message] | None) -> str:
    """What stands before a message's own words; nothing where that cannot be told."""
    frame = _frame(chat, messages, index, tools)
    return "" if frame is None else frame[0]


def _frame(
    chat: ChatTemplate, messages: Sequence[Message], index: int, tools: list[Message] | None
) -> tuple[str, str] | None:
    """What stands before and behind the words of one message, whatever they are; None where the template refuses."""
    own = messages[index]["role"]
    first, second = (
        chat.attempt([*messages[:index], {"role": own, "content": probe}, *messages[index + 1 :]], tools)
        for probe in _PROBES
    )
    if first is None or second is None or first == second:
        return None
    return first[: common_prefix(first, second)], first[len(first) - common_prefix(first[::-1], second[::-1]) :]


def _ended(chat: ChatTemplate, text: str) -> str:
    """The text of a turn, without the white space that a template leaves behind its last control token."""
    bare = text.rstrip()
    return bare if any(bare.endswith(token) for token in chat.tokenizer.all_special_tokens) else text


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
