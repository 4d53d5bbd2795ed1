"""What two renderings of one conversation, each by a model's own template, have in common."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..rows.template import ChatTemplate, Message
from ..rows.turns import common_prefix
from .spans import Span, byte_positions

_MARK = "\ue000\ue001"
"""Stands for the words of a message; no text has it."""


class Place(NamedTuple):
    """Which characters of a rendering are the words of a message, and which of these they begin with."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Rendering:
    """The text that a model reads, and where in it the words of each message are."""

    text: str
    words: Mapping[int, Place] = field(default_factory=dict)
    """By the number of the message; they are in order and apart."""
    controls: tuple[str, ...] = ()
    """What the tokenizer reads as control tokens, the longest first."""
    begin: str | None = None
    """That of them which a text begins with, if any."""


class Part(NamedTuple):
    """Bytes of a rendering and where they are in the text that both have in common.

    Of a control token that another one stands for there is no telling which bytes are which: all stand for all.
    """

    start: int
    end: int
    common_start: int
    common_end: int


def find_words(
    chat: ChatTemplate, messages: Sequence[Message], tools: list[Message] | None, text: str
) -> dict[int, Place]:
    """Where the words of each message are in a rendered conversation, as far as that can be told for certain.

    Each message is rendered once more with other words in its place: what stays is the template's own.
    """
    found: dict[int, Place] = {}
    behind_last = 0
    for index, message in enumerate(messages):
        words = message.get("content")
        if not isinstance(words, str) or not words.strip():
            continue
        shown = chat.attempt([*messages[:index], {**message, "content": _MARK}, *messages[index + 1 :]], tools)
        if shown is None or shown.count(_MARK) != 1:
            continue
        before, behind = shown.split(_MARK)
        start, end = len(before), len(text) - len(behind)
        if not (behind_last <= start < end and text.startswith(before) and text.endswith(behind)):
            continue
        if (offset := words.rfind(text[start:end])) >= 0:  # a template may leave out how they begin or end
            found[index], behind_last = Place(start, end, offset), end
    return found


def shared_parts(
    student: Rendering, teacher: Rendering, messages: Sequence[tuple[str, str]]
) -> tuple[list[Part], list[Part]]:
    """The parts of two renderings that say the same.

    The words of a message are the same text in both. What stands between them is the templates' own: there the same
    text at either end counts, and of the rest control tokens and the name of the role, by what they are for.

    Args:
        student: what the student reads.
        teacher: what the teacher reads.
        messages: role and words of each message.
    """
    sides, places = (student, teacher), tuple(byte_positions(side.text) for side in (student, teacher))
    found: tuple[list[Part], list[Part]] = ([], [])
    base, cursors = 0, [0, 0]

    def add(spans: Sequence[Span], starts: Sequence[int] | None = None) -> int:
        """Note one part of each side, in characters; how many bytes of the common text it takes at most."""
        sizes = [at[end] - at[start] for at, (start, end) in zip(places, spans, strict=True)]
        for own, at, (start, end), size, offset in zip(found, places, spans, sizes, starts or (0, 0), strict=True):
            length = size if starts is not None else max(sizes)
            own.append(Part(at[start], at[end], base + offset, base + offset + length))
        return max(sizes)

    common = [index for index in student.words if index in teacher.words]
    for number, index in enumerate([*common, None]):
        stops = [len(side.text) if index is None else side.words[index].start for side in sides]
        gaps = [side.text[cursor:stop] for side, cursor, stop in zip(sides, cursors, stops, strict=True)]
        role = "" if index is None else messages[index][0]
        for matched in _alike(gaps, sides, role, begins=number == 0):
            base += add([(cursor + a, cursor + b) for cursor, (a, b) in zip(cursors, matched, strict=True)])
        if index is not None:
            words, at = [side.words[index] for side in sides], byte_positions(messages[index][1])
            add([(place.start, place.end) for place in words], [at[place.offset] for place in words])
            base, cursors = base + at[-1], [place.end for place in words]
    return found


