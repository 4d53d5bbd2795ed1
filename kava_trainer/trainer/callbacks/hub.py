"""Checkpoints on their way to the hub while the training goes on."""

from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from transformers.trainer_utils import HubStrategy

from ...config.arguments import KavaTrainingArguments
from ...utils.console import Console
from ...utils.errors import Problem, reason_of
from ...utils.hub import CHECKPOINT_SECONDS, Place, hub_reason, in_background, push_command, show_bars

_STATE_FILES = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "projector.pth",
    "progress_*.pth", "manifest.json", "optimizer_*/*", "pytorch_model_fsdp_*/*",
]  # fmt: skip
"""What of a checkpoint only resuming needs."""


def no_repository(error: BaseException, arguments: KavaTrainingArguments) -> Problem:
    """What is wrong where the hub did not make the run's repository before the training.

    Args:
        error: what it or the network answered.
        arguments: of the run, with `push_to_hub`.
    """
    if isinstance(error, HFValidationError):
        remedy = f"write it as owner/name ({reason_of(error).rstrip('.')})."
        return Problem("hub_model_id", f"hub_model_id is {arguments.hub_model_id!r};", remedy)
    answered = getattr(error, "response", None) is not None
    what = "did not make the run's repository" if answered else "cannot be reached"
    login = "Log in with hf auth login, or set HF_TOKEN. " if answered else ""
    place = Place(arguments.hub_model_id or "NAME", None, arguments.hub_private_repo, arguments.hub_revision)
    return Problem(
        "push_to_hub",
        f"push_to_hub true needs the hub, which {what} ({hub_reason(error)}).",
        f"{login}Or write push_to_hub false, and send the student afterwards: "
        f"{push_command(arguments.output_dir, place)}",
    )


class CheckpointPusher:
    """Sends checkpoints to the hub in the background. What fails is told and noted, and harms nothing.

    Args:
        repo_id: where to.
        arguments: `every_save` sends the student alone, `checkpoint` all of a checkpoint as `last-checkpoint`,
            `all_checkpoints` all of it under its own name. A checkpoint is left out while another is on its way,
            unless `hub_always_push` is set.
        problems: takes a note of each failure.
    """

    def __init__(self, repo_id: str, arguments: KavaTrainingArguments, problems: list[dict[str, Any]]) -> None:
        self._repo_id, self._arguments, self._problems = repo_id, arguments, problems
        self._console = Console(arguments.plain_output)
        self._running: dict[Future, tuple[Path, int]] = {}
        self._told: set[str] = set()
        self._bars_were_on = show_bars(False)  # a bar of the background would stand among the status lines

    def push(self, folder: Path, step: int) -> None:
        """Begin to send a checkpoint, which must be complete."""
        self._note_done()
        if self._running and not self._arguments.hub_always_push:
            return
        self._running[in_background(lambda: self._upload(folder), after=list(self._running))] = (folder, step)

    def finish(self) -> None:
        """Wait for what is on its way, `CHECKPOINT_SECONDS` at most; what takes longer is told and left alone."""
        if not all(job.done() for job in self._running):
            self._console.print(f"Waiting for the hub, {CHECKPOINT_SECONDS:g} seconds at most.")
            wait(self._running, timeout=CHECKPOINT_SECONDS)
        self._note_done()
        for folder, step in self._running.values():
            self._tell(folder, step, f"the hub has not taken it within {CHECKPOINT_SECONDS:g} seconds")
        self._running.clear()
        show_bars(self._bars_were_on)

    def _note_done(self) -> None:
        """Tell of the failures since the last time, from the thread that trains."""
        for job in [job for job in self._running if job.done()]:
            folder, step = self._running.pop(job)
            if error := job.exception():
                self._tell(folder, step, hub_reason(error))

    def _upload(self, folder: Path) -> None:
        strategy = self._arguments.hub_strategy
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        HfApi(token=self._arguments.hub_token).upload_folder(
            repo_id=self._repo_id,
            folder_path=folder,
            path_in_repo=names.get(strategy),
            ignore_patterns=None if strategy in names else list(_STATE_FILES),
            revision=self._arguments.hub_revision,
            commit_message=f"Training in progress, {folder.name}",
        )

    def _tell(self, folder: Path, step: int, reason: str) -> None:
        self._problems.append({"step": step, "kind": "hub", "action": f"did not send {folder.name}: {reason}"})
        if reason not in self._told:
            kept = f" It is whole in {folder}." if folder.is_dir() else ""  # save_total_limit may have deleted it
            self._console.warn(f"{folder.name} was not sent to the hub ({reason}).{kept}")
        self._told.add(reason)
