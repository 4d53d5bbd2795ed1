"""Optimizer steps whose loss or gradient is no finite number: skipped, noted, and too many of them end the run."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def skip_if(optimizer: torch.optim.Optimizer, bad: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """Let the next step of an optimizer change nothing where `bad` is true.

    The fused optimizers of torch take a flag on the device, as a gradient scaler gives it to them, so that nothing
    waits for it, but not beside sharded weights. Every other optimizer passes over parameters without a gradient, and
    the flag has to be read.

    Args:
        optimizer: not wrapped.
        bad: one boolean on the device.
        parameters: what it trains.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not sharded:
        flagged: Any = optimizer
        flagged.grad_scale, flagged.found_inf = None, bad.float()
    elif bad:
        for parameter in parameters:
            parameter.grad = None


class NonfiniteSteps:
    """Which optimizer steps were skipped, without waiting for the device: it is asked `LAG` steps later.

    Args:
        device: where the steps are computed.
    """

    LAG = 2

    def __init__(self, device: torch.device) -> None:
        self._lag = self.LAG if device.type == "cuda" else 0
        self._waiting: list[tuple[int, torch.Tensor, Any]] = []
        self.in_a_row = 0
        """Steps skipped one after the other, up to the last one that has been read."""
        self._steps = self._lost = 0

    def note(self, step: int, flags: torch.Tensor) -> None:
        """Note an optimizer step.

        Args:
            step: its number.
            flags: two booleans on the device: whether it is skipped, and whether its loss is no finite number.
        """
        if not self._lag:
            self._waiting.append((step, flags, None))
            return
        host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, host, event))

    def read(self, everything: bool = False) -> list[int]:
        """The steps skipped among those that are old enough, or among all; the latter waits for the device.

        All ranks that noted the same steps get the same answer.
        """
        count = max(0, len(self._waiting) - (0 if everything else self._lag))
        old, self._waiting = self._waiting[:count], self._waiting[count:]
        skipped = []
        for step, flags, event in old:
            if event is not None:
                event.synchronize()
            is_skipped, has_no_loss = flags.tolist()
            self.in_a_row = self.in_a_row + 1 if is_skipped else 0
            self._steps += 1
            self._lost += has_no_loss
            if is_skipped:
                skipped.append(step)
        return skipped

    def drain(self) -> tuple[int, int]:
        """Steps that were read since the last call, and how many of them had no finite loss."""
        found = self._steps, self._lost
        self._steps = self._lost = 0
        return found

    def state(self) -> list[int]:
        """What has been read, to be put back with `restore`."""
        return [self.in_a_row, self._steps, self._lost]

    def restore(self, state: list[int]) -> None:
        """Put back what `state` gave."""
        self.in_a_row, self._steps, self._lost = state
