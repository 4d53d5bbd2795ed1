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
    begins = before is not None and text.startswith(before)
    if before is not None and until is not None and begins and text.startswith(until) and len(before) < len(until):
        return Span(len(before), len(before) + len(_ended(chat, until[len(before) :])), True)
    frame = _frame(chat, messages, index, tools)
    closing = _frame(chat, messages[: index + 1], index, tools)
    if frame is None or closing is None:
        return None
    start = common_prefix(before if before is not None and begins else frame[0], text)
    end = len(text) - common_prefix(frame[1][::-1], text[::-1])
    same = begins and until == text[:end] + closing[1]  # it differs in what follows a last turn alone
    end += len(_shared_end(chat, closing[1], text[end:]))
    return Span(start, end, same or index == 0) if start < end else None  # before a first message there is no prompt


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
    return bare if bare.endswith(chat.control_tokens) else text


def _shared_end(chat: ChatTemplate, closing: str, following: str) -> str:
    """What ends a turn that others follow.

    Args:
        chat: the template.
        closing: what it writes behind the words of a last turn.
        following: what stands behind the words of this one.

    Returns:
        All of the former where that stands there too; else what both begin with, up to the last control token in it.
    """
    ended = _ended(chat, closing)
    if following.startswith(ended):
        return ended
    shared = closing[: common_prefix(closing, following)]
    if ends := [shared.rfind(token) + len(token) for token in chat.control_tokens if token in shared]:
        return shared[: max(ends)]
    broken = [begin for token in chat.control_tokens if 0 <= (begin := closing.find(token)) < len(shared)]
    return shared[: min(broken, default=len(shared))]


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