def in_common(spans: Sequence[Span], parts: Sequence[Part]) -> list[Span]:
    """Where tokens are in the text that two renderings have in common; an empty span for one that is in none of it.

    Of a token that reaches from one part into another, which do not touch in the other rendering, the first counts.

    Args:
        spans: bytes of each token.
        parts: of the rendering that they are of, see `shared_parts`.
    """
    starts, found = [part.start for part in parts], []
    for start, end in spans:
        whole: Span | None = None
        for part in parts[max(bisect_right(starts, start) - 1, 0) :] if start < end else ():
            if part.start >= end or (whole is not None and part.common_start != whole[1]):
                break
            if (own := _moved(max(start, part.start), min(end, part.end), part)) is not None:
                whole = own if whole is None else (whole[0], own[1])
        found.append(whole or (0, 0))
    return found


def _moved(start: int, end: int, part: Part) -> Span | None:
    """Where some bytes of a part are in the common text; None where there are none."""
    if start >= end:
        return None
    if part.end - part.start != part.common_end - part.common_start:
        return part.common_start, part.common_end
    return start + part.common_start - part.start, end + part.common_start - part.start


def _alike(gaps: Sequence[str], sides: Sequence[Rendering], role: str, begins: bool) -> list[tuple[Span, Span]]:
    """Which characters of what two templates write between the words of two messages are the same, in order.

    Args:
        gaps: what the student's and the teacher's template write.
        sides: the renderings that they are of.
        role: of the message that follows.
        begins: whether no message is before it.
    """
    marks = [_controls(gap, side.controls) for gap, side in zip(gaps, sides, strict=True)]
    before = _common(gaps, marks)
    if gaps[0] != gaps[1]:  # a space belongs to the word behind it, which is another one
        before = len(gaps[0][:before].rstrip(" "))
    turned = [[(len(gap) - b, len(gap) - a) for a, b in own] for gap, own in zip(gaps, marks, strict=True)]
    behind = min(_common([gap[::-1] for gap in gaps], turned), min(map(len, gaps)) - before)
    middles = [(before, len(gap) - behind) for gap in gaps]
    left = [
        [(a, b) for a, b in own if a >= start and b <= end] for own, (start, end) in zip(marks, middles, strict=True)
    ]
    found = [((0, before), (0, before))] if before else []
    if all(left) and _closes(gaps, sides, left, begins, before):
        found.append((left[0][0], left[1][0]))
        left = [own[1:] for own in left]
    names = [gap.rfind(role, start, end) if role else -1 for gap, (start, end) in zip(gaps, middles, strict=True)]
    names = [-1 if found and name < found[-1][side][1] else name for side, name in enumerate(names)]
    limits = [name if min(names) >= 0 else len(gap) for name, gap in zip(names, gaps, strict=True)]
    opening = [[own for own in side if own[1] <= limit] for side, limit in zip(left, limits, strict=True)]
    if role and all(opening):
        found.append((opening[0][-1], opening[1][-1]))
    if min(names) >= 0:
        found.append(((names[0], names[0] + len(role)), (names[1], names[1] + len(role))))
    return [*found, ((middles[0][1], len(gaps[0])), (middles[1][1], len(gaps[1])))] if behind else found


def _closes(
    gaps: Sequence[str], sides: Sequence[Rendering], left: Sequence[Sequence[Span]], begins: bool, before: int
) -> bool:
    """Whether the first control tokens that are left end the same turn, or begin the text."""
    if not begins:
        return before == 0 or not gaps[0][:before].strip()
    firsts = [(gap[slice(*own[0])], own[0][0], side.begin) for gap, own, side in zip(gaps, left, sides, strict=True)]
    return all(text == begin and start == 0 for text, start, begin in firsts)


def _controls(text: str, controls: Sequence[str]) -> list[Span]:
    """Where in a text control tokens are."""
    if not controls:
        return []
    return [found.span() for found in re.finditer("|".join(map(re.escape, controls)), text)]


def _common(texts: Sequence[str], marks: Sequence[Sequence[Span]]) -> int:
    """How many characters two texts begin with in common, without breaking a word or a control token of either."""
    length, before = common_prefix(*texts), -1
    while length != before:
        before = length
        if any(_breaks_word(text, length) for text in texts):
            while length and texts[0][length - 1].isalnum():
                length -= 1
        length = min([length, *(start for own in marks for start, end in own if start < length < end)])
    return length


def _breaks_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()
