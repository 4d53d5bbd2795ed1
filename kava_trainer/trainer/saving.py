"""Whole checkpoints: how a trainer writes, reads, rotates and sends them, where Trainer's own way does not fit."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..distillation.model import DistillationModel
from ..distillation.projector_files import write_projectors
from ..utils.atomic_files import discard, publish, stage, staging_folder, write_folder_atomically
from ..utils.console import Console
from ..utils.distributed import all_succeed, any_rank, own_part
from ..utils.errors import BadRequest, Interrupted, RunFailed, reason_of
from ..utils.hub import ANSWER_SECONDS, Place, check_private, in_time, make_branch
from ..utils.progress_bar import show_progress_bars
from ..utils.signals import WATCH
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.hub import CheckpointPusher, no_repository
from .callbacks.status import StatusCallback
from .checkpoint import (
    PROJECTOR_FILE,
    TRAINER_STATE_FILE,
    find_newest_checkpoint,
    read_progress,
    rotate,
    save_progress,
    unreadable_checkpoint,
    write_manifest,
)
from .final_student import final_checksums, is_same_student
from .weights import UNREADABLE, PushingTrainer


def _from_numbered_cpu(storage: Any, location: str) -> Any:
    """Trainer restores an optimizer to a rank's device, which is `cpu:0` on a CPU; torch 2.11 knows only `cpu`."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(11, lambda storage: None, _from_numbered_cpu)

MOST_FAILED_SAVES = 2
"""So many saves may fail one after the other: the disk may have room again at the next one."""

_SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for a full disk


