"""What is to be told of rows although they can be used: counted over a data set, with the places of the first ones."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...utils.errors import Problem
from ..row_locations import locate_rows
from .template import control_tokens

LEFT_OUT, CONTROL, SYSTEM, ARGUMENTS, PROMPT, TURNS, UNLEARNED, BLANK, OTHERS = (
    "left out", "control", "system", "arguments", "prompt", "turns", "unlearned", "blank", "others",
)  # fmt: skip
"""The kinds of remarks; some have a detail, and stand once for each of these."""

Remark = tuple[str, str]
"""A kind and a detail."""

Found = dict[str, dict[str, list[int]]]
"""By kind and detail the rows, from 0 and rising; a row is there as often as it has the remark."""

_TOLD = {
    LEFT_OUT: (
        "In {rows} the chat template leaves out what the data holds: {details}. {where}.",
        "Give the tokenizer a chat_template that reads it, or leave it out of the data.",
    ),
    CONTROL: (
        "In {rows} control tokens stand in the text ({details}), which the models do not read as text. {where}.",
        "Take them out where they are not meant to steer the models.",
    ),
    SYSTEM: (
        "In {rows} the messages begin with a system message of their own, so the column system is not read. {where}.",
        "Leave one of the two out.",
    ),
    ARGUMENTS: (
        "In {rows} the arguments of tool calls are JSON text, which the chat template writes as JSON a second time. "
        "{where}.",
        "Write the arguments as an object in place of its text.",
    ),
    PROMPT: (
        "In {rows} the chat template's generation prompt is not what its answers begin with. What is learned begins "
        "behind what they do begin with. {where}.",
        "Generate with that beginning, or give the tokenizer a chat_template whose generation prompt is the same.",
    ),
    TURNS: (
        "In {rows} the chat template writes earlier turns otherwise than last ones, so where they begin and end was "
        "found by putting other words in their place. {where}.",
        "Look at the learned tokens that doctor marks, or give the tokenizer a chat_template with generation marks.",
    ),
    UNLEARNED: (
        "In {rows} assistant messages cannot be found in what the chat template makes of them, and are not learned. "
        "{where}.",
        "Give the tokenizer a chat_template with generation marks.",
    ),
    BLANK: (
        "In {rows} assistant messages are empty and teach nothing, {count} in all. {where}.",
        "Write an answer there, or leave them out.",
    ),
    OTHERS: (
        "In {rows} the completion holds messages of the role {details}, which are learned as the assistant's are. "
        "{where}.",
        "Write assistant_turns all, which learns the assistant's messages alone, or move the others into the prompt.",
    ),
}


def as_text(remarks: Iterable[Remark]) -> str:
    """Remarks as one cell of a table; nothing for none."""
    listed = sorted(remarks)
    return json.dumps(listed) if listed else ""


def gather(cells: Iterable[str], first: int = 0) -> Found:
    """What is remarked on rows, given as `as_text`; the number of the first row may be another than 0."""
    found: Found = {}
    for row, cell in enumerate(cells, start=first):
        for kind, detail in json.loads(cell) if cell else ():
            found.setdefault(kind, {}).setdefault(detail, []).append(row)
    return found


def remark_problems(found: Found, name: str, which: str, total: int) -> list[Problem]:
    """A sentence for each kind of remark, with what to do about it.

    Args:
        found: the remarks, on rows as `locate_rows` counts them.
        name: of the data set.
        which: examples these are: `training` or `held-out`.
        total: how many rows were looked at.
    """
    problems = []
    for kind, (what, remedy) in _TOLD.items():
        for details, named in _sentences(kind, found.get(kind, {})).items():
            rows = sorted(set(named))
            where = locate_rows(name, rows)
            told = {"details": details, "where": where[0].upper() + where[1:], "count": len(named)}
            problems.append(Problem(None, what.format(rows=f"{len(rows)} of {total} {which} rows", **told), remedy))
    return problems


def _sentences(kind: str, found: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The rows of each sentence: one for all control tokens, and one for each part that is left out."""
    if kind == CONTROL and found:
        return {", ".join(sorted(found)): [row for rows in found.values() for row in rows]}
    return dict(found)


class ControlTokens:
    """Finds the control tokens of a tokenizer in text, where it reads them as such.

    Args:
        tokenizer: of both models.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = () if getattr(tokenizer, "split_special_tokens", False) else control_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._first, self._last = tokenizer.bos_token, tokenizer.eos_token

    def inside(self, text: str) -> set[str]:
        """Those within a text, but for a first token that it begins with and a last one that it ends with."""
        text = text.removeprefix(self._first) if self._first else text
        return set(self._pattern.findall(text.removesuffix(self._last) if self._last else text))

    def among(self, value: Any) -> set[str]:
        """Those in any text within lists and objects."""
        if isinstance(value, str):
            return set(self._pattern.findall(value))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set().union(*map(self.among, parts))
