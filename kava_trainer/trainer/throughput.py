"""Tokens, examples and seconds of a training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.memory import peak_memory_bytes


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


class Throughput(TrainerCallback):
    """Counts the tokens, examples and seconds of a training, with those of the sessions that it goes on from.

    Args:
        device: where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._seen = torch.zeros(3, dtype=torch.int64)
        self._began: float | None = None
        self._ended: float | None = None
        self._earlier: dict[str, float] = {}
        self._seen_before_line = 0
        self._line_began: float | None = None
        self._seconds_before_line: dict[str, float] = {}
        self.stopwatch = Stopwatch(self._device)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The `with` block is one training; what comes after it counts no more."""
        self.reset()
        try:
            yield
        finally:
            self._ended = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to count time and tokens, at the first step."""
        self.reset()
        self._began = time.monotonic()

    def begin_line(self) -> None:
        """The first step of a log line begins, if none has yet."""
        self._line_began = self._line_began or time.monotonic()

    def count(self, counts: torch.Tensor) -> None:
        """Add the counts of an optimizer step, as `StepBatches.gather` orders them, of all ranks."""
        self._seen = self._seen.to(counts.device) + counts[[0, 2, 3]]

    @property
    def tokens(self) -> int:
        """Real tokens of all ranks so far."""
        return int(self._seen[0])

    def line(self) -> dict[str, float]:
        """What a training log line tells of speed and memory. Read it where the device was waited for already.

        Returns:
            `tokens_per_second`: real tokens of all ranks since the last such line, over the time since then, with
            evaluations and saves in between; `peak_memory_bytes`: of this rank since its start, where it can be told.
            Where the student writes answers, also `generation_seconds`, what that took this rank since the last line,
            and `training_seconds`, what its forward and backward passes took.
        """
        now, tokens = time.monotonic(), self.tokens
        seconds = self.stopwatch.seconds()  # every time, so that events do not pile up
        figures: dict[str, float] = {}
        if self._line_began is not None and now > self._line_began:
            figures["tokens_per_second"] = (tokens - self._seen_before_line) / (now - self._line_began)
        if (peak := peak_memory_bytes(self._device)) is not None:
            figures["peak_memory_bytes"] = peak
        if "generation" in seconds:
            figures["generation_seconds"] = self._since_line("generation", seconds)
            figures["training_seconds"] = self._since_line("step", seconds)
        self._seen_before_line, self._line_began, self._seconds_before_line = tokens, now, seconds
        return figures

    def _since_line(self, name: str, seconds: dict[str, float]) -> float:
        return seconds.get(name, 0.0) - self._seconds_before_line.get(name, 0.0)

    def spent(self) -> dict[str, float]:
        """Seconds and counts of the training so far, with those of the sessions that it goes on from."""
        tokens, positions, examples = self._seen.tolist()
        seconds = self.stopwatch.seconds()
        spent = {
            "train_seconds": 0.0 if self._began is None else (self._ended or time.monotonic()) - self._began,
            "teacher_seconds": seconds.get("teacher", 0.0),
            "step_seconds": seconds.get("step", 0.0),
            "generation_seconds": seconds.get("generation", 0.0),
            "tokens": tokens,
            "positions": positions,
            "examples": examples,
        }
        return {name: value + self._earlier.get(name, 0) for name, value in spent.items()}

    def figures(self) -> dict[str, float | None]:
        """What the last training came to, with the sessions that it resumed; empty before it.

        Returns:
            Real tokens and examples a second of all ranks, evaluations and saves included, the share of padding, and
            the seconds that this rank's teacher and student (forward and backward, with projectors and losses) took.
            Where the student wrote answers, also what that took, and the whole training.
        """
        spent = self.spent()
        if spent["positions"] == 0:
            return {}
        beside = {name: spent[name] for name in ("generation_seconds", "train_seconds")}
        return {
            "tokens_per_second": spent["tokens"] / spent["train_seconds"],
            "samples_per_second": spent["examples"] / spent["train_seconds"],
            "padding_fraction": 1 - spent["tokens"] / spent["positions"],
            "teacher_seconds": spent["teacher_seconds"],
            "student_seconds": spent["step_seconds"] - spent["teacher_seconds"],
            **(beside if beside["generation_seconds"] > 0 else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was spent so far, for a checkpoint."""
        return {"spent": self.spent()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._earlier = state.get("spent", {})
