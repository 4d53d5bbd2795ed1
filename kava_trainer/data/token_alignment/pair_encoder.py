"""One row becomes one example for a student and a teacher that read it in different tokens."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from ...utils.errors import BadRequest
from ..rows.encoder import Encoder, RowText
from ..rows.template import ChatTemplate, control_tokens
from ..rows.turns import common_prefix
from .ranges import NONE, OF_TEACHER, RANGES, count_kinds, of_teacher, overlapping, renamed
from .shared_text import Place, Rendering, find_words, in_common, shared_parts
from .spans import Span, TokenSpans

VERSION = 2
"""Part of the key of tokenised data sets; raised whenever the same texts are aligned in another way."""

COUNTS = "teacher_alignment"
"""How many of the student's tokens are aligned in each of the `KINDS`."""

_READ = ("input_ids", "labels", "prompt_length")

PAIR_FEATURES = Features(
    {
        "teacher_input_ids": List(Value("int32")),
        "teacher_labels": List(Value("int64")),
        "teacher_prompt_length": Value("int64"),
        RANGES: List(List(Value("int32"))),
        COUNTS: List(Value("int64")),
    }
)


def tokenizers_agree(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether every token has the same id in both, so that both models can read the same ids.

    Sizes are not compared: embeddings are often padded beyond the tokenizer's last id.
    """
    return first.get_vocab() == second.get_vocab()


TeacherTokenizers = PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None
"""The tokenizer of a teacher, or those of several, of which None stands for the student's own."""


def tokenizers_given(given: TeacherTokenizers) -> list[PreTrainedTokenizerBase | None]:
    """The tokenizers of the teachers one by one; a single one is that of one teacher."""
    return [*given] if isinstance(given, list | tuple) else [cast(PreTrainedTokenizerBase | None, given)]


def of_other_tokens(
    student: PreTrainedTokenizerBase, teachers: TeacherTokenizers
) -> dict[int, PreTrainedTokenizerBase]:
    """The tokenizers of those teachers whose tokens are others than the student's, by their numbers from 0."""
    found = enumerate(tokenizers_given(teachers))
    return {number: own for number, own in found if own is not None and not tokenizers_agree(student, own)}


@dataclass(frozen=True)
class TeacherReading:
    """How a teacher reads the text, where its tokens are others than the student's."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    """The most tokens that the teacher reads; what is behind them is left out."""
    causal: bool = False
    """Whether a token is compared with those of the teacher's alone that end where it ends, or before."""

    def key(self, content: str) -> str:
        """A hash of what decides on the tokens and the alignment, beside that of what the student reads."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str()) if self.tokenizer.is_fast else {}
        names = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        text = [state | {"truncation": None, "padding": None}, str(self.tokenizer.chat_template), names]
        parts = [VERSION, content, text, self.max_length, *(["causal"] if self.causal else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


Readings = Mapping[int, TeacherReading]
"""How those teachers read the text whose tokens are others than the student's, by their numbers from 0."""


NO_READINGS: Readings = MappingProxyType({})


def readings_key(readings: Readings, content: str) -> str:
    """A hash of what decides on the tokens and the alignment with every teacher, beside what the student reads."""
    for number, reading in sorted(readings.items()):
        content = reading.key(content if number == 0 else f"{content} {number}")
    return content


def counts_column(number: int) -> str:
    """Where the `COUNTS` of a teacher stand in an example."""
    return of_teacher(number) + COUNTS.removeprefix(OF_TEACHER)


def pair_features(readings: Readings) -> dict[str, Any]:
    """The columns of what the teachers read, with their types."""
    return {name: kind for number in readings for name, kind in renamed(PAIR_FEATURES, number).items()}


class PairEncoder:
    """Turns rows into examples that say too what the teacher reads of them, and how the tokens belong together.

    Both models read the same text, each with its own tokens and, of a conversation, with its own chat template. The
    teacher's tokens end where the student's text is cut.

    Args:
        student: encodes for the student.
        teacher: encodes for the teacher, of any length.
        reading: of the teacher.

    Raises:
        BadRequest: if one of the tokenizers does not tell which characters its tokens stand for.
    """

    def __init__(self, student: Encoder, teacher: Encoder, reading: TeacherReading) -> None:
        self._encoders, self._causal = (student, teacher), reading.causal
        self.max_length, self._most = student.max_length, reading.max_length
        self.accepts_prompts = student.accepts_prompts
        self._sides = _Side(student, "student"), _Side(teacher, "teacher")

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenise one row for both.

        Returns:
            What the student's encoder gives; `teacher_input_ids`, `teacher_labels` and `teacher_prompt_length`, what
            the teacher reads; `teacher_ranges` [T, 2], from which of its tokens up to which each of the student's is
            aligned with, zeros where it is with none, or where the reading is causal [T, 3], up to which of them it is
            compared with too; and `teacher_alignment`, how many are in each of the `KINDS`.

        Raises:
            ValueError, BadRequest: as an encoder, for either of them.
        """
        found = self._encoders[0].read(row)
        example = self._encoders[0].example(found)
        if not example["answered"]:
            return {**example, **self._of_teacher(RowText(), 0), RANGES: [], COUNTS: [0, 0, 0]}
        other = self._read_by_teacher(row, found)
        ranges = self._ranges(found, other)[: len(example["input_ids"])]
        most = max((end for _, end, *_ in ranges), default=0) if example["truncated"] else len(other.tokens)
        most = max(most if self._most is None else min(most, self._most), 1)
        ranges = _before(ranges, most)
        counts = count_kinds(ranges)
        return {**example, **self._of_teacher(other, most), RANGES: [list(own) for own in ranges], COUNTS: counts}

    def _read_by_teacher(self, row: Mapping[str, Any], found: RowText) -> RowText:
        side = self._sides[1]
        if found.messages is not None and not side.tokenizer.chat_template:
            raise BadRequest(
                "The data set holds chat messages, but the teacher's tokenizer, which is not the student's, has no "
                "chat template;",
                "add one to it.",
            )
        try:
            other = self._encoders[1].read(row)
        except ValueError as error:
            raise ValueError(f"{error}, as the teacher is to read it") from error
        return other if other.tokens else RowText([side.end], text="")

    def _of_teacher(self, found: RowText, length: int) -> dict[str, Any]:
        example = self._encoders[1].example(found, length)
        return {OF_TEACHER + name: example[name] for name in _READ}

    def _ranges(self, found: RowText, other: RowText) -> list[tuple[int, ...]]:
        (own, own_spans), (their, their_spans) = (
            side.rendered(text) for side, text in zip(self._sides, (found, other), strict=True)
        )
        parts = shared_parts(own, their, _messages(found))
        return overlapping(in_common(own_spans, parts[0]), in_common(their_spans, parts[1]), self._causal)


def _before(ranges: list[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """The ranges without those behind a cut after so many tokens, and those in front that share a token with one.

    Such a token stands for text that was cut away too, so a span that ends with it does not end where it seems to.
    """
    kept = list(ranges)
    for place in reversed(range(len(kept))):
        start, end, *finished = kept[place]
        if end > most:
            kept[place], most = (*NONE, *(0 for _ in finished)), min(most, start)
    return kept


class SeveralPairs:
    """Turns rows into examples that say what each of several teachers reads of them.

    Args:
        encoders: one for each teacher with tokens of its own, by their numbers.
    """

    def __init__(self, encoders: Mapping[int, PairEncoder]) -> None:
        self._encoders = encoders
        first = next(iter(encoders.values()))
        self.max_length, self.accepts_prompts = first.max_length, first.accepts_prompts

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenise one row for all; what a teacher reads is named as `ranges.renamed` has it. Raises as one does."""
        example: dict[str, Any] = {}
        for number, encode in self._encoders.items():
            example |= renamed(encode(row), number)
        return example


AnyEncoder = Encoder | PairEncoder | SeveralPairs


def make_encoder(
    names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_turns: str = "last",
    features: Mapping[str, Any] | None = None,
    accepts_prompts: bool = False,
    readings: Readings = NO_READINGS,
) -> AnyEncoder:
    """What turns rows into examples: of one tokenizer, see `Encoder`, or with `readings` of teachers of others.

    Raises:
        BadRequest: as these.
    """
    student = Encoder(names, tokenizer, max_length, assistant_turns, features, accepts_prompts)
    pairs = {
        number: PairEncoder(student, Encoder(names, reading.tokenizer, sys.maxsize, assistant_turns, features), reading)
        for number, reading in readings.items()
    }
    if not pairs:
        return student
    return pairs[0] if [*pairs] == [0] else SeveralPairs(pairs)


def _messages(found: RowText) -> list[tuple[str, str]]:
    """Role and words of each message; plain text is all of one."""
    if found.messages is None:
        return [("", found.text)]
    return [(message["role"], message.get("content") or "") for message in found.messages]


class _Side:
    """What one of both models reads."""

    def __init__(self, encoder: Encoder, role: str) -> None:
        self.tokenizer = tokenizer = encoder.tokenizer
        self.end: int = tokenizer.eos_token_id
        self._spans, self._chat = TokenSpans(tokenizer, role), ChatTemplate(tokenizer)
        self._controls = control_tokens(tokenizer)
        self._begin = None if tokenizer.bos_token is None else str(tokenizer.bos_token)

    def rendered(self, found: RowText) -> tuple[Rendering, list[Span]]:
        """The text with the control tokens around it written out, and the bytes of it that each token stands for."""
        is_plain = found.messages is None
        ids, spans = self._spans(found.text, add_special_tokens=is_plain)
        skipped = next(i for i in range(len(ids) + 1) if _fits(ids[i:], found.tokens, self.end))
        kept = common_prefix(ids[skipped:], found.tokens)
        spans = spans[skipped : skipped + kept]
        lead = next((i for i, (start, end) in enumerate(spans) if start < end), len(spans))
        ends = kept < len(found.tokens) or (lead < kept and spans[-1][0] == spans[-1][1])
        around = [*found.tokens[:lead], *(found.tokens[-1:] if ends and len(found.tokens) > lead else [])]
        names = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in around]
        before, end = "".join(names[:lead]), "".join(names[lead:])
        written, size = [], 0
        for name in names[:lead]:
            written.append((size, size := size + len(name.encode())))
        inner = [(start + size, stop + size) for start, stop in spans[lead : len(found.tokens) - len(names[lead:])]]
        behind = size + len(found.text.encode("utf-8", "surrogatepass"))
        last = [(behind, behind + len(end.encode()))] if end else []
        words = {0: Place(len(before), len(before) + len(found.text), 0)} if is_plain else self._words(found)
        text = before + found.text + end
        return Rendering(text, words, self._controls, self._begin), [*written, *inner, *last]

    def _words(self, found: RowText) -> dict[int, Place]:
        return find_words(self._chat, found.messages or [], found.tools, found.text)


def _fits(ids: list[int], tokens: list[int], end: int) -> bool:
    """Whether some tokens are the first of others, but for an end-of-text token behind them."""
    kept = common_prefix(ids, tokens)
    return tokens[kept:] in ([], [end])
