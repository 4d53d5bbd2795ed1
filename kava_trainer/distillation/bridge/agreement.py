"""At which rank the two sides of a bridge agree, on states that its fit has not seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...utils.errors import BadRequest
from ..losses import MINIMUM_NORM

HELD_BACK_SHARE, MOST_HELD_BACK = 8, 2048
"""Of the tokens of a calibration pass one in so many is held back for the measurement, and no more than so many."""

AGREEING = 0.9
"""The centred CosSim from which the two sides count as agreeing."""


def held_back_tokens(tokens: int) -> int:
    """How many of the tokens of a calibration pass are held back, give or take an example."""
    return min(tokens // HELD_BACK_SHARE, MOST_HELD_BACK)


def hold_back(examples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The examples of a calibration pass that a bridge is fitted to, and the last ones, on which it is measured.

    Raises:
        BadRequest: if there are not two examples.
    """
    if len(examples) < 2:
        raise BadRequest(
            "projector_rank needs two calibration examples, of which one is held back, and there is only one;",
            "raise calibration_tokens or use more training data.",
        )
    lengths = [len(example["input_ids"]) for example in examples]
    budget, count = held_back_tokens(sum(lengths)), 1
    while count < len(examples) - 1 and sum(lengths[-count - 1 :]) <= budget:
        count += 1
    return examples[:-count], examples[-count:]


@dataclass(frozen=True)
class Agreement:
    """The cosines between the two sides of a bridge, each a figure for the ranks from 1 to the full one."""

    cos_sim: list[float]
    """Mean cosine of the two sides of a token."""
    centred: list[float]
    """The same after subtracting each side's mean over the tokens."""
    shuffled: list[float]
    """Mean cosine of the student's side of a token and the teacher's of another."""
    tokens: int
    """It was measured on."""

    @property
    def full(self) -> int:
        """The highest rank there is."""
        return len(self.centred)

    def highest(self, edge: float = AGREEING) -> int | None:
        """The highest rank whose centred CosSim is at least `edge`; None where there is none."""
        return max((rank for rank, centred in enumerate(self.centred, 1) if centred >= edge), default=None)

    def lines(self, chosen: int | None) -> list[str]:
        """A table of the powers of 2, the full rank and the chosen one."""
        powers = {2**power for power in range(self.full.bit_length())}
        rows = ["  rank   CosSim  centred  shuffled"]
        for rank in sorted(powers | {self.full} | ({chosen} if chosen and chosen <= self.full else set())):
            at = rank - 1
            figures = f"{self.cos_sim[at]:8.4f} {self.centred[at]:8.4f} {self.shuffled[at]:9.4f}"
            rows.append(f"{rank:6d} {figures}{' <- taken' if rank == chosen else ''}")
        return rows


def measure_agreement(
    student: torch.Tensor, teacher: torch.Tensor, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> Agreement:
    """The agreement of two sides at every rank: over the first coordinate, the first two, and so on.

    Args:
        student: the student's coordinates [N, full] of this process's tokens.
        teacher: the teacher's [N, full].
        sum_over_ranks: sums a tensor over all processes.
    """
    student, teacher = student.double(), teacher.double()
    one = student.new_tensor([len(student)])
    sums = sum_over_ranks(torch.cat([student.sum(dim=0), teacher.sum(dim=0), one]))
    count, means = sums[-1], (sums[:-1] / sums[-1]).chunk(2)
    plain, norms = _cosines(student, teacher)
    centred, _ = _cosines(student - means[0], teacher - means[1])
    cosines = sum_over_ranks(torch.stack([plain.sum(dim=0), centred.sum(dim=0)]))
    # For unit vectors s, t: (sum_i s_i . sum_j t_j - sum_i s_i . t_i) / (N (N - 1)), at all ranks in one product.
    units = sum_over_ranks(torch.stack([s.T @ (1 / norm) for s, norm in zip((student, teacher), norms, strict=True)]))
    crossed = (units[0] * units[1]).triu().sum(dim=0)  # coordinate by rank, those up to the rank
    shuffled = (crossed - cosines[0]) / (count * (count - 1)).clamp(min=1)
    cos_sim, of_centred = (cosines / count).tolist()
    return Agreement(cos_sim, of_centred, shuffled.tolist(), round(count.item()))


def _cosines(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The cosine [N, full] of two vectors cut off after each of their coordinates, and the norms [N, full] of each."""
    own, other = (side.square().cumsum(dim=1).sqrt().clamp(min=MINIMUM_NORM) for side in (left, right))
    return (left * right).cumsum(dim=1) / (own * other), (own, other)
