"""Which bytes of a text each of its tokens stands for."""

import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...utils.errors import BadRequest

Span = tuple[int, int]
"""From which byte of a text in UTF-8, or character of it, up to which."""

_BYTES = {sign: number for number, sign in bytes_to_unicode().items()}

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def byte_positions(text: str) -> Sequence[int]:
    """Where each character of a text begins in its bytes, and where the last one ends."""
    if text.isascii():
        return range(len(text) + 1)
    return list(accumulate((len(sign.encode("utf-8", "surrogatepass")) for sign in text), initial=0))


class TokenSpans:
    """Tells of each token of a text which bytes it stands for.

    A tokenizer gives the characters. Where several tokens share one, as those of an emoji, each gets its own bytes of
    it. White space that its offsets leave out belongs to the token that holds it, and marks that are composed with the
    character before them to that character's. A token that stands for nothing of the text, as those that a tokenizer
    puts around it, has an empty span.

    Args:
        tokenizer: gives offsets.
        role: whose it is, `teacher` or `student`, for the message.

    Raises:
        BadRequest: if the tokenizer is a slow one, which has no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise BadRequest(
                f"The {role}'s tokenizer, a {kind}, does not tell which characters its tokens stand for, and "
                "the tokens of teacher and student differ;",
                f"name a {role} with a fast tokenizer (a tokenizer.json).",
            )
        self._tokenizer = tokenizer
        state = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        parts = [state.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
        self._is_byte_level = '"ByteLevel"' in json.dumps(parts)
        self._pieces: dict[int, bytes] = {}
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

    def __call__(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """The tokens of a text, and the bytes of it that each of them stands for, in order."""
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        for token in set(ids) - self._pieces.keys():
            self._pieces[token] = self._piece(token)
        return ids, exact_spans(text, encoded["offset_mapping"], [self._pieces[token] for token in ids])

    def vocabulary(self) -> dict[bytes, int]:
        """The token that stands for some bytes; of several a piece of its own before a single byte."""
        named = self._tokenizer.get_vocab()
        ordered = sorted(named, key=lambda name: (_FALLBACK.fullmatch(name) is None, -named[name]))
        return {self._piece(named[name], name): named[name] for name in ordered}

    def _piece(self, token: int, name: str | None = None) -> bytes:
        """What a token stands for, as far as that can be told from itself."""
        if token in self._added:
            return self._added[token].encode()
        piece = cast(str, self._tokenizer.convert_ids_to_tokens(token)) if name is None else name
        if self._is_byte_level and all(sign in _BYTES for sign in piece):
            return bytes(_BYTES[sign] for sign in piece)
        if (byte := _FALLBACK.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8", "surrogatepass")


def exact_spans(text: str, offsets: Sequence[Span], pieces: Sequence[bytes]) -> list[Span]:
    """The bytes of a text that its tokens stand for.

    Args:
        text: the whole text.
        offsets: characters of each token, as a tokenizer gives them.
        pieces: what each token stands for by itself; where that does not fit to the text the offsets decide.
    """
    at = byte_positions(text)
    spans = [(at[start], at[end]) for start, end in _with_marks(text, offsets)]
    spans = _with_white_space(text.encode("utf-8", "surrogatepass"), spans, pieces)
    first = 0
    while first < len(spans):
        last = first
        while last + 1 < len(spans) and spans[last + 1][0] < spans[last][1]:
            last += 1
        if last > first:
            spans[first : last + 1] = _shared_out(spans[first : last + 1], pieces[first : last + 1])
        first = last + 1
    return spans


def _with_marks(text: str, offsets: Sequence[Span]) -> list[Span]:
    """The characters of each token, with what a normaliser has composed with the last of them."""
    found, following = [], len(text)
    for start, end in reversed(offsets):
        if start < end:
            while end < following and _is_composed(text[end]):
                end += 1
            following = start
        found.append((start, end))
    return found[::-1]


def _is_composed(sign: str) -> bool:
    """Whether a character may become one with that before it: a mark, or a vowel or end of a Korean syllable."""
    return unicodedata.category(sign)[0] == "M" or "\u1160" <= sign <= "\u11ff"


def _with_white_space(text: bytes, spans: Sequence[Span], pieces: Sequence[bytes]) -> list[Span]:
    """The spans of tokens, each with the white space around it that it holds and its offsets leave out."""
    found, before = [], 0
    for (start, end), piece in zip(spans, pieces, strict=True):
        lacking = len(piece) - (end - start)
        if lacking > 0 and start >= before:
            gap = text[before:start]
            leading = min(lacking, len(piece) - len(piece.lstrip()), len(gap) - len(gap.rstrip()))
            start -= leading
            rest = text[end : end + lacking - leading]
            end += min(len(piece) - len(piece.rstrip()), len(rest) - len(rest.lstrip())) if start < end else 0
        start, end = (start, end) if start < end else (before, before)
        found.append((start, end))
        before = max(before, end)
    return found


def _shared_out(spans: Sequence[Span], pieces: Sequence[bytes]) -> list[Span]:
    """The bytes of some characters, dealt out to the tokens that share them; as they are where these do not fit.

    A tokenizer may put a space before a text that has none there: its token then stands for nothing.
    """
    start, end = spans[0][0], spans[-1][1]
    sizes = [len(piece) for piece in pieces]
    if sum(sizes) - 1 == end - start and pieces[0][:1] == b" ":
        sizes[0] -= 1
    if sum(sizes) != end - start:
        return list(spans)
    places = list(accumulate(sizes, initial=start))
    return list(pairwise(places))
