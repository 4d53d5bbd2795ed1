"""The student's own answers of the first generation, beside what it answers after the training."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict

from ...utils.redaction import without_secrets

_BEGINNING, _END = 240, 150
"""Characters that are kept of a longer text: it matters how it begins and how it ends."""


@strict
@dataclass
class RolloutPair:
    """A prompt of the training data with the first and the last answer of the student, as `excerpt` cuts them.

    The answers have their end-of-text token, where they ended.
    """

    prompt: str
    first: str
    last: str


def excerpt(text: str) -> str:
    """The beginning and the end of a text, or all of one of a few hundred characters; without secrets."""
    text = without_secrets(text)  # half of one would not be found any more
    cut = f"{text[:_BEGINNING]} [...] {text[-_END:]}"
    return cut if len(cut) < len(text) else text
