"""What a probe has seen of one comparison, batch by batch, and its diagnostics in the end."""

from collections.abc import Sequence

import torch

from ..distillation.targets import Sides
from .diagnostics import Agreement, Diagnostics, diagnose_groups, mean_agreement, measure_agreement


class Sample:
    """The sides of one comparison on all batches of a probe.

    Args:
        within_examples: whether each group of `Sides` is an example, measured by itself, so that what has the square of
            its length is not kept; else those of all batches belong together.
    """

    def __init__(self, within_examples: bool) -> None:
        self._within = within_examples
        self._groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._measured: list[tuple[Agreement, int]] = []
        self._states: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, sides: Sides) -> None:
        """Take in one batch."""
        if self._within:
            self._measured += [(measure_agreement(*group), len(group[0])) for group in sides.groups]
        else:
            self._groups.append(list(sides.groups))
        self._states.append((sides.student, sides.target, sides.teacher))

    def diagnose(self) -> Diagnostics:
        """The diagnostics on all tokens."""
        if not self._within:
            groups = [_joined(parts) for parts in zip(*self._groups, strict=True)]
            self._measured = [(measure_agreement(*group), len(group[0])) for group in groups]
        return diagnose_groups(mean_agreement(self._measured), *_joined(self._states))


def _joined(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
