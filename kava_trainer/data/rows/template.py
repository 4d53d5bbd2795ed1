"""A tokenizer's chat template: what it makes of a conversation, on any day the same."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...utils.errors import BadRequest, reason_of

Message = dict[str, Any]

DATE = datetime(2024, 7, 26)
"""What a template takes for today: the day that Llama 3.2's own names where it is told none."""

_DIRECTIVES = "aAbBcdDeFHIjmMpSTuUwWxXyY"
"""Letters of `strftime`; with a minus before them those of numbers have no leading zero."""

_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template may raise on a conversation: of its own accord, or because its code meets what it does not expect."""


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations with the chat template of a tokenizer, the same on any day.

    Args:
        tokenizer: with a `chat_template`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens(tokenizer)

    def render(self, messages: Sequence[Message], tools: list[Message] | None, prompts: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: of it.
            tools: that may be called, as JSON schemas.
            prompts: end with what an answer begins with.

        Raises:
            ValueError: if the template refuses the conversation.
            BadRequest: if it is no template.
        """
        return cast(str, self._apply(messages, tools, add_generation_prompt=prompts, tokenize=False))

    def marked_spans(self, messages: Sequence[Message], tools: list[Message] | None) -> list[tuple[int, int]]:
        """Which characters of a conversation the template itself marks as generated; none where it marks nothing.

        The mask of tokens that `apply_chat_template` gives runs on to the end of the text, or breaks off, where a mark
        ends or begins with white space that the tokenizer's offsets leave out (read in transformers 5.23.0).
        """
        template = self._text(tools)
        if not _MARK.search(template):
            return []
        names: Any = self.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=cast(Any, tools),
            chat_template=(_fixed_date() if self.dated(tools) else "") + template,
            return_assistant_tokens_mask=True,
            **names,
        )
        return [(start, end) for start, end in rendered[1][0] if start < end]

    def dated(self, tools: list[Message] | None = None) -> bool:
        """Whether the template asks for the day."""
        return "strftime_now" in self._text(tools)

    def attempt(self, messages: Sequence[Message], tools: list[Message] | None, prompts: bool = False) -> str | None:
        """The text of a conversation; None where the template refuses it."""
        try:
            return self.render(messages, tools, prompts)
        except ValueError:
            return None

    def _apply(self, messages: Sequence[Message], tools: list[Message] | None, **options: Any) -> Any:
        if self.dated(tools):
            options["chat_template"] = _fixed_date() + self._text(tools)
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=cast(Any, tools), **options)
        except TemplateSyntaxError as error:
            raise BadRequest(f"The tokenizer's chat template cannot be read ({reason_of(error)}).") from error
        except _REFUSALS as error:
            raise ValueError(f"the chat template refuses the conversation ({reason_of(error)})") from error

    def _text(self, tools: list[Message] | None) -> str:
        return self.tokenizer.get_chat_template(None, cast(Any, tools))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, the longest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*map(str, tokenizer.all_special_tokens), *added} - {""}, key=len, reverse=True))


def _fixed_date() -> str:
    """What makes a template take `DATE` for today: a macro in the place of the function that it asks.

    `apply_chat_template` passes no functions on. The line break belongs to the tag, so nothing is added to the text.
    """
    told = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in _DIRECTIVES}
    told |= {f"%-{letter}": told[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}
    named = "".join(f"|replace({code!r}, {text!r})" for code, text in told.items())
    return "{%- macro strftime_now(format) -%}{{ format" + named + " }}{%- endmacro %}\n"
