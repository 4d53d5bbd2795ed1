"""Several teachers as one source of states, each of which reads the same text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...data.collators import StatesReaders
from ...data.token_alignment.ranges import seen_by
from ...models.attention.capture import Feature, of_teacher
from ...models.teacher import OnlineTeacher, TeacherSource
from ..teacher_cache import CachedTeacher
from .routing import shares_of_weights


class SeveralTeachers:
    """Teachers that read each batch one after the other, online or from a cache.

    What depends on one teacher alone is the first one's.

    Args:
        sources: one for each teacher.
        weights: of the teachers; equal by default. Only their proportions count.

    Raises:
        ValueError: if there are no sources, or not as many weights above 0.
    """

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.shares = shares_of_weights(weights, len(sources))
        """Weight of each teacher; they sum to 1."""
        self.hidden_size, self.num_layers = sources[0].hidden_size, sources[0].num_layers

    def features(self, inputs: Mapping[str, Any]) -> dict[Feature, torch.Tensor]:
        """What was asked of each teacher, by `capture.of_teacher`. They read the student's tokens."""
        return self.gathered(inputs, lambda source, own: source.features(own))

    def gathered(
        self,
        inputs: Mapping[str, Any],
        read: Callable[[TeacherSource, Mapping[str, Any]], Mapping[Feature, torch.Tensor]],
    ) -> dict[Feature, torch.Tensor]:
        """What `read` makes of each teacher and of what it reads of a batch, by `capture.of_teacher`."""
        return {
            of_teacher(number, feature): states
            for number, source in enumerate(self.sources)
            for feature, states in read(source, seen_by(inputs, number)).items()
        }

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of the first teacher's last hidden states [..., d_t]."""
        return self.sources[0].head(states)


def each_teacher(source: TeacherSource | None) -> list[TeacherSource]:
    """The teachers that a source stands for, one by one."""
    if source is None:
        return []
    return source.sources if isinstance(source, SeveralTeachers) else [source]


def teacher_weights(source: TeacherSource | None) -> list[float]:
    """The share of each of `each_teacher` in what is learned; they sum to 1."""
    return source.shares if isinstance(source, SeveralTeachers) else [1.0] * len(each_teacher(source))


def online_teachers(source: TeacherSource | None) -> list[OnlineTeacher]:
    """Those of `each_teacher` that run beside the student."""
    return [own for own in each_teacher(source) if isinstance(own, OnlineTeacher)]


def states_readers(source: TeacherSource) -> StatesReaders:
    """What reads the states that a batch brings along, of the one teacher or of those of several that are cached."""
    if isinstance(source, CachedTeacher):
        return source.read
    return {number: own.read for number, own in enumerate(each_teacher(source)) if isinstance(own, CachedTeacher)}


def role_of(number: int) -> str:
    """What a teacher is called, by its number from 0: `teacher`, `teacher 2`, ..."""
    return "teacher" if number == 0 else f"teacher {number + 1}"


def by_role(source: TeacherSource | None) -> Iterator[tuple[str, TeacherSource]]:
    """Each teacher with what it is called."""
    return ((role_of(number), own) for number, own in enumerate(each_teacher(source)))
