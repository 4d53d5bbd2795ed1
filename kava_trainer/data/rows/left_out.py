"""What of a conversation is not in the text that a chat template makes of it."""

import json
from collections.abc import Sequence
from typing import Any

from .template import ChatTemplate, Message


class LeftOut:
    """Tells what a chat template leaves out.

    Args:
        chat: the template.
    """

    def __init__(self, chat: ChatTemplate) -> None:
        self._chat = chat
        self._known: dict[Any, frozenset[str]] = {}

    def __call__(self, messages: Sequence[Message], tools: list[Message] | None, text: str) -> set[str]:
        """What of a conversation is not in its text, in words.

        Which keys a template reads is tried out once for all conversations of one make.
        """
        make = (bool(tools), *(_make(message) for message in messages))
        if make not in self._known:
            self._known[make] = frozenset(self._unread(messages, tools, text))
        unread = self._known[make]
        roles = {m["role"] for m in messages if _role(m) not in unread and not _is_in(m.get("content") or "", text)}
        return {*unread, *(f"part of the content of {role} messages" for role in roles)}

    def _unread(self, messages: Sequence[Message], tools: list[Message] | None, text: str) -> set[str]:
        """Parts without which the text would be the same."""
        found = {"tools"} if tools and self._chat.attempt(messages, None) == text else set()
        for number, message in enumerate(messages):
            for key, value in message.items():
                if key == "role" or value in (None, "", [], {}):
                    continue
                kept = ("role",) if key == "content" else ("role", "content")  # transformers copies reasoning
                other = {name: own for name, own in message.items() if name in kept or own != value}
                if key == "content":
                    other[key] = "B" if value == "A" else "A"
                if self._chat.attempt([*messages[:number], other, *messages[number + 1 :]], tools) == text:
                    found.add(_role(message) if key == "content" else f"{key} of {message['role']} messages")
        return found


def _make(message: Message) -> tuple[Any, ...]:
    """What of a message a template may ask for but for its words: its role, and which keys hold something."""
    return message["role"], *sorted((key, bool(value), type(value).__name__) for key, value in message.items())


def _role(message: Message) -> str:
    return f"messages of the role {message['role']}"


def _is_in(content: str, text: str) -> bool:
    """Whether a text holds all lines of another, as they stand or as JSON has them."""
    if content.strip() in text:
        return True
    lines = filter(None, map(str.strip, content.splitlines()))
    return all(line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text for line in lines)
