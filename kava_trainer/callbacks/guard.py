"""Trackers that fail: told once, left out from then on, and never the end of a run."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..console import Console
from ..errors import reason_of

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]

Failed = Callable[[int, Exception], None]
"""Is told the step and the error, once."""


def tracker_problem(names: list[str]) -> str | None:
    """Why one of these trackers cannot be used, in one sentence; None where all of them can be set up."""
    for name in names:
        try:
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except Exception as error:  # each package has its own way to say that it is missing
            reason = reason_of(error).rstrip(".")
            return f"report_to {name} cannot be used ({reason}). Install what it needs, or write another."
    return None


def guard_trackers(
    callbacks: list[TrainerCallback], names: list[str], console: Console, problems: list[dict[str, Any]]
) -> None:
    """Make the trackers among a trainer's callbacks harmless.

    They stay the objects and the classes that they were, so `trainer.remove_callback(WandbCallback)` works.

    Args:
        callbacks: of the trainer; those that `report_to` brought in come before any that the user supplied.
        names: the trackers of `report_to`.
        console: tells of a failure.
        problems: takes a note of it.
    """
    for name in names:
        for kind in get_reporting_integration_callbacks([name]):
            tracker = next((callback for callback in callbacks if type(callback) is kind), None)
            if tracker is not None:
                _guard(tracker, _teller(name, console, problems))


def _teller(name: str, console: Console, problems: list[dict[str, Any]]) -> Failed:
    def tell(step: int, error: Exception) -> None:
        reason = reason_of(error).rstrip(".")
        console.warn(f"Reporting to {name} failed at step {step} ({reason}); it is left out from here on.")
        problems.append({"step": step, "kind": "tracker", "action": f"left {name} out from here on: {reason}"})

    return tell


def _guard(tracker: TrainerCallback, failed: Failed) -> None:
    """Wrap every event of one tracker: the first exception is its last event."""
    alive = True

    def guarded(event: Callable[..., TrainerControl | None]) -> Callable[..., TrainerControl | None]:
        def call(
            args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> TrainerControl | None:
            nonlocal alive
            if not alive:
                return None
            try:
                return event(args, state, control, **kwargs)
            except Exception as error:  # networks, disks and services fail in many ways; none may end the training
                alive = False
                failed(state.global_step, error)
                return None

        return call

    for name in _EVENTS:
        setattr(tracker, name, guarded(getattr(tracker, name)))
