"""What is noted during the steps and read by a log line: token means that stay on the device, and times."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def perplexity(cross_entropy: float) -> float:
    """e to the power of a cross-entropy in nats, at most about 1e304: beyond that floats end."""
    return math.exp(min(cross_entropy, 700))


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


class Stopwatch:
    """Adds up the time of named stretches of work; on a CUDA device with events, which nothing waits for.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the `with` block."""
        start = self._now()
        yield
        end = self._now()
        if self._cuda:
            self._events.append((name, start, end))
        else:
            self._add(name, end - start)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by name so far. Waits for the device to be done with what was measured."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)
