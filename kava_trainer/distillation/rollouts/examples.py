"""Rollouts as examples: what of an example of the data is its prompt, and what of a rollout is learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.formats import ASKED, IGNORED, SAMPLED, WRITTEN

Example = dict[str, Any]
"""`input_ids`, `labels` and `origins` [T] for the collators, and `teacher_states` [T, d_t] by layer if it has any."""

REPEATED_TOKENS = 4
"""So many tokens in a row that stood in an answer before count as repeated."""


@dataclass(frozen=True)
class Rollout:
    """A prompt, and what the student answered."""

    prompt: list[int]
    answer: list[int]
    """With the end-of-text token, where it was sampled."""
    ended: bool
    """Whether it was; else the answer reached the limit."""

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return len(self.answer) <= int(self.ended)

    def as_example(self) -> Example:
        """Tokens of which those of the answer are labels, and whose each of them is."""
        asked, answer = len(self.prompt), torch.tensor(self.answer, dtype=torch.long)
        return {
            "input_ids": torch.cat([torch.tensor(self.prompt, dtype=torch.long), answer]),
            "labels": torch.cat([torch.full((asked,), IGNORED), answer]),
            "origins": torch.tensor([ASKED] * asked + [SAMPLED] * len(answer)),
        }

    def repetition(self) -> float:
        """The share of its runs of `REPEATED_TOKENS` tokens that stood in it before."""
        count = len(self.answer) - REPEATED_TOKENS + 1
        runs = {tuple(self.answer[i : i + REPEATED_TOKENS]) for i in range(max(count, 0))}
        return 1 - len(runs) / count if count > 0 else 0.0


def rollout_of(prompt: Sequence[int], generated: Sequence[int], end_tokens: Sequence[int]) -> Rollout:
    """A rollout from what was generated, of which nothing counts behind the first end-of-text token."""
    answer = list(generated)
    end = next((place for place, token in enumerate(answer) if token in end_tokens), None)
    return Rollout(list(prompt), answer if end is None else answer[: end + 1], end is not None)


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    """The tokens before the first label, at least one; all of an example without labels."""
    learned = (example["labels"][1:] != IGNORED).nonzero().flatten()
    tokens: list[int] = example["input_ids"].tolist()
    return tokens[: int(learned[0]) + 1] if len(learned) else tokens


def of_the_data(example: Example) -> Example:
    """An example of the data, which says that it is one."""
    return {**example, "origins": torch.full_like(example["input_ids"], WRITTEN)}


def without_answer(example: Example) -> Example:
    """The prompt of an example, of which nothing is learned, with the teacher's states on it."""
    alone = prompt_alone(prompt_of(example))
    if "teacher_states" in example:
        length = len(alone["input_ids"])
        alone["teacher_states"] = {layer: own[:length] for layer, own in example["teacher_states"].items()}
    return alone


def prompt_alone(prompt: Sequence[int]) -> Example:
    """A prompt of which nothing is learned."""
    return Rollout(list(prompt), [], ended=False).as_example()
