"""Token means that stay on the device until a log line needs them."""

from collections.abc import Callable

import torch


class TokenMeans:
    """Running sums and counts by name; reading them gives their ratio and starts anew."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Add a sum over tokens and the number of those tokens, both scalars on the device."""
        pair = torch.stack([total.detach().float(), count.detach().float()])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def drain(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The mean of each name over all ranks, leaving the sums empty.

        Args:
            reduce: sums a tensor over the ranks; called once, on every rank, with the same names in the same order.
        """
        if not self._totals:
            return {}
        sums = reduce(torch.stack(list(self._totals.values()))).tolist()
        names = list(self._totals)
        self._totals = {}
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count > 0}
