"""`alignment_target` relations: how alike the tokens of an example are to each other, in mapped layers of both models.

The similarities of n tokens are an n x n matrix whatever the width of the states, so no projector stands between models
of unlike widths, and none can be gamed (the Gram and MiniLM family: Tung and Mori 2019; Wang et al., arXiv 2002.10957).
They exist for some rows of one example at a time, forward and backward.
"""

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from ...models.attention.capture import Feature
from .base import AlignedStates, Alignment, AlignmentTarget, Sides
from .rows import CHUNK_BYTES, centred_rows, example_parts, recomputed, row_correlations


def others(mask: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Which tokens [c, n] the tokens `start` to `stop` are compared with: all other ones of `mask` [n]."""
    keep = mask[start:stop].unsqueeze(1) & mask.unsqueeze(0)
    place = torch.arange(len(mask), device=mask.device)
    return keep & (place[start:stop].unsqueeze(1) != place.unsqueeze(0))


def unit_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States [n, d] in float32 with length 1; where `mask` [n] is false they may hold anything, and get no gradient."""
    filled = torch.where(mask.unsqueeze(-1), states.float(), torch.ones((), device=states.device))
    return F.normalize(filled, dim=-1, eps=1e-6)


def relation_errors(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the similarities of the tokens of one example are from the teacher's, token by token.

    The similarity of two tokens is the cosine of their states. A token's error is the mean, over the other tokens of
    the example, of the squared difference of both models' similarities.

    Args:
        student: states [n, d_s].
        teacher: states [n, d_t].
        mask: boolean [n]; other tokens have no part in it.
        chunk_bytes: size of one tensor of similarities.

    Returns:
        The errors, and Pearson's correlation of both models' similarities to the other tokens, which has no gradient;
        float32 [n] each, 0 where `mask` is false. The correlation is 0 where all states of a side are one.
    """
    with torch.autocast(student.device.type, enabled=False):  # else products of matrices would be in half precision
        sides = unit_states(student, mask), unit_states(teacher, mask)
        size = max(1, chunk_bytes // (4 * len(mask)))
        parts = [recomputed(_errors, *sides, mask, start, start + size) for start in range(0, len(mask), size)]
    errors, agreement = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(agreement)


def _errors(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    keep = others(mask, start, stop)
    own, due = student[start:stop] @ student.T, teacher[start:stop] @ teacher.T
    errors = torch.where(keep, (own - due).square(), 0.0).sum(dim=-1) / keep.sum(dim=-1).clamp(min=1)
    return errors, row_correlations(own.detach(), due.detach(), keep)


class RelationsTarget(AlignmentTarget):
    """Aligns the similarities of the tokens of an example in mapped layers; there is nothing to train but the student.

    Its `cosine` is Pearson's correlation of a token's similarities in both models, so a common direction of all states
    counts for nothing.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `hidden_states`.
        weights: weight of each pair; equal by default. Only their proportions count.
    """

    name = "relations"
    terms = ("relations",)
    within_examples = True

    @property
    def widths(self) -> str:
        """What both sides are, for people."""
        return "similarities of tokens"

    def most_dimensions(self, index: int) -> int:
        """One: the targets are the teacher's own, whose rank no projector can lower."""
        return 1

    def forward(
        self, student_states: Mapping[Feature, torch.Tensor], teacher_states: Mapping[Feature, torch.Tensor]
    ) -> list[AlignedStates]:
        """The states of each pair as they are, [B, T, d_s] and [B, T, d_t]."""
        return [AlignedStates(student_states[student], teacher_states[teacher]) for student, teacher in self.pairs]

    def align(
        self,
        pairs: list[AlignedStates],
        mask: torch.Tensor,
        names: Container[str],
        packed_lengths: Sequence[int] | None = None,
    ) -> list[Alignment]:
        """`relation_errors` of each example, pair by pair of layers; its term is called `relations`."""
        parts = example_parts(mask, packed_lengths)
        return [self._compare(pair, mask, names, parts) for pair in pairs]

    def _compare(
        self, pair: AlignedStates, mask: torch.Tensor, names: Container[str], parts: list[tuple[int, slice]]
    ) -> Alignment:
        found = [relation_errors(pair.student[at], pair.target[at], mask[at]) for at in parts]
        errors, agreement = (torch.cat(values).view(mask.shape) for values in zip(*found, strict=True))
        return Alignment({"relations": errors} if "relations" in names else {}, agreement)

    def sides(
        self,
        index: int,
        pair: AlignedStates,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Sides:
        """What the probe measures: the centred similarities [n, n] of each example, and the states themselves."""
        student, teacher = pair.student[mask].float(), pair.target[mask].float()
        return Sides(self._similarities(pair, mask), student, teacher, teacher)

    def _similarities(self, pair: AlignedStates, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row, real in enumerate(mask):
            own, due = pair.student[row, real], pair.target[row, real]
            every = torch.ones(len(own), dtype=torch.bool, device=mask.device)
            keep = others(every)
            own, due = (unit_states(states, every) for states in (own, due))
            yield centred_rows(own @ own.T, keep), centred_rows(due @ due.T, keep)