class SavingTrainer(PushingTrainer):
    """A `WeightsTrainer` that loses no run."""

    problems: list[dict[str, Any]]
    """What went wrong and did not end the run: the step, a kind, and what was done about it."""

    def __init__(self, model: DistillationModel, **kwargs: Any) -> None:
        self._pusher: CheckpointPusher | None = None
        super().__init__(model=model, **kwargs)
        self.console = Console(self.args.plain_output)
        show_progress_bars(not (self.args.plain_output or self.args.disable_tqdm))
        self.status = StatusCallback(self.args.plain_output)
        self.emergency = EmergencyCheckpointCallback(self.try_to_save_projector)
        self.identity: dict[str, Any] | None = None
        """What the run was asked for; it goes into every checkpoint, see `identity.run_identity`."""
        self.run_time: Callable[[], dict[str, Any]] | None = None
        """Tells when the run began and how long it has taken; that goes into every checkpoint too."""
        self.problems: list[dict[str, Any]] = []
        """What went wrong and was survived: the step, the kind, and what was done."""
        self._failed_saves = 0

    def note_problem(self, kind: str, action: str, step: int | None = None) -> None:
        """Add to `problems`; the step is the last finished one by default."""
        self.problems.append({"step": self.state.global_step if step is None else step, "kind": kind, "action": action})

    def advice(self) -> str:
        """What to resume from after the training went wrong, as a sentence."""
        newest = find_newest_checkpoint(self.args.output_dir).checkpoint
        return f"Resume from {newest}, which is sound." if newest else "There is no checkpoint yet; start afresh."

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the hub repository, as `Trainer` does, and its branch. Raises `BadRequest` if that does not work."""

        def make() -> None:
            if private is not None:  # transformers 5.17 takes no such word
                self.args.hub_private_repo = private
            super(SavingTrainer, self).init_hf_repo(token)
            if self.is_world_process_zero():
                make_branch(self._place(token))
                check_private(self._place(token))

        try:
            in_time(make, ANSWER_SECONDS)
        except BadRequest:
            raise
        except Exception as error:  # the network fails in many ways
            raise BadRequest.of(no_repository(error, self.args)) from error

    def _place(self, token: str | None) -> Place:
        args = self.args
        return Place(cast(str, self.hub_model_id), token or args.hub_token, args.hub_private_repo, args.hub_revision)

    def not_finite(self, what: str) -> RunFailed:
        """The error for losses or weights that are no finite numbers any more."""
        return RunFailed(
            f"At step {self.state.global_step} {what} stopped being finite numbers. {self.advice()} Lower the "
            "learning rates."
        )

    def try_to_save_projector(self, path: Path) -> None:
        """Write the projectors as `save_projector` does; where that fails say so and go on."""
        try:
            self.save_projector(path)
        except _SAVE_ERRORS as error:
            self.console.warn(f"{path} could not be written: {reason_of(error)}.")
            self.note_problem("save", f"went on without {path.name}")

    def save_finals(
        self, student_folder: Path, projector: Path, merge_adapter: bool = True
    ) -> tuple[bool, dict[str, str]]:
        """Write the finished student and its projector, whole or not at all.

        A folder that holds a student with the same weights already stays as it is: somebody may have changed its card.

        Returns:
            Whether the student was written, and `final_checksums`; on the process that writes.

        Raises:
            RunFailed: if the disk does not take them.
        """
        state, projectors = self.gathered_student(), self.gathered_projectors()
        written, checksums = False, dict[str, str]()

        def write() -> None:
            nonlocal written, checksums
            if self.args.should_save:
                save = partial(self.save_student, merge_adapter=merge_adapter, state_dict=state)
                written = write_folder_atomically(student_folder, save, is_same_student)
                write_projectors(projectors, projector)
                checksums = final_checksums(student_folder, projector)

        if (problem := all_succeed(write)) is not None:
            raise RunFailed(
                f"The finished student could not be written to {student_folder} ({problem}). If there is no room, make "
                f"some, or name another final_dir. {self.advice()}"
            )
        return written, checksums

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student; inside a checkpoint also the projectors beside it.

        Raises:
            RunFailed: if a weight is no finite number, before anything is written.
        """
        if any_rank(not all(own_part(parameter).isfinite().all() for parameter in self.model.parameters())):
            raise self.not_finite("weights")
        state = self.gathered_student()
        projectors = self.gathered_projectors(with_decoders=True) if _internal_call else {}
        if self.is_fsdp_enabled:  # Trainer would not write the student
            self._save(output_dir, state)
        else:
            super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.args.should_save:
            write_projectors(projectors, Path(output_dir or self.args.output_dir) / PROJECTOR_FILE)

    def before_optimizer_step(self, grad_norm: torch.Tensor | float) -> None:
        """Called once for each optimizer step, with the norm of its gradient before clipping."""

    def progress_state(self) -> dict[str, Any]:
        """What this rank needs beside weights, optimizer and random numbers to go on as if it had not stopped."""
        return {
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "problems": self.problems,
            "run_time": self.run_time and self.run_time(),
            "evaluation_pending": self.emergency.evaluation_pending,
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Undo `progress_state`, after Trainer has set its own counters to zero.

        With another number of ranks the next log line covers the steps from here on.
        """
        self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], self.state.global_step
        if state["same_ranks"]:
            self._tr_loss, self._globalstep_last_logged = state["loss"].to(self.args.device), state["last_logged"]
        self.problems[:] = [*state["problems"], *self.problems]
        self.state.compute_steps(self.args, self.state.max_steps)  # Trainer would keep the checkpoint's intervals

    def catch_up(self, state: dict[str, Any], checkpoint: str) -> None:
        """Do what was due at a checkpoint and gave way to a signal."""
        if state["evaluation_pending"] and self._determine_best_metric(self._evaluate(None, None), None):
            self.state.best_model_checkpoint = checkpoint

    def read_progress(self, checkpoint: str) -> dict[str, Any]:
        """What `progress_state` put into a checkpoint, see `progress.read_progress`."""
        return read_progress(checkpoint, self.args.process_index, self.args.world_size)

    def _write_weights(self, folder: Path) -> None:
        """Write student and projectors into a folder."""
        folder.mkdir(parents=True, exist_ok=True)  # on another machine than the first, whose disk is not shared
        self.save_model(str(folder), _internal_call=True)

    def _write_the_rest(self, folder: Path) -> None:
        """Let every rank write its part of what resuming needs beside them, with Trainer's own methods."""
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            save_progress(folder, self.args.process_index, self.args.world_size, self.progress_state())
        if self.args.should_save:
            callbacks: list[Any] = [*self.callback_handler.callbacks, self.control]
            stateful: list[Any] = [callback for callback in callbacks if isinstance(callback, ExportableState)]
            exported = TrainerState(stateful_callbacks=stateful)
            self.state.stateful_callbacks = exported.stateful_callbacks
            self.state.save_to_json(str(folder / TRAINER_STATE_FILE))

    def _stage(self, folder: Path) -> None:
        if self.args.should_save:
            stage(folder)

    def _seal(self, folder: Path, staging: Path) -> None:
        if self.args.should_save:
            write_manifest(staging, self.identity)
            publish(folder)

    def _checkpoint_problem(self, folder: Path) -> str | None:
        """Write a checkpoint whole or not at all; why it could not be, if so."""
        staging = staging_folder(folder)
        steps = (
            lambda: self._stage(folder),
            lambda: self._write_weights(staging),
            lambda: self._write_the_rest(staging),
            lambda: self._seal(folder, staging),
        )
        for step in steps:
            if (problem := all_succeed(step)) is not None:
                if self.args.should_save:
                    discard(folder)
                return problem
        return None

    def _rotate(self, run_dir: Path, kept: list[Path]) -> None:
        """Delete the oldest checkpoints; one that cannot be deleted is told and left."""
        try:
            rotate(run_dir, self.args.save_total_limit, kept)
        except OSError as error:
            self.console.warn(f"An old checkpoint in {run_dir} could not be deleted: {reason_of(error)}.")
            self.note_problem("save", "left an old checkpoint")

    def _tell_failed_save(self, folder: Path, problem: str) -> None:
        """Note a save that failed. Raises `RunFailed` for one too many in a row, while the training goes on."""
        self._failed_saves += 1
        ends = self.control.should_training_stop or WATCH.received is not None
        free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
        told = f"{folder} could not be written ({problem}; {free / 1e9:.2f} GB are free there)."
        if self._failed_saves >= MOST_FAILED_SAVES and not ends:
            raise RunFailed(f"{told} It is save number {self._failed_saves} that failed in a row. {self.advice()}")
        goes_on = "The training ends here, without it." if ends else "The training tries again at the next save."
        self.console.warn(f"{told} {goes_on} {self.advice()}")
        self.note_problem("save", f"went on without {folder.name}")

    # The private methods of Trainer that KAVA overrides are below; all were read in transformers 5.23.0 and 5.17.0.
    # What it calls or reads beside them: the parts of a checkpoint, the best metric and the loss sums above, the loss
    # sum also in `fitting.py`; `_train_batch_size` in `stepping.py`; `_prepare_inputs` in `evaluating.py`;
    # `_hp_search_setup`, `_trial` and `_get_output_dir` in `trainer.py`.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is whole or absent, then rotate and send. Trainer would write it in place."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.store_flos()
        best_before = self.state.best_model_checkpoint
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if (problem := self._checkpoint_problem(folder)) is not None:
            self.state.best_model_checkpoint = best_before
            self._tell_failed_save(folder, problem)
            return
        self._failed_saves = 0
        if self.args.should_save:
            kept = [folder, *([Path(found)] if (found := self.state.best_model_checkpoint) else [])]
            self._rotate(run_dir, kept)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's; it is the last thing known before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self.before_optimizer_step(grad_norm)
        return grad_norm

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As Trainer's; where a signal ends the evaluation, save at once and stop."""
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Interrupted as interruption:
            self.emergency.stop(interruption.number, self.control)
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except UNREADABLE as error:
            raise unreadable_checkpoint(checkpoint, error) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except UNREADABLE as error:
            raise unreadable_checkpoint(checkpoint, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send a checkpoint to the hub as `hub_strategy` asks, in the background.

        Trainer would send all of `output_dir` with its pickled arguments, and those hold the hub token.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._pusher is None:
            self._pusher = CheckpointPusher(cast(str, self.hub_model_id), self.args, self.problems)
        self._pusher.push(Path(checkpoint_folder), self.state.global_step)

    def _finish_current_push(self) -> None:
        """Wait for the checkpoints that are on their way, but not for ever."""
        if self._pusher is not None:
            self._pusher.finish()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which would delete all but the best checkpoint, also the one that a signal has just left."""
        best = self.state.best_model_checkpoint
        if self.emergency.received is not None:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.state.best_model_checkpoint = best
