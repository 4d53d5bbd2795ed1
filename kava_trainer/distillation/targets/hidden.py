"""`alignment_target` hidden: the states of mapped layers, brought into one space by projectors."""

from collections.abc import Sequence
from typing import Any

import torch

from ..projector import ProjectorConfig
from .base import Direction
from .projected import Features, ProjectedTarget, Sharing


class HiddenStateTarget(ProjectedTarget):
    """Aligns hidden states of the student with those of the teacher, with one projector a pair, or with none.

    With `teacher_to_student` the teacher's states are projected into the student's space and the target moves with
    the projector. With `student_to_teacher` the student's states are projected and the teacher's own are the target.
    With `none` there is no projector, and the states themselves are compared. A `LowRankBridge` projects both sides.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `hidden_states`.
        config: shape of each projector; without projectors, the width of either side.
        alpha: weight of the direction in the Mercator loss.
        beta: weight of the log-magnitude in the Mercator loss.
        direction: which side is projected.
        weights: weight of each pair; equal by default. Only their proportions count.
        sharing: `none`, or `all` for one projector for all pairs.

    Raises:
        ValueError: if there is a rank, and the direction is not `teacher_to_student`, or the projectors are shared.
    """

    name = "hidden"

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        config: ProjectorConfig,
        alpha: float = 1.0,
        beta: float = 0.01,
        direction: Direction = "teacher_to_student",
        weights: Sequence[float] | None = None,
        sharing: Sharing = "none",
    ) -> None:
        if config.rank is not None and direction != "teacher_to_student":
            raise ValueError(f"A bridge is given the sizes of direction='teacher_to_student', not of {direction!r}.")
        super().__init__(pairs, [config] * len(pairs), alpha, beta, direction, weights, sharing)
        self.student_size = config.output_size if direction == "teacher_to_student" else config.input_size

    @property
    def use(self) -> dict[str, Any]:
        """What the projectors map, as it stands in their file."""
        return {name: value for name, value in super().use.items() if name != "target"}  # as it always was

    def vectors(self, index: int, student: Features, teacher: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [B, T, d_s] and [B, T, d_t] of a pair of layers."""
        own, other = self.pairs[index]
        return student[own], teacher[other]
