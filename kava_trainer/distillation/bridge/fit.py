"""The maps of a bridge as a fit gives them, and which of their dimensions it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...utils.errors import BadRequest
from ..projector import LowRankBridge, normalise
from .agreement import AGREEING, Agreement

Map = tuple[torch.Tensor, torch.Tensor]
"""Weight [out, in] and bias [out] of a linear map."""


@dataclass(frozen=True)
class BridgeFit:
    """Both maps of a bridge at its highest rank; their first rows are those of a lower one."""

    teacher: Map
    """On the principal axes of the normalised states, from the largest down."""
    student: Map
    """The fit to these coordinates."""
    axes: int
    """Principal axes that have any variance, and so the highest rank that tells anything."""

    def coordinates(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the student's states [N, d_s] and the teacher's [N, d_t] come to lie, [N, axes] each."""
        return _mapped(student, self.student, self.axes), _mapped(teacher, self.teacher, self.axes)

    def give_to(self, bridge: LowRankBridge) -> None:
        """Copy as many rows as a bridge has dimensions."""
        for side, (weight, bias) in ((bridge.teacher, self.teacher), (bridge.student, self.student)):
            side.weight.copy_(weight[: bridge.rank])
            side.bias.copy_(bias[: bridge.rank])


def _mapped(states: torch.Tensor, given: Map, rank: int) -> torch.Tensor:
    weight, bias = given
    return F.linear(normalise(states).to(weight), weight[:rank], bias[:rank])


def tell_agreement(
    bridge: LowRankBridge, layers: tuple[int, int], found: Agreement, tell: Callable[[str], None]
) -> None:
    """Show at which ranks the sides of a bridge between two layers, the student's first, agree; `tell` prints it."""
    tell(f"Agreement of layers {layers} (student, teacher) by rank of the bridge, on {found.tokens} held-back tokens:")
    for line in found.lines(found.highest() if bridge.rank_is_open else bridge.rank):
        tell(line)


def decide_rank(bridge: LowRankBridge, layers: tuple[int, int], found: Agreement) -> None:
    """Give a bridge between two layers, if its rank is open, the highest one at which its sides agree.

    Raises:
        BadRequest: if they agree at none.
    """
    if not bridge.rank_is_open:
        return
    if (rank := found.highest()) is None:
        best = max(found.centred)
        raise BadRequest(
            f"projector_rank auto found no rank at which layers {layers} (student, teacher) have a centred CosSim of "
            f"{AGREEING} or more; the highest is {best:.3f}, at rank {found.centred.index(best) + 1}.",
            "Write projector_rank as a number, or align other layers.",
        )
    bridge.decide(rank)
