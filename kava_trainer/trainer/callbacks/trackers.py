"""Trackers that fail: told once, left out from then on, and never the end of a run."""

import os
import re
from collections.abc import Callable
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
    integration_utils,
)
from transformers.integrations.integration_utils import default_logdir, rewrite_logs

from ...distillation.model import DistillationModel
from ...utils.console import Console
from ...utils.errors import Problem, reason_of

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]

_OF_A_PAIR = re.compile(r"pair\d+_")
"""In names of figures of one pair of layers, see `probe.ProbeResult.metrics`."""

Failed = Callable[[int, Exception], None]
"""Is told the step and the error, once."""


def tracker_problem(names: list[str]) -> Problem | None:
    """Why one of these trackers cannot be used; None where all of them can be set up."""
    for name in names:
        is_installed = getattr(integration_utils, f"is_{name}_available", lambda: True)  # most names have one
        try:
            if not is_installed():  # that of MLflow prints a traceback of its own where it is made in vain
                raise ImportError(f"{name} is not installed")
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except Exception as error:  # each package has its own way to say that it is missing
            reason = reason_of(error).rstrip(".")
            what = f"report_to {name} cannot be used ({reason})."
            return Problem("report_to", what, "Install what it needs, or write another.")
    return None


class GuardedTracker:
    """One tracker, made harmless: the first exception of any event is the last that it is called for.

    Args:
        name: as `report_to` has it.
        callback: what Trainer calls; it stays the object and the class that it was.
        failed: is told.
    """

    def __init__(self, name: str, callback: TrainerCallback, failed: Failed) -> None:
        self.name, self.callback = name, callback
        self._failed, self._alive = failed, True
        for event in _EVENTS:
            setattr(callback, event, self._guarded(getattr(callback, event)))

    def attempt(self, step: int, work: Callable[[], Any]) -> Any:
        """What `work` gives, which talks to the tracker; None where the tracker fails, or has failed before."""
        if not self._alive:
            return None
        try:
            return work()
        except Exception as error:  # networks, disks and services fail in many ways; none may end the training
            self._alive = False
            self._failed(step, error)
            return None

    def _guarded(
        self, event: Callable[..., TrainerControl | None]
    ) -> Callable[[TrainingArguments, TrainerState, TrainerControl], TrainerControl | None]:
        def call(
            args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> TrainerControl | None:
            if isinstance(model := kwargs.get("model"), DistillationModel):
                kwargs["model"] = model.student  # trackers look into it, and Weights & Biases may save it
            return self.attempt(state.global_step, lambda: event(args, state, control, **kwargs))

        return call


def guard_trackers(
    callbacks: list[TrainerCallback], args: TrainingArguments, console: Console, problems: list[dict[str, Any]]
) -> list[GuardedTracker]:
    """Make the trackers among a trainer's callbacks harmless.

    They stay the objects and the classes that they were, so `trainer.remove_callback(WandbCallback)` works.

    Args:
        callbacks: of the trainer; those that `report_to` brought in come before any that the user supplied.
        args: `report_to` names the trackers.
        console: tells of a failure.
        problems: takes a note of it.
    """
    found = []
    for name in args.report_to or []:
        for kind in get_reporting_integration_callbacks([name]):
            tracker = next((callback for callback in callbacks if type(callback) is kind), None)
            if tracker is None:
                continue
            if isinstance(tracker, WandbCallback):
                cast(Any, tracker).on_log = _without_summary_of_pairs(tracker.on_log)
            found.append(GuardedTracker(name, tracker, _teller(name, console, problems)))
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
                # It would choose this itself when a training begins; a line before that would go to ./runs.
                tracker.logging_dir = os.path.join(cast(str, args.output_dir), default_logdir())
    return found


def _without_summary_of_pairs(on_log: Callable[..., None]) -> Callable[..., None]:
    """Let the figures of single pairs of layers be curves alone.

    With `WANDB_LOG_MODEL` the whole summary becomes a model's metadata, which holds 100 names at most; and where many
    layers are aligned it would show little else. A pattern would not do: Trainer's own `*` matches as well, and which
    of the two counts is chance (seen in wandb 0.31.0).
    """
    defined: set[tuple[str, str]] = set()

    def call(
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        import wandb

        if wandb.run is not None:
            for name in filter(_OF_A_PAIR.search, rewrite_logs(logs or {})):
                if (wandb.run.id, name) not in defined:
                    wandb.define_metric(name, step_metric="train/global_step", step_sync=True, summary="none")
                    defined.add((wandb.run.id, name))
        on_log(args, state, control, logs=logs, **kwargs)

    return call


def _teller(name: str, console: Console, problems: list[dict[str, Any]]) -> Failed:
    def tell(step: int, error: Exception) -> None:
        reason = reason_of(error).rstrip(".")
        console.warn(f"Reporting to {name} failed at step {step} ({reason}); it is left out from here on.")
        problems.append({"step": step, "kind": "tracker", "action": f"left {name} out from here on: {reason}"})

    return tell
