"""The documents, and the blocks of code in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from helpers.places import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

MARKS = {
    "quickstart": "the two commands of README.md, which .ci/run runs as they stand there",
    "ci": "what .ci/run does",
    "needs-gpu": "",
    "needs-cluster": "",
    "needs-hub": "a hub to write to; a fake one is in the hub's own tests",
    "needs-network": "something that is downloaded",
    "needs-model": "a model that is not in the repository",
    "needs-harness": "lm-evaluation-harness, which the tests do not install",
    "message": "what KAVA says; `...` stands for what differs",
    "output": "what something else prints or writes",
}
"""What may stand behind the language of a block, and what the block then needs or is. Blocks without a mark are run."""


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    marks: frozenset[str]
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block; `a && b` are two."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [part for line in words for part in _parts(line) if part]


def _parts(words: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document in these languages, all by default."""
    fences = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    found = [Block(language, frozenset(marks.split()), text.strip()) for language, marks, text in fences]
    return [block for block in found if not languages or block.language in languages]
