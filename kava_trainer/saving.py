"""What a trainer of a student beside projectors saves, loads and sends, and where Trainer's own way does not fit."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy

from .arguments import KavaTrainingArguments
from .checkpoint_io import PROJECTOR_FILE, unreadable_checkpoint
from .errors import RunFailed
from .hub import ANSWER_SECONDS, CheckpointPusher, in_time
from .projector import restore_projectors, save_projectors
from .student import DistillationModel
from .targets import HiddenStateTarget


class SavingTrainer(Trainer):
    """A `Trainer` of a `DistillationModel` that keeps student and projectors apart on disk."""

    args: KavaTrainingArguments
    model: DistillationModel
    problems: list[dict[str, Any]]
    """What went wrong and did not end the run: the step, a kind, and what was done about it."""

    def __init__(self, model: DistillationModel, **kwargs: Any) -> None:
        self._student_uses_cache = model.config.use_cache
        self._pusher: CheckpointPusher | None = None
        super().__init__(model=model, **kwargs)

    @property
    def student(self) -> PreTrainedModel:
        """The student alone, as `AutoModelForCausalLM` would load it."""
        return self.model.student

    @property
    def target(self) -> HiddenStateTarget:
        """What is aligned, with its projectors."""
        return self.model.target

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the hub repository, as `Trainer` does. Raises `TimeoutError` if the hub does not answer."""
        in_time(lambda: super(SavingTrainer, self).init_hf_repo(token, private), ANSWER_SECONDS)

    def not_finite(self, what: str) -> RunFailed:
        """The error for losses or weights that are no finite numbers any more."""
        return RunFailed(
            f"At step {self.state.global_step} {what} stopped being finite numbers. "
            "Resume from the newest checkpoint, which is sound, with a lower learning rate."
        )

    def save_projector(self, path: str | Path, with_decoders: bool = False) -> None:
        """Write the projectors to one `.pth` file, from the main process.

        Args:
            path: the file.
            with_decoders: also the decoders of a reconstruction anchor, which only further training needs.
        """
        if self.args.should_save:
            decoders = self.target.decoders if with_decoders else None
            save_projectors(self.target.projectors, path, self.target.use, decoders)

    def save_student(self, output_dir: str | Path) -> None:
        """Write the student alone, with tokenizer and generation config, as `from_pretrained` expects it."""
        self.student.config.use_cache = self._student_uses_cache
        self._save(str(output_dir))
        self.student.config.use_cache = self.args.use_cache

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student; inside a checkpoint also the projectors beside it.

        Raises:
            RunFailed: if a weight is no finite number, before anything is written.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self.not_finite("weights")
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call:
            self.save_projector(Path(output_dir or self.args.output_dir) / PROJECTOR_FILE, with_decoders=True)

    # The private methods of Trainer that KAVA overrides are below; all were read in transformers 5.23.0. Of those it
    # only calls there is one more: `_prepare_inputs`, in `trainer.py`.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write student and tokenizer. No pickled arguments: they would carry the hub token.

        Trainer hands over a `state_dict` under engines only that KAVA refuses.
        """
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.student.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, self.student)
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
            raise unreadable_checkpoint(resume_from_checkpoint, error) from error
        file = Path(resume_from_checkpoint) / PROJECTOR_FILE
        restore_projectors(self.target.projectors, file, self.target.use, self.target.decoders)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            raise unreadable_checkpoint(checkpoint, error) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, UnpicklingError) as error:
            raise unreadable_checkpoint(checkpoint, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send a checkpoint to the hub as `hub_strategy` asks, in the background.

        Trainer would send all of `output_dir` with its pickled arguments, and those hold the hub token.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._pusher is None:
            self._pusher = CheckpointPusher(self.hub_model_id, self.args, self.problems)
        self._pusher.push(Path(checkpoint_folder), self.state.global_step)

    def _finish_current_push(self) -> None:
        """Wait for the checkpoints that are on their way, but not for ever."""
        if self._pusher is not None:
            self._pusher.finish()

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
