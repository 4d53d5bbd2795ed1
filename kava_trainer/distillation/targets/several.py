"""What is aligned with several teachers: each has a target of its own, with its own layers and projectors."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...models.attention.capture import Feature, in_order, states_of_teacher
from ..losses import token_sum
from ..teachers.routing import routing_entropy, shares_of_weights, teacher_shares
from .base import AlignedStates, Alignment, AlignmentTarget, Comparison, Sides, of_each

_ROUTING_ENTROPY = "teacher_routing_entropy"


class SeveralTargets(AlignmentTarget):
    """The targets of several teachers as one.

    A token learns from each teacher by its weight or, with a `temperature`, by `teacher_shares`, where the agreement is
    the cosine of the teacher's target. Where a teacher has nothing to say of a token, because its own tokens leave that
    text out, the others take its share.

    Args:
        parts: what is aligned with each teacher, all of one kind and with projectors of one direction.
        weights: of the teachers; equal by default. Only their proportions count.
        temperature: of the router; None for fixed weights.

    Raises:
        ValueError: if there are not two parts of one kind, or not as many weights above 0.
    """

    def __init__(
        self, parts: Sequence[AlignmentTarget], weights: Sequence[float] | None = None, temperature: float | None = None
    ) -> None:
        if len(parts) < 2 or len({(part.name, part.direction) for part in parts}) > 1:
            raise ValueError("Give one target for each of several teachers, all of one kind and one direction.")
        by_teacher = shares_of_weights(weights, len(parts))
        shares = [own * share for part, own in zip(parts, by_teacher, strict=True) for share in part.shares]
        super().__init__([pair for part in parts for pair in part.pairs], shares)
        # Their projectors are modules of this target; in a list of modules they would be saved twice.
        self._parts, self._weights = tuple(parts), by_teacher
        self._temperature = temperature
        self.name, self.terms, self.within_examples = parts[0].name, parts[0].terms, parts[0].within_examples
        self.direction = parts[0].direction
        self.projectors = nn.ModuleList(own for part in parts for own in part.projectors)
        self.decoders = nn.ModuleList(own for part in parts for own in part.decoders)

    @property
    def parts(self) -> list[AlignmentTarget]:
        """The target of each teacher."""
        return list(self._parts)

    @property
    def widths(self) -> str:
        """What both sides are with each teacher, for people."""
        return ", ".join(dict.fromkeys(part.widths for part in self._parts))

    @property
    def owners(self) -> list[int]:
        """Which projector each comparison has, where there are projectors."""
        found, before = [], 0
        for part in self._parts:
            found += [before + own for own in part.owners]
            before += len(part.projectors)
        return found

    @property
    def use(self) -> dict[str, Any]:
        """What the projectors of each teacher map."""
        return {"teachers": [part.use for part in self._parts]}

    @property
    def comparisons(self) -> list[Comparison]:
        """Those with each teacher, which is named."""
        return [
            (own[0], own[1], " ".join([*own[2:], f"teacher {number}"]))
            for number, part in enumerate(self._parts, start=1)
            for own in part.comparisons
        ]

    @property
    def told_layers(self) -> str:
        """Which layers are compared with each teacher, for people."""
        return "; ".join(f"teacher {number}: {part.told_layers}" for number, part in enumerate(self._parts, start=1))

    @property
    def student_features(self) -> list[Feature]:
        """What to capture of the student for any of the teachers."""
        return in_order({feature for part in self._parts for feature in part.student_features})

    @property
    def teacher_features(self) -> list[Feature]:
        """Not to be had of all at once: ask each of the `parts`."""
        raise ValueError("Each of several teachers has features of its own; ask the parts.")

    def _place(self, index: int) -> tuple[int, int]:
        """The teacher of a comparison, and which of its own it is."""
        for number, part in enumerate(self._parts):
            if index < len(part.shares):
                return number, index
            index -= len(part.shares)
        raise IndexError(index)

    def most_dimensions(self, index: int) -> int:
        """How many dimensions the targets of a comparison can use at most."""
        number, own = self._place(index)
        return self._parts[number].most_dimensions(own)

    def forward(
        self, student_states: Mapping[Feature, torch.Tensor], teacher_states: Mapping[Feature, torch.Tensor]
    ) -> list[AlignedStates]:
        """Both sides of the comparisons with each teacher. What was captured of these is by `of_teacher`."""
        return [
            pair
            for number, part in enumerate(self._parts)
            for pair in part(student_states, states_of_teacher(teacher_states, number))
        ]

    def _split(self, found: Sequence[Any]) -> Iterator[tuple[AlignmentTarget, list[Any]]]:
        """Each part with its own of what there is one of for each comparison."""
        start = 0
        for part in self._parts:
            yield part, list(found[start : start + len(part.shares)])
            start += len(part.shares)

    def align(
        self,
        pairs: list[AlignedStates],
        mask: torch.Tensor,
        names: Container[str],
        packed_lengths: Sequence[int] | None = None,
    ) -> list[Alignment]:
        """The comparisons with each teacher, at the tokens where its `mask` is true."""
        masks = of_each(mask, len(self._parts))
        return [
            found
            for (part, own), real in zip(self._split(pairs), masks, strict=True)
            for found in part.align(own, real, names, packed_lengths)
        ]

    def token_shares(
        self, found: Sequence[Alignment], mask: torch.Tensor, routed: bool = True
    ) -> list[float] | list[torch.Tensor]:
        """The weight of each comparison at each token [B, T]; where it is the same everywhere, a number."""
        by_teacher = self._teacher_shares(found, mask, routed)
        if by_teacher is None:
            return self.shares
        return [share * own for part, own in zip(self._parts, by_teacher, strict=True) for share in part.shares]

    def _teacher_shares(
        self, found: Sequence[Alignment], mask: torch.Tensor, routed: bool = True
    ) -> torch.Tensor | None:
        """The share of each teacher at each token [K, B, T]; None where it is the same everywhere."""
        routed = routed and self._temperature is not None
        if not routed and mask.ndim == 2:
            return None
        agreements = [part.mean([own.cosine for own in kept]) for part, kept in self._split(found)] if routed else None
        masks = list(mask) if mask.ndim == 3 else None
        return teacher_shares(self._weights, agreements, self._temperature or 1.0, masks)

    def figures(self, found: Sequence[Alignment], mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The cosine of each teacher, and with a router how evenly the teachers share a token, in nats."""
        masks = of_each(mask, len(self._parts))
        figures = {}
        for number, ((part, kept), real) in enumerate(zip(self._split(found), masks, strict=True), start=1):
            cosine = part.mean([own.cosine for own in kept]).detach()
            figures[f"teacher{number}_cos_sim"] = (token_sum(cosine, real), real.sum())
        shares = self._teacher_shares(found, mask)
        if self._temperature is not None and shares is not None:
            known = mask.any(dim=0) if mask.ndim == 3 else mask
            figures[_ROUTING_ENTROPY] = (token_sum(routing_entropy(shares), known), known.sum())
        return figures

    def sides(
        self,
        index: int,
        pair: AlignedStates,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Sides:
        """What the probe measures of a comparison, at the tokens where its teacher's `mask` is true."""
        number, own = self._place(index)
        states, real = states_of_teacher(teacher_states, number), of_each(mask, len(self._parts))[number]
        return self._parts[number].sides(own, pair, student_states, states, real)

    def fitted_sides(
        self,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the projectors of each teacher are fitted to, at the tokens where its `mask` is true."""
        for number, (part, real) in enumerate(zip(self._parts, of_each(mask, len(self._parts)), strict=True)):
            yield from part.fitted_sides(student_states, states_of_teacher(teacher_states, number), real)
