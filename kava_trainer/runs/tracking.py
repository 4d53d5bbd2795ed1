"""What a run tells its trackers beside the log lines of its training: what the models are worth, and the report.

How each tracker is reached once the training is over was read in transformers 5.23.0, tensorboard 2.21.0, trackio
0.43.0 and wandb 0.31.0. A tracker that is not named here gets the log lines alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reports.summary import REPORT_PAGE, REPORT_PICTURE, Summary
from ..trainer.callbacks.trackers import GuardedTracker
from ..trainer.trainer import KavaTrainer


@dataclass(frozen=True)
class _Outcome:
    """What is handed to a tracker at the end."""

    trainer: KavaTrainer
    verdict: str
    page: Path
    picture: Path

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    @property
    def files(self) -> list[Path]:
        """Those files of the report that are there."""
        return [path for path in (self.page, self.picture) if path.is_file()]


class RunTracking(TrainerCallback):
    """Tells the trackers of a run what teacher and students are worth, the verdict, and the report.

    A tracker that fails is told once, noted under problems and left out, as everywhere else.

    Args:
        trainer: of the run.
        summary: its summary, which is filled while it goes on.
    """

    def __init__(self, trainer: KavaTrainer, summary: Summary) -> None:
        self._trainer, self._summary = trainer, summary
        self._told: set[str] = set()
        self._foreign = _wandb_run(trainer.trackers) is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was measured before the first step stands at the first step, where the curves begin."""
        self.tell()

    def tell(self) -> None:
        """Log the evaluations that were made since the last call, and the verdict once there is one."""
        measured = self._summary.evaluation.measured()
        found = {f"eval_{who}_{name}": value for who, row in measured.items() for name, value in vars(row).items()}
        success = self._summary.verdict.success
        found["eval_success"] = None if success is None else float(success)
        new = {name: value for name, value in found.items() if value is not None and name not in self._told}
        self._told.update(new)
        if new and self._trainer.trackers and self._trainer.is_world_process_zero():
            trainer = self._trainer
            trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, new)

    def attach_report(self, folder: str | Path) -> None:
        """Hand the report of an output folder to the trackers, where there is one, and the verdict in words.

        TensorBoard, which takes no files, gets the picture and the place of the page.
        """
        verdict = self._summary.verdict
        judged = {True: "Success.", False: "No success.", None: "No verdict."}[verdict.success]
        text = "\n".join([judged, *(f"- {reason}" for reason in verdict.reasons)])
        outcome = _Outcome(self._trainer, text, Path(folder) / REPORT_PAGE, Path(folder) / REPORT_PICTURE)
        for tracker in self._living():
            if tracker.name in _ATTACH:
                tracker.attempt(outcome.step, partial(_ATTACH[tracker.name], tracker.callback, outcome))

    def close(self, succeeded: bool) -> None:
        """End what Trainer leaves open: all is written then, and another run in this process is one of its own.

        Args:
            succeeded: whether the run was completed; a tracker may show it.
        """
        trainer = self._trainer
        for tracker in self._living():
            if tracker.name in ("tensorboard", "trackio"):
                tracker.callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
            elif tracker.name == "wandb" and not self._foreign:
                tracker.attempt(trainer.state.global_step, partial(_finish_wandb, succeeded))

    def _living(self) -> list[GuardedTracker]:
        """The trackers that nobody has removed from the trainer; on the main process alone."""
        there = self._trainer.callback_handler.callbacks if self._trainer.is_world_process_zero() else []
        return [tracker for tracker in self._trainer.trackers if tracker.callback in there]


def keep_apart(trackers: list[GuardedTracker], name: str) -> None:
    """Let TensorBoard write to a folder of its own although `TENSORBOARD_LOGGING_DIR` gives all runs one."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            callback = cast(Any, tracker.callback)
            callback.logging_dir = str(Path(callback.logging_dir) / name)


def _to_tensorboard(callback: Any, outcome: _Outcome) -> None:
    """Trainer's callback has closed its writer; a new one in the same folder goes on."""
    import numpy
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=callback.logging_dir) as writer:
        writer.add_text("verdict", outcome.verdict, outcome.step)
        if outcome.page.is_file():
            writer.add_text("report", str(outcome.page.resolve()), outcome.step)
        if outcome.picture.is_file():
            with Image.open(outcome.picture) as picture:
                pixels = numpy.asarray(picture.convert("RGB"))
            writer.add_image("report", pixels, outcome.step, dataformats="HWC")


def _to_trackio(callback: Any, outcome: _Outcome) -> None:
    """Trainer's callback has finished its run; it goes on with it, by its name, where nothing else has done so."""
    import trackio

    trainer = outcome.trainer
    if trackio.context_vars.current_run.get() is None:
        callback.setup(trainer.args, trainer.state, trainer.student)
    trackio.log({"verdict": trackio.Markdown(outcome.verdict), "train/global_step": outcome.step})
    if outcome.files:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", f"report-{trainer.args.run_name}")
        artifact = trackio.Artifact(name, type="report")
        for path in outcome.files:
            artifact.add_file(path)
        trackio.log_artifact(artifact)


def _to_wandb(callback: Any, outcome: _Outcome) -> None:
    """Its run is open until the process ends, or `close`."""
    import wandb

    if wandb.run is None:
        return
    wandb.run.summary["verdict"] = outcome.verdict
    if outcome.page.is_file():
        page = wandb.Html(str(outcome.page), inject=False)
        wandb.run.log({"report": page, "train/global_step": outcome.step})
    if outcome.files:
        artifact = wandb.Artifact(f"report-{wandb.run.id}", type="report")
        for path in outcome.files:
            artifact.add_file(str(path))
        wandb.run.log_artifact(artifact)


def _wandb_run(trackers: list[GuardedTracker]) -> Any:
    """The run that W&B has open, where it is a tracker at all."""
    if not any(tracker.name == "wandb" for tracker in trackers):
        return None
    import wandb

    return wandb.run


def _finish_wandb(succeeded: bool) -> None:
    import wandb

    if wandb.run is not None:
        wandb.finish(exit_code=0 if succeeded else 1)


_ATTACH: dict[str, Callable[[Any, _Outcome], None]] = {
    "tensorboard": _to_tensorboard,
    "trackio": _to_trackio,
    "wandb": _to_wandb,
}
