"""Whole checkpoints: how a trainer writes, reads, rotates and sends them, where Trainer's own way does not fit.

Every private method of Trainer that KAVA overrides is here.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, speed_metrics

from ..config.arguments import KavaTrainingArguments
from ..distillation.model import DistillationModel
from ..distillation.projector_files import write_projectors
from ..utils.atomic_files import discard, publish, stage, staging_folder, write_folder_atomically
from ..utils.distributed import all_succeed
from ..utils.errors import Interrupted, RunFailed, reason_of
from ..utils.progress_bar import working
from ..utils.signals import WATCH
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.hub import CheckpointPusher, make_repository
from .checkpoint import PROJECTOR_FILE, TRAINER_STATE_FILE, rotate, unreadable_checkpoint, write_manifest
from .final_student import final_checksums, is_same_student
from .incidents import Incidents
from .run_state import RunState, read_progress
from .step import StepRunner
from .throughput import Throughput
from .weights import Weights


def _from_numbered_cpu(storage: Any, location: str) -> Any:
    """Trainer restores an optimizer to a rank's device, which is `cpu:0` on a CPU; torch 2.11 knows only `cpu`."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(11, lambda storage: None, _from_numbered_cpu)

MOST_FAILED_SAVES = 2
"""So many saves may fail one after the other: the disk may have room again at the next one."""

_SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for a full disk


UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, SafetensorError, UnpicklingError,
    CheckpointException,
)  # fmt: skip
"""What transformers, torch and safetensors raise for files that are not what they should be. The last one, of sharded
weights, is no `Exception` even."""


