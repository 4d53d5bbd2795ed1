"""What all targets have in common that compare vectors of both models, token by token, in one space."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...models.attention.capture import Feature
from ..losses import mercator_per_token, mse_per_token, relative_mse_per_token
from ..projector import LowRankBridge, ProjectorConfig, build_decoder, build_projector, normalise
from .base import AlignedStates, Alignment, AlignmentTarget, Direction, Sides

_PLAIN_TERMS: dict[str, Callable[..., torch.Tensor]] = {"mse": mse_per_token, "relative_mse": relative_mse_per_token}
"""Terms that compare the two sides alone, by name."""

Features = Mapping[Feature, torch.Tensor]

Sharing = Literal["none", "all"]


class ProjectedTarget(AlignmentTarget):
    """Aligns vectors of the student with those of the teacher, with one projector a comparison, or with none.

    With `teacher_to_student` the teacher's vectors are projected into the student's space and the target moves with
    the projector. With `student_to_teacher` the student's vectors are projected and the teacher's own are the target.
    With `none` there is no projector, and the vectors themselves are compared. A `LowRankBridge` projects both sides.

    A subclass gives the `vectors`: [B, T, d], or [B, T, heads, d], of which each head is projected and compared by
    itself, and a token counts as the mean of its heads.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `hidden_states`.
        configs: shape of each comparison's projector; without projectors, the width of either side.
        alpha: weight of the direction in the Mercator loss.
        beta: weight of the log-magnitude in the Mercator loss.
        direction: which side is projected.
        weights: weight of each comparison; equal by default. Only their proportions count.
        sharing: `none`, or `all` for one projector for all comparisons of one kind.

    Raises:
        ValueError: if a bridge is to be shared.
    """

    kinds: ClassVar[int] = 1
    """How many kinds of comparisons take turns: each has projectors of its own."""

    terms = ("mercator", *_PLAIN_TERMS)

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        configs: Sequence[ProjectorConfig],
        alpha: float,
        beta: float,
        direction: Direction,
        weights: Sequence[float] | None = None,
        sharing: Sharing = "none",
    ) -> None:
        super().__init__(pairs, [1.0] * len(configs) if weights is None else weights)
        self.direction, self.configs, self.sharing = direction, list(configs), sharing
        self.alpha, self.beta = alpha, beta
        projected = self.configs if direction != "none" else []
        if sharing == "all":
            if any(config.rank is not None for config in projected):
                raise ValueError("A bridge is fitted to one pair of layers and cannot be shared; write sharing='none'.")
            projected = projected[: self.kinds]
        self.projectors = nn.ModuleList(build_projector(config) for config in projected)
        rebuilt = [config for config in projected if config.anchor == "reconstruction"]
        self.decoders = nn.ModuleList(build_decoder(config) for config in rebuilt)

    @property
    def owners(self) -> list[int]:
        """Which projector each comparison has, where there are projectors."""
        places = range(len(self.shares))
        return [place % self.kinds for place in places] if self.sharing == "all" else [*places]

    @property
    def use(self) -> dict[str, Any]:
        """What is mapped, and where the layers stand, as it is in a projector file."""
        shared = {"sharing": self.sharing} if self.sharing != "none" else {}
        return {**super().use, "direction": self.direction, **shared}

    @property
    def widths(self) -> str:
        """The widths of the vectors, for people: `896 -> 1536` through a projector, `576 wide` without one.

        Those of a bridge are `1536 -> 8 <- 896`: teacher, rank and student.
        """
        if self.bridges:
            ranks = dict.fromkeys(str(bridge.config.rank) for bridge in self.bridges)
            source, result = self.configs[0].input_size, self.configs[0].output_size
            return f"{source} -> {', '.join(ranks)} <- {result}"
        sizes = dict.fromkeys((config.input_size, config.output_size) for config in self.configs)
        if self.projectors:
            return ", ".join(f"{source} -> {result}" for source, result in sizes)
        return ", ".join(f"{source} wide" for source, _ in sizes)

    def student_width(self, index: int) -> int:
        """How wide a vector of the student is."""
        config = self.configs[index]
        return config.output_size if self.direction == "teacher_to_student" else config.input_size

    def most_dimensions(self, index: int) -> int:
        """How many dimensions the targets of a comparison can use at most: the student's, or those of a bridge."""
        return self.bridges[index].rank if self.bridges else self.student_width(index)

    def vectors(self, index: int, student: Features, teacher: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's and the teacher's vectors of the comparison number `index`, as they are captured."""
        raise NotImplementedError

    def forward(self, student_states: Features, teacher_states: Features) -> list[AlignedStates]:
        """Bring both sides of each comparison into one space.

        Args:
            student_states: what was captured of the student.
            teacher_states: what was captured of the teacher.
        """
        return [
            self._project(index, *self.vectors(index, student_states, teacher_states))
            for index in range(len(self.shares))
        ]

    def _project(self, index: int, student: torch.Tensor, teacher: torch.Tensor) -> AlignedStates:
        if self.direction == "none":
            return AlignedStates(student, teacher)
        owner = self.owners[index]
        projector = self.projectors[owner]
        if isinstance(projector, LowRankBridge):
            return AlignedStates(projector.student(student), projector(teacher))
        if self.direction == "student_to_teacher":
            return AlignedStates(projector(student), teacher)
        target = projector(teacher)
        reconstruction = (self.decoders[owner](target), normalise(teacher)) if self.decoders else None
        return AlignedStates(student, target, reconstruction)

    def align(
        self,
        pairs: list[AlignedStates],
        mask: torch.Tensor,
        names: Container[str],
        packed_lengths: Sequence[int] | None = None,
    ) -> list[Alignment]:
        """Compare both sides, one comparison after the other, at the tokens where `mask` [B, T] is true.

        Args:
            pairs: what `forward` gave.
            mask: boolean [B, T].
            names: the terms to compute, of `mercator`, `mse`, `relative_mse` and `anchor`.
            packed_lengths: not read, for each token is compared by itself.
        """
        return [self._compare(pair, mask, names) for pair in pairs]

    def _compare(self, pair: AlignedStates, mask: torch.Tensor, names: Container[str]) -> Alignment:
        has_heads = pair.student.ndim == 4
        keep = mask.unsqueeze(-1) if has_heads else mask
        mercator, cosine = mercator_per_token(pair.student, pair.target, keep, self.alpha, self.beta)
        terms = {"mercator": mercator} if "mercator" in names else {}
        for name, function in _PLAIN_TERMS.items():
            if name in names:
                terms[name] = function(pair.student, pair.target, keep)
        if "anchor" in names and pair.reconstruction is not None:
            terms["anchor"] = mse_per_token(*pair.reconstruction, keep)
        if has_heads:
            terms, cosine = {name: values.mean(dim=-1) for name, values in terms.items()}, cosine.mean(dim=-1)
        return Alignment(terms, cosine)

    def sides(
        self, index: int, pair: AlignedStates, student_states: Features, teacher_states: Features, mask: torch.Tensor
    ) -> Sides:
        """What the probe measures of a comparison; each head is a group."""
        tensors = (pair.student, pair.target, *self.vectors(index, student_states, teacher_states))
        compared, target, own, given = (tensor[mask].float() for tensor in tensors)
        if compared.ndim == 2:
            return Sides([(compared, target)], own, target, given)
        heads = list(zip(compared.unbind(1), target.unbind(1), strict=True))
        return Sides(heads, own.flatten(1), target.flatten(1), given.flatten(1))

    def fitted_sides(
        self, student_states: Features, teacher_states: Features, mask: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The vectors of each comparison at the tokens of `mask`, those of all heads below each other."""
        for index in range(len(self.shares)):
            sides = self.vectors(index, student_states, teacher_states)
            student, teacher = (side[mask].reshape(-1, side.shape[-1]) for side in sides)
            yield student, teacher
