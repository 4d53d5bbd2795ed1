"""Token means that are noted during the steps, stay on the device, and are read by a log line."""

from collections.abc import Callable

import torch


class TokenMeans:
    """Running sums and counts by name; reading them gives their ratio and starts anew."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Add a sum over tokens and the number of those tokens, both scalars on the device.

        A sum that is no finite number is left out with its tokens: its optimizer step is skipped as well.
        """
        pair = torch.stack([total.detach().float(), count.detach().float()])
        pair = torch.where(pair.isfinite().all(), pair, 0)
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def state(self) -> dict[str, torch.Tensor]:
        """Sum and count [2] by name, to be put back with `restore`."""
        return dict(self._totals)

    def restore(self, state: dict[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
        """Put back what `state` gave, on a device."""
        self._totals = {name: pair.to(device) for name, pair in state.items()}

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