class SavingTrainer(Trainer):
    """A `Trainer` of a `DistillationModel` that loses no run, and keeps student and projectors apart on disk."""

    args: KavaTrainingArguments
    model: DistillationModel
    incidents: Incidents
    emergency: EmergencyCheckpointCallback
    run_state: RunState
    clock: Throughput
    steps: StepRunner
    pusher: CheckpointPusher | None = None
    """Sends checkpoints, where `push_to_hub` and `hub_strategy` ask for it; on the main process."""
    identity: dict[str, Any] | None = None
    """What the run was asked for; it goes into every checkpoint, see `identity.run_identity`."""
    run_time: Callable[[], dict[str, Any]] | None = None
    """Tells when the run began and how long it has taken; that goes into every checkpoint too."""
    _failed_saves = 0

    @property
    def weights(self) -> Weights:
        """Student and projectors as weights."""
        return Weights(self.model, self.args, self.processing_class)

    @property
    def micro_batch_size(self) -> int:
        """Examples of a micro-batch, which Trainer may have lowered."""
        return self._train_batch_size

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the hub repository, as `Trainer` does, and its branch. Raises `BadRequest` if that does not work."""
        if private is not None:  # transformers 5.17 takes no such word
            self.args.hub_private_repo = private
        make_repository(partial(super().init_hf_repo, token), lambda: str(self.hub_model_id), self.args, token)

    def try_to_save_projector(self, path: Path) -> None:
        """Write the projectors to a file; where that fails say so and go on."""
        if not self.model.target.projectors:
            return
        try:
            self.weights.save_projector(path)
        except _SAVE_ERRORS as error:
            self.incidents.console.warn(f"{path} could not be written: {reason_of(error)}.")
            self.incidents.note("save", f"went on without {path.name}")

    def save_finals(
        self, student_folder: Path, projector: Path, merge_adapter: bool = True
    ) -> tuple[bool, dict[str, str]]:
        """Write the finished student and its projector, whole or not at all.

        A folder that holds a student with the same weights already stays as it is: somebody may have changed its card.

        Returns:
            Whether the student was written, and `final_checksums`; on the process that writes.

        Raises:
            RunFailed: if the disk does not take them, or they cannot be saved; it says where the weights are.
        """
        weights = self.weights
        state, projectors = weights.gathered_student(merge_adapter), weights.projectors()
        written, checksums = False, dict[str, str]()

        def write() -> None:
            nonlocal written, checksums
            if self.args.should_save:
                save = partial(weights.export_student, merge_adapter=merge_adapter, state_dict=state)
                with weights.kept(student_folder, state):
                    written = write_folder_atomically(student_folder, save, is_same_student)
                    if projectors["config"]:
                        write_projectors(projectors, projector)
                    else:  # one of an earlier run would be taken for this run's
                        projector.unlink(missing_ok=True)
                checksums = final_checksums(student_folder, projector)

        if (problem := all_succeed(write)) is not None:
            told = f"The finished student could not be written to {student_folder}: {problem.rstrip('.')}."
            raise RunFailed(f"{told} {self.incidents.advice(otherwise='')}".rstrip())
        return written, checksums

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student; inside a checkpoint also the projectors beside it.

        Raises:
            RunFailed: if a weight is no finite number, before anything is written.
        """
        weights = self.weights
        if not weights.are_finite():
            raise self.incidents.not_finite("weights")
        state = weights.gathered_student()
        projectors = weights.projectors(with_decoders=True) if _internal_call else {}
        folder = Path(output_dir or str(self.args.output_dir))
        weights.write_student(folder, state)
        if _internal_call and self.args.should_save:
            write_projectors(projectors, folder / PROJECTOR_FILE)
        elif self.args.push_to_hub and not _internal_call:  # a user has called it
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def state_dict(self) -> dict[str, Any]:
        """Trainer's own sums, and when the run began, for a checkpoint."""
        return {
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "run_time": self.run_time and self.run_time(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put Trainer's sums back; with another number of ranks the next log line covers the steps from here on."""
        loss, self._globalstep_last_logged = torch.zeros_like(state["loss"]), self.state.global_step
        if state["same_ranks"]:
            loss, self._globalstep_last_logged = state["loss"], state["last_logged"]
        # transformers 5.23.0 divides what a session has lost by its own steps, and 5.17.0 by all of the training's.
        self._total_loss_scalar = -loss.item() if hasattr(self, "_initial_global_step") else state["total_loss"]
        self._tr_loss = loss.to(self.args.device)

    def take_up_finished(self, checkpoint: str) -> TrainOutput | None:
        """Load a checkpoint with no step left to train, as if it had just been trained; None where steps are left."""
        state = self.finished_state(checkpoint)
        if state is None:
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        self._restore_callbacks()
        progress = read_progress(checkpoint, self.args.process_index, self.args.world_size)
        self.clock.load_state_dict(progress)
        self.incidents.problems[:] = progress["problems"]
        best = state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and Path(best).is_dir():
            self._load_best_model()
        self.incidents.console.print("The checkpoint is at the last step already; nothing is left to train.")
        metrics = speed_metrics("train", time.time(), num_samples=0, num_steps=0)
        metrics |= {"total_flos": state.total_flos, "train_loss": 0.0, "epoch": state.epoch}
        return TrainOutput(state.global_step, 0.0, metrics)

    def _restore_callbacks(self) -> None:
        """Give the callbacks the states that they were saved with, where `args` ask for it.

        Trainer puts new ones in their place; here they stay the objects that the user has in hand.
        """
        own = list(self.callback_handler.callbacks)
        self._load_callback_state()
        restored = [callback for callback in self.callback_handler.callbacks if callback not in own]
        for old in (old for old in own if old not in self.callback_handler.callbacks):
            new = next(new for new in restored if type(new) is type(old))
            restored.remove(new)
            vars(old).update(vars(new))
        self.callback_handler.callbacks[:] = own

    def finished_state(self, checkpoint: str) -> TrainerState | None:
        """The state of a checkpoint with no step left to train, else None."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state if state.global_step >= max_steps else None

    @contextmanager
    def explained(self, checkpoint: str | None) -> Iterator[None]:
        """Within the `with` block a checkpoint that cannot be loaded, and memory that runs out, are errors that help.

        Args:
            checkpoint: the one that the training goes on from.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:  # passes and evaluations have messages of their own
            raise self.steps.out_of_memory_between_passes(self.model) from error
        except UNREADABLE as error:
            is_loading = not self.run_state.began or isinstance(error, UnpicklingError)  # random states come last
            if checkpoint and self.optimizer is not None and is_loading:
                raise unreadable_checkpoint(checkpoint, error) from error
            raise

    def evaluate_late(self, checkpoint: str) -> None:
        """Do the evaluation that was due at a checkpoint and gave way to a signal."""
        if self._determine_best_metric(self._evaluate(None, None), None):
            self.state.best_model_checkpoint = checkpoint

    def _write_weights(self, folder: Path) -> None:
        """Write student and projectors into a folder."""
        folder.mkdir(parents=True, exist_ok=True)  # on another machine than the first, whose disk is not shared
        self.save_model(str(folder), _internal_call=True)

    def _write_the_rest(self, folder: Path) -> None:
        """Let every rank write its part of what resuming needs beside them, with Trainer's own methods."""
        if not self.args.save_only_model:
            if self.is_fsdp_enabled and self.weights.are_adapters:
                self.weights.write_adapter_parts(folder, self.accelerator, self.optimizer, self.lr_scheduler)
            else:
                self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.run_state.save(folder, self.args.process_index, self.args.world_size)
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

    @working("Saving a checkpoint")
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
            self.incidents.console.warn(f"An old checkpoint in {run_dir} could not be deleted: {reason_of(error)}.")
            self.incidents.note("save", "left an old checkpoint")

    def _tell_failed_save(self, folder: Path, problem: str) -> None:
        """Note a save that failed. Raises `RunFailed` for one too many in a row, while the training goes on."""
        self._failed_saves += 1
        ends = self.control.should_training_stop or WATCH.received is not None
        free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
        told = f"{folder} could not be written ({problem}; {free / 1e9:.2f} GB are free there)."
        if self._failed_saves >= MOST_FAILED_SAVES and not ends:
            raise RunFailed(
                f"{told} It is save number {self._failed_saves} that failed in a row. {self.incidents.advice()}"
            )
        goes_on = "The training ends here, without it." if ends else "The training tries again at the next save."
        self.incidents.console.warn(f"{told} {goes_on} {self.incidents.advice()}")
        self.incidents.note("save", f"went on without {folder.name}")

    # The private methods of Trainer that KAVA overrides are below; all were read in transformers 5.23.0 and 5.17.0.
    # What it calls or reads beside them: the parts of a checkpoint, the best metric, the loss sums and the size of a
    # micro-batch above; `_prepare_inputs`, `_hp_search_setup`, `_trial` and `_get_output_dir` in `trainer.py`.
    # `tests/trainer/test_private_methods.py` knows all of them.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is whole or absent, then rotate and send.

        Trainer would write it in place, and has no hook that could put another way of writing there.
        """
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
        if self.pusher is not None:
            self.pusher.push(folder, self.state.global_step)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As Trainer's; where a signal ends the evaluation, save at once and stop.

        An evaluation has no hook that could end it early and still have Trainer save.
        """
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Interrupted as interruption:
            self.emergency.stop(interruption.number, self.control)
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read student and projectors, each from its own file. Trainer would look for the weights of the two in one."""
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint)
        try:
            self.weights.load(resume_from_checkpoint, load, sharded=self.is_fsdp_enabled)
        except UNREADABLE as error:
            raise unreadable_checkpoint(resume_from_checkpoint, error) from error

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`; Trainer reads the best weights with other code than a checkpoint's."""
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))
