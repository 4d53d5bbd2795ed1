"""Checkpoints on their way to the hub while the training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import HubStrategy

from ...config.arguments import KavaTrainingArguments
from ...utils.errors import BadRequest, Problem, reason_of
from ...utils.hub import (
    ANSWER_SECONDS,
    CHECKPOINT_SECONDS,
    Place,
    check_private,
    hub_reason,
    in_background,
    in_time,
    make_branch,
    push_command,
    show_bars,
)
from ..incidents import Incidents

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


def send_folder(
    folder: TemporaryDirectory[str], message: str | None, blocking: bool, token: str | None, place: dict[str, Any]
) -> CommitInfo | Future[CommitInfo]:
    """Send all of a folder, which is then gone; the commit, or its future where `blocking` is false.

    Args:
        folder: is sent.
        message: of the commit.
        blocking: wait until all is sent.
        token: of the hub; None for that of a login.
        place: the `repo_id` and the `revision`.
    """
    sent: Future[CommitInfo] = HfApi(token=token).upload_folder(
        folder_path=folder.name, commit_message=message, run_as_future=True, **place
    )
    sent.add_done_callback(lambda _: folder.cleanup())
    return sent.result() if blocking else sent


def make_repository(
    make: Callable[[], None], repo_id: Callable[[], str], arguments: KavaTrainingArguments, token: str | None
) -> None:
    """Make the repository of a run, and its branch.

    Args:
        make: makes the repository, as Trainer does.
        repo_id: tells its full name, once it is made.
        arguments: of the run.
        token: in place of that of the arguments.

    Raises:
        BadRequest: if that does not work.
    """

    def work() -> None:
        make()
        if arguments.process_index == 0:
            private, revision = arguments.hub_private_repo, arguments.hub_revision
            place = Place(repo_id(), token or arguments.hub_token, private, revision)
            make_branch(place)
            check_private(place)

    try:
        in_time(work, ANSWER_SECONDS)
    except BadRequest:
        raise
    except Exception as error:  # the network fails in many ways
        raise BadRequest.of(no_repository(error, arguments)) from error


class CheckpointPusher(TrainerCallback):
    """Sends checkpoints to the hub in the background. What fails is told and noted, and harms nothing.

    Args:
        repo_id: where to.
        arguments: `every_save` sends the student alone, `checkpoint` all of a checkpoint as `last-checkpoint`,
            `all_checkpoints` all of it under its own name. A checkpoint is left out while another is on its way,
            unless `hub_always_push` is set.
        incidents: takes a note of each failure.
        announce: called before each checkpoint that is sent.
    """

    def __init__(
        self, repo_id: str, arguments: KavaTrainingArguments, incidents: Incidents, announce: Callable[[], Any]
    ) -> None:
        self._repo_id, self._arguments, self._incidents, self._announce = repo_id, arguments, incidents, announce
        self._running: dict[Future[None], tuple[Path, int]] = {}
        self._told: set[str] = set()
        self._bars_were_on: bool | None = None

    def push(self, folder: Path, step: int) -> None:
        """Begin to send a checkpoint, which must be complete.

        Trainer would send all of `output_dir` with its pickled arguments, and those hold the hub token.
        """
        if self._bars_were_on is None:
            self._bars_were_on = show_bars(False)  # a bar of the background would stand among the status lines
        self._note_done()
        if self._running and not self._arguments.hub_always_push:
            return
        self._announce()
        self._running[in_background(lambda: self._upload(folder), after=list(self._running))] = (folder, step)

    def finish(self) -> None:
        """Wait for what is on its way, `CHECKPOINT_SECONDS` at most; what takes longer is told and left alone."""
        if not all(job.done() for job in self._running):
            self._incidents.console.print(f"Waiting for the hub, {CHECKPOINT_SECONDS:g} seconds at most.")
            wait(self._running, timeout=CHECKPOINT_SECONDS)
        self._note_done()
        for folder, step in self._running.values():
            self._tell(folder, step, f"the hub has not taken it within {CHECKPOINT_SECONDS:g} seconds")
        self._running.clear()
        if self._bars_were_on is not None:
            show_bars(self._bars_were_on)
        self._bars_were_on = None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the checkpoints that are on their way, but not for ever."""
        self.finish()

    def _note_done(self) -> None:
        """Tell of the failures since the last time, from the thread that trains."""
        for job in [job for job in self._running if job.done()]:
            folder, step = self._running.pop(job)
            if error := job.exception():
                self._tell(folder, step, hub_reason(error))

    def _upload(self, folder: Path) -> None:
        strategy = HubStrategy(self._arguments.hub_strategy)
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
        self._incidents.note("hub", f"did not send {folder.name}: {reason}", step)
        if reason not in self._told:
            kept = f" It is whole in {folder}." if folder.is_dir() else ""  # save_total_limit may have deleted it
            self._incidents.console.warn(f"{folder.name} was not sent to the hub ({reason}).{kept}")
        self._told.add(reason)
