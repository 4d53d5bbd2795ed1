"""One row becomes one example: its tokens, and which of them are learned."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...utils.errors import BadRequest
from ..formats import IGNORED, has_two_systems, is_blank, prompt_and_answer, tools_of, without_filler
from .left_out import LeftOut
from .remarks import (
    ARGUMENTS,
    BLANK,
    CONTROL,
    LEFT_OUT,
    OTHERS,
    PROMPT,
    SYSTEM,
    TURNS,
    UNLEARNED,
    ControlTokens,
    Remark,
    as_text,
)
from .template import ChatTemplate, Message
from .turns import common_prefix, find_turn, opening


@dataclass
class RowText:
    """What becomes of one row: its tokens, and which of them are learned."""

    tokens: list[int] = field(default_factory=list)
    learned: list[tuple[int, int]] = field(default_factory=list)
    """From which token up to which."""
    answers: list[tuple[int, str]] = field(default_factory=list)
    """Where each answer begins, and its text."""
    notes: list[Remark] = field(default_factory=list)
    is_prompt: bool = False
    """Whether it is a prompt alone, to which there is room for an answer."""
    answer: str = ""
    """The text of the answer, where no answer's own begins in the tokens."""
    text: str = ""
    """What was tokenised; an end-of-text token that stands behind it was not."""
    messages: list[Message] | None = None
    """That the text was rendered from; None for plain text."""
    tools: list[Message] | None = None
    """That these may call."""


