"""The interface that every target has: what is captured of both models, compared, and measured by the probe."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ...models.attention.capture import Feature
from ..projector import LowRankBridge

Direction = Literal["teacher_to_student", "student_to_teacher", "none"]


Comparison = tuple[int, int] | tuple[int, int, str]
"""The student's and the teacher's layer and, where several things of them are compared, which one."""


class AlignedStates(NamedTuple):
    """The two sides of one comparison, [B, T, ...] each; where vectors are compared, in the same space.

    It is a tuple, because the hooks of FSDP2 look for the tensors of an output in those.
    """

    student: torch.Tensor
    target: torch.Tensor
    reconstruction: tuple[torch.Tensor, torch.Tensor] | None = None
    """With a reconstruction anchor, the rebuilt and the true normalised teacher states [B, T, d_t]."""


@dataclass(frozen=True)
class Alignment:
    """What one comparison gives, token by token: float32 [B, T] each."""

    terms: dict[str, torch.Tensor]
    """Unweighted loss terms by name."""
    cosine: torch.Tensor


class Sides(NamedTuple):
    """What a probe measures of one comparison on one batch, at its N real tokens in float32."""

    groups: Iterable[tuple[torch.Tensor, torch.Tensor]]
    """Student's side and target [n, d], within which any token's target can stand for another's."""
    student: torch.Tensor
    """Raw states of the student [N, d_s]."""
    target: torch.Tensor
    """What they are compared with [N, d]."""
    teacher: torch.Tensor
    """Raw states of the teacher [N, d_t]."""


def of_each(mask: torch.Tensor, teachers: int) -> list[torch.Tensor]:
    """The mask [B, T] of each teacher, of one for all of them [B, T] or one for each [K, B, T]."""
    return list(mask) if mask.ndim == 3 else [mask] * teachers


class AlignmentTarget(nn.Module):
    """What is aligned. A subclass says what is compared, pair by pair of layers, and how.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `hidden_states`.
        weights: weight of each pair; equal by default. Only their proportions count.
    """

    name: str
    """The value of `alignment_target`."""
    terms: tuple[str, ...]
    """Loss terms that compare the two sides; the argument `<term>_weight` weighs each."""
    within_examples: bool = False
    """Whether the groups of `sides` are single examples; else those of all batches belong together, one by one."""

    def __init__(self, pairs: list[tuple[int, int]], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.pairs = pairs
        self.direction: Direction = "none"
        shares = [1.0] * len(pairs) if weights is None else list(weights)
        self.shares = [share / sum(shares) for share in shares]
        """Weight of each comparison; they sum to 1."""
        self.projectors, self.decoders = nn.ModuleList(), nn.ModuleList()

    @property
    def parts(self) -> "list[AlignmentTarget]":
        """The target of each teacher; of one teacher this one."""
        return [self]

    @property
    def widths(self) -> str:
        """What both sides are, for people."""
        raise NotImplementedError

    @property
    def owners(self) -> list[int]:
        """Which projector each comparison has, where there are projectors."""
        return [*range(len(self.shares))]

    @property
    def bridges(self) -> list[LowRankBridge]:
        """The projectors where they are bridges of both sides; else none."""
        return [projector for projector in self.projectors if isinstance(projector, LowRankBridge)]

    @property
    def use(self) -> dict[str, Any]:
        """What is mapped, and where the layers stand, as it is in a projector file."""
        return {"target": self.name, "pairs": [list(pair) for pair in self.pairs]}

    @property
    def comparisons(self) -> list[Comparison]:
        """What is compared, in the order of `forward`."""
        return [*self.pairs]

    @property
    def told_layers(self) -> str:
        """Which layers are compared, for people."""
        return ", ".join(map(str, self.pairs))

    @property
    def student_layers(self) -> list[int]:
        """Layers of the student that are aligned."""
        return [student for student, _ in self.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        """Layers of the teacher that are aligned."""
        return [teacher for _, teacher in self.pairs]

    @property
    def student_features(self) -> list[Feature]:
        """What to capture of the student; by default the hidden states of its layers."""
        return [*self.student_layers]

    @property
    def teacher_features(self) -> list[Feature]:
        """What to capture of the teacher; by default the hidden states of its layers."""
        return [*self.teacher_layers]

    def most_dimensions(self, index: int) -> int:
        """How many dimensions the targets of a comparison can use at most."""
        raise NotImplementedError

    def forward(
        self, student_states: Mapping[Feature, torch.Tensor], teacher_states: Mapping[Feature, torch.Tensor]
    ) -> list[AlignedStates]:
        """Bring both sides of each comparison together.

        Args:
            student_states: what was captured of the student; a hidden state [B, T, d_s] by its layer.
            teacher_states: what was captured of the teacher.
        """
        raise NotImplementedError

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
            mask: boolean [B, T]; of several teachers it may be one for each [K, B, T], also below.
            names: the terms to compute, of `terms` and `anchor`.
            packed_lengths: tokens of each example of a packed row [1, T]; else an example is a row.
        """
        raise NotImplementedError

    def sides(
        self,
        index: int,
        pair: AlignedStates,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Sides:
        """What the probe measures of the comparison number `index`.

        Args:
            index: counts the comparisons.
            pair: what `forward` gave of it.
            student_states: what `forward` was given.
            teacher_states: what `forward` was given.
            mask: real tokens, boolean [B, T]; a row is an example.
        """
        raise NotImplementedError

    def fitted_sides(
        self,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What projectors are fitted to, one comparison after the other: student [N, d_s] and teacher [N, d_t] at the
        tokens of `mask` [B, T]."""
        return iter(())

    def token_shares(
        self, found: Sequence[Alignment], mask: torch.Tensor, routed: bool = True
    ) -> "list[float] | list[torch.Tensor]":
        """The weight of each comparison, for `mean`: a number, or one for each token [B, T].

        Args:
            found: what `align` gave.
            mask: that it was given.
            routed: whether tokens choose among several teachers, where that is asked for.
        """
        return self.shares

    def figures(self, found: Sequence[Alignment], mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the log tells beside the terms and the cosine: the sum over tokens of each figure, and their number."""
        return {}

    def mean(
        self, values: list[torch.Tensor], shares: "Sequence[float] | Sequence[torch.Tensor] | None" = None
    ) -> torch.Tensor:
        """Weighted mean over the comparisons of one figure each; by `shares` of `token_shares` where they are given."""
        given: Sequence[Any] = self.shares if shares is None else shares
        return torch.stack([share * value for share, value in zip(given, values, strict=True)]).sum(dim=0)