class Encoder:
    """Turns rows into examples.

    The text is tokenised as a whole, as the model will see it; the prompt is the part that its own tokens share with
    that. A complete answer always ends with the end-of-text token and learns it. A cut answer does not: it must not
    teach the student to stop in the middle.

    Args:
        names: the columns that are read, see `find_format`.
        tokenizer: the tokenizer of both models.
        max_length: longest example in tokens.
        assistant_turns: which answers of a conversation are learned, `last` or `all`.
        features: types of the columns, where they are known.
        accepts_prompts: whether a row without an answer becomes an example too, of its prompt and without labels.

    Raises:
        BadRequest: if `assistant_turns` is neither, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        assistant_turns: str = "last",
        features: Mapping[str, Any] | None = None,
        accepts_prompts: bool = False,
    ) -> None:
        if assistant_turns not in ("last", "all"):
            raise BadRequest(f"assistant_turns is {assistant_turns!r};", "write last or all.")
        if tokenizer.eos_token_id is None:
            what = "The tokenizer has no end-of-text token, so a student could never learn to stop;"
            raise BadRequest(what, "set its eos_token.")
        self.max_length = max_length
        self._names, self.tokenizer, self._features = names, tokenizer, features or {}
        self._all_turns, self.accepts_prompts = assistant_turns == "all", accepts_prompts
        self._chat, self._control = ChatTemplate(tokenizer), ControlTokens(tokenizer)
        self._left_out = LeftOut(self._chat)
        self._lead = _leading_tokens(tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenise one row with the columns that are read.

        Returns:
            `input_ids`, `labels` (-100 where nothing is learned), `prompt_length`, the tokens before the last answer,
            its `answer_text`, whether the example was `truncated`, whether the row is `answered`, which otherwise
            teaches nothing, and `remarks` as text.

        Raises:
            ValueError: if a cell is not what its column should hold, or the chat template refuses the row.
            BadRequest: if the row is a chat and the tokenizer has no chat template.
        """
        return self.example(self.read(row))

    def read(self, row: Mapping[str, Any]) -> RowText:
        """The whole text of a row, which `example` cuts. Raises as the encoder."""
        row = {name: without_filler(row[name], self._features.get(name)) for name in self._names}
        prompt, answer = prompt_and_answer(row, self._names)
        if not isinstance(answer, list):
            if self.accepts_prompts and prompt.strip() and not answer.strip():
                return self._prompt_alone(self._tokens_of(prompt))
            return self._plain(prompt, answer)
        if not self.tokenizer.chat_template:
            raise BadRequest(
                "The data set holds chat messages, but the tokenizer has no chat template;", "add one to it."
            )
        tools = tools_of(row, self._names)
        if self.accepts_prompts and prompt and (not answer or is_blank(answer[-1])):
            return self._prompt_alone(self._chat_tokens(self._chat.render([*prompt, *answer[:-1]], tools, True)))
        if not self._all_turns:
            text = "".join(message.get("content") or "" for message in answer)
            found = RowText() if not answer or is_blank(answer[-1]) else self._last_turn(prompt, answer, tools, text)
            found.notes += [(OTHERS, own["role"]) for own in answer if found.learned and own["role"] != "assistant"]
        else:
            first = 0 if self._names[0] == "messages" else len(prompt)
            found, text = self._each_turn([*prompt, *answer], first, tools), ""
        found.answer = text
        if has_two_systems(row, self._names):
            found.notes.append((SYSTEM, ""))
        return found

    def example(self, found: RowText, length: int | None = None) -> dict[str, Any]:
        """What a text becomes, as the encoder gives it, cut to a length, the longest one by default.

        The answer asked for is the last one that is left.
        """
        tokens = found.tokens
        kept = tokens[: self.max_length if length is None else length]
        labels = [IGNORED] * len(kept)
        for start, end in found.learned:
            labels[start:end] = kept[start:end]
        left = [answer for answer in found.answers if answer[0] < len(kept)] or found.answers[:1] or [(0, found.answer)]
        is_answered = found.is_prompt or any(label != IGNORED for label in labels[1:])
        return {
            "input_ids": kept,
            "labels": labels,
            "prompt_length": left[-1][0],
            "truncated": len(kept) < len(tokens),
            "answer_text": left[-1][1],
            "answered": is_answered,
            "remarks": as_text(found.notes),
        }

    def _prompt_alone(self, tokens: list[int]) -> RowText:
        """A prompt, an example where it leaves room for an answer. Some tokenizers end any text with end-of-text."""
        while tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return RowText(tokens, answers=[(len(tokens), "")], is_prompt=0 < len(tokens) < self.max_length)

    def _plain(self, prompt: str, answer: str) -> RowText:
        if not answer.strip():
            return RowText(answer=answer)
        tokens = self._tokens_of(prompt + answer)
        start = common_prefix(self._tokens_of(prompt), tokens)
        control = [(CONTROL, token) for token in self._control.inside(prompt + answer)]
        found = RowText(tokens, [(start, len(tokens))], [(start, answer)], control, text=prompt + answer)
        return self._ended(found)

    def _last_turn(
        self, prompt: list[Message], answer: list[Message], tools: list[Message] | None, answer_text: str
    ) -> RowText:
        """A conversation of which all that follows the prompt is learned."""
        messages = [*prompt, *answer]
        text = self._chat.render(messages, tools)
        tokens, notes = self._chat_tokens(text), self._remarks(messages, tools, text)
        before = self._chat.attempt(prompt, tools, prompts=True) if prompt else None
        start = common_prefix(self._chat_tokens(before), tokens) if before else 0
        if before is None or not text.startswith(before):
            head = opening(self._chat, messages, len(prompt), tools)
            start = max(start, common_prefix(self._chat_tokens(head), tokens))
            notes += [(PROMPT, "")] if prompt else []
        words = self._words(tokens[start:])
        if not words and not answer_text.strip():  # the template leaves out the calls that are all of the answer
            return RowText(notes=notes)
        called = any(message.get("tool_calls") for message in answer)
        answers = [(start, words if called else answer_text)]
        found = RowText(tokens, [(start, len(tokens))], answers, notes, text=text, messages=messages, tools=tools)
        return self._ended(found)

    def _each_turn(self, messages: list[Message], first: int, tools: list[Message] | None) -> RowText:
        """A conversation of which each answer from the message `first` on is learned; what follows the last is cut."""
        turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        filled = [i for i in turns if not is_blank(messages[i])]
        blanks = [(BLANK, "")] * (len(turns) - len(filled))
        if not filled:
            return RowText(notes=blanks)
        *earlier, last = filled
        text = "".join(messages[last].get("content") or "")
        found = self._last_turn(messages[:last], [messages[last]], tools, text)
        if not found.tokens and earlier:
            left = self._each_turn(messages[: earlier[-1] + 1], first, tools)
            left.notes += [*found.notes, *[(BLANK, "")] * sum(i > earlier[-1] for i in turns)]
            return left
        found.notes += blanks
        if not found.tokens:
            return found
        if not blanks and self._learn_marked(found, messages[: last + 1], first, tools):
            return found
        return self._learn_spans(found, messages[: last + 1], earlier, tools) if earlier else found

    def _learn_marked(self, found: RowText, messages: list[Message], first: int, tools: list[Message] | None) -> bool:
        """Learn what the template marks, and the end of text, in place of the last answer; whether there are marks."""
        spans = self._chat.marked_spans(messages, tools)
        if not spans:
            return False
        begin = 0
        if first:
            before = self._chat.attempt(messages[:first], tools, prompts=True)
            before = opening(self._chat, messages, first, tools) if before is None else before
            begin = common_prefix(self._chat_tokens(before), found.tokens)
        runs = self._token_spans(self._chat.render(messages, tools), spans)
        runs = [(max(start, begin), end) for start, end in runs if end > begin]
        count = len(found.tokens)
        found.learned = [*runs, (max(found.learned[-1][0], count - 1), count)]  # the end of text, marked or not
        earlier = ((start, self._words(found.tokens[start:end])) for start, end in runs[:-1])
        found.answers = [*earlier, *found.answers]
        return True

    def _learn_spans(
        self, found: RowText, messages: list[Message], earlier: list[int], tools: list[Message] | None
    ) -> RowText:
        """Learn earlier answers too, as far as they can be told from what stands around them."""
        text = self._chat.render(messages, tools)
        spans = [find_turn(self._chat, messages, i, tools, text) for i in earlier]
        known = [span for span in spans if span is not None]
        spoken = [
            (start, end, words)
            for start, end in self._token_spans(text, [(span.start, span.end) for span in known])
            if (words := self._words(found.tokens[start:end]))
        ]
        found.learned = [*((start, end) for start, end, _ in spoken), *found.learned]
        found.answers = [*((start, words) for start, _, words in spoken), *found.answers]
        found.notes += [(BLANK, "")] * (len(known) - len(spoken))
        found.notes += [(UNLEARNED, "")] if len(known) < len(spans) else []
        found.notes += [(TURNS, "")] if not all(span.nested for span in known) else []
        return found

    def _token_spans(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The tokens that characters of a conversation are in; one that a span shares with others belongs to it.

        Where a tokenizer's offsets leave white space out, a token of nothing else has both of them behind it.
        """
        if not self.tokenizer.is_fast:
            tokens = self._chat_tokens(text)
            return [
                (
                    common_prefix(self._chat_tokens(text[:start]), tokens),
                    common_prefix(self._chat_tokens(text[:end]), tokens),
                )
                for start, end in spans
            ]
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        count = len(offsets)
        return [
            (
                next((i for i, (_, until) in enumerate(offsets) if until > start), count),
                next((i for i, (begin, until) in enumerate(offsets) if begin >= end and until > end), count),
            )
            for start, end in spans
        ]

    def _remarks(self, messages: list[Message], tools: list[Message] | None, text: str) -> list[Remark]:
        found = [(LEFT_OUT, part) for part in self._left_out(messages, tools, text)]
        found += [(CONTROL, token) for token in self._control.among([*messages, *(tools or [])])]
        twice = any(own in text for own in _quoted(messages))
        return found + ([(ARGUMENTS, "")] if twice else [])

    def _words(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _tokens_of(self, text: str) -> list[int]:
        """The tokens of plain text. What it begins with itself is not put before it a second time."""
        tokens, lead = self.tokenizer(text)["input_ids"], self._lead
        return tokens[len(lead) :] if lead and tokens[len(lead) : 2 * len(lead)] == lead else tokens

    def _chat_tokens(self, text: str) -> list[int]:
        """The tokens of what a chat template has made, which says all there is to say."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ended(self, found: RowText) -> RowText:
        """The same, with end-of-text as the last token, and learned."""
        start, count = found.learned[-1]
        if start < count:
            found.tokens = _end_with_eos(found.tokens, self.tokenizer)
            found.learned[-1] = (start, len(found.tokens))
        return found


def _quoted(messages: list[Message]) -> list[str]:
    """How arguments of calls that are JSON text look where they are written as JSON once more."""
    calls = [call for message in messages for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    given = [(call.get("function") or call).get("arguments") for call in calls]
    return [json.dumps(own, ensure_ascii=False) for own in given if isinstance(own, str) and own.startswith("{")]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before any text, such as its beginning-of-text token."""
    alone, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(alone)] == alone), [])


def _end_with_eos(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make end-of-text the last token; white space that a chat template leaves behind it is dropped."""
    eos = tokenizer.eos_token_id
    if eos in tokens:
        last = len(tokens) - 1 - tokens[::-1].index(eos)
        if not str(tokenizer.decode(tokens[last + 1 :])).strip():
            return tokens[: last + 1]
    return [*tokens, eos]
