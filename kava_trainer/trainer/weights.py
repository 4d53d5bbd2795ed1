"""What a trainer of a student beside projectors writes and reads as weights: each of the two by itself."""

import shutil
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel, Trainer

from ..config.arguments import KavaTrainingArguments
from ..distillation.model import DistillationModel
from ..distillation.projector_files import projector_content, restore_projectors, write_projectors
from ..distillation.targets import HiddenStateTarget
from ..models.loading import on_device
from ..models.lora import has_adapter
from ..models.lora_files import load_adapter, save_weights
from ..utils.distributed import is_sharded, whole_state
from .checkpoint import PROJECTOR_FILE, unreadable_checkpoint

UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, SafetensorError, UnpicklingError,
    CheckpointException,
)  # fmt: skip
"""What transformers, torch and safetensors raise for files that are not what they should be. The last one, of sharded
weights, is no `Exception` even."""


class WeightsTrainer(Trainer):
    """A `Trainer` of a `DistillationModel` that keeps student and projectors apart on disk."""

    args: KavaTrainingArguments
    model: DistillationModel

    def __init__(self, model: DistillationModel, **kwargs: Any) -> None:
        self._student_uses_cache = model.config.use_cache
        super().__init__(model=model, **kwargs)

    @property
    def student(self) -> PreTrainedModel:
        """The student alone, as `AutoModelForCausalLM` would load it."""
        return self.model.student

    @property
    def target(self) -> HiddenStateTarget:
        """What is aligned, with its projectors."""
        return self.model.target

    def save_projector(self, path: str | Path, with_decoders: bool = False) -> None:
        """Write the projectors to one `.pth` file, from the main process; every rank has to call this.

        Args:
            path: the file.
            with_decoders: also the decoders of a reconstruction anchor, which only further training needs.
        """
        content = self.gathered_projectors(with_decoders)
        if self.args.should_save:
            write_projectors(content, path)

    def gathered_projectors(self, with_decoders: bool = False) -> dict[str, Any]:
        """What their file will hold. Every rank must ask, before any of them writes: that may fail on one alone."""
        decoders = self.target.decoders if with_decoders else None
        return projector_content(self.target.projectors, self.target.use, decoders)

    def save_student(
        self, output_dir: str | Path, merge_adapter: bool = True, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write the student alone, with tokenizer and generation config, as `from_pretrained` expects it.

        Args:
            output_dir: the folder.
            merge_adapter: merge adapters into the student; else they are written alone.
            state_dict: of `gathered_student`.
        """
        self.student.config.use_cache = self._student_uses_cache
        self._save(str(output_dir), state_dict, merge_adapter)
        self.student.config.use_cache = self.args.use_cache

    def gathered_student(self) -> dict[str, torch.Tensor] | None:
        """The student's weights, on the main process, where they are sharded; else None. Every rank must ask."""
        if not is_sharded(self.model):
            return None
        tied = getattr(self.student, "all_tied_weights_keys", {})
        return {name: tensor for name, tensor in whole_state(self.student).items() if name not in tied}

    def whole_student(self) -> PreTrainedModel:
        """The student with all its weights on this rank; a copy where they are sharded. Every rank must ask."""
        if not is_sharded(self.model):
            return self.student
        with torch.random.fork_rng([]):  # its first weights are drawn, and overwritten
            copy: Any = type(self.student)(self.student.config)
            copy = copy.to(self.student.dtype)
        copy.load_state_dict(whole_state(self.student, everywhere=True))
        copy.generation_config = deepcopy(self.student.generation_config)
        return on_device(copy, self.args.device)

    def release(self) -> None:
        """Give the memory of the optimizer and of the wrapped model back; the trainer cannot train any more."""
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.model.to("cpu")

    # The private methods of Trainer that are overridden here were read in transformers 5.23.0 and 5.17.0.

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        merge_adapter: bool = False,
    ) -> None:
        """Write student and tokenizer. No pickled arguments: they would carry the hub token."""
        state_dict = self.gathered_student() if state_dict is None else state_dict
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_weights(self.student, folder, merge_adapter, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = load_adapter if has_adapter(self.student) else super()._load_from_checkpoint
        try:
            load(resume_from_checkpoint, cast(PreTrainedModel, self.model if self.is_fsdp_enabled else self.student))
        except UNREADABLE as error:
            raise unreadable_checkpoint(resume_from_checkpoint, error) from error
        if not self.is_fsdp_enabled:  # there the projectors are in the weights that have just been loaded
            file = Path(resume_from_checkpoint) / PROJECTOR_FILE
            restore_projectors(self.target.projectors, file, self.target.use, self.target.decoders)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))


class PushingTrainer(WeightsTrainer):
    """The part of `KavaTrainer` that sends the student when it is told to."""

    def push_to_hub(  # type: ignore[override]  # Trainer gives a future too, and says it does not
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Send the student as it is now, with its tokenizer and a card of Trainer's, to `hub_model_id`.

        Trainer's own would send all of `output_dir`, and its pickled arguments, which may hold a token, too. What
        `run_kava.py` measured goes to the hub with `python -m kava_trainer push`.

        Args:
            commit_message: of the commit.
            blocking: wait until all is sent.
            token: in place of `args.hub_token`, or of a login.
            revision: a branch, in place of `args.hub_revision`.
            private: of a repository that is made for it; `args.hub_private_repo` by default.
            kwargs: of `Trainer.create_model_card`.

        Returns:
            The commit, or its future where `blocking` is false; None on other ranks than the first.

        Raises:
            BadRequest: if there is no repository and none can be made.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        state = self.gathered_student()
        if not self.is_world_process_zero():
            return None
        folder = TemporaryDirectory()
        self.save_student(folder.name, state_dict=state)
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, **kwargs)
        shutil.copy(Path(str(self.args.output_dir)) / "README.md", folder.name)
        self._finish_current_push()
        sent: Future[CommitInfo] = HfApi(token=token).upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder.name,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=True,
        )
        sent.add_done_callback(lambda _: folder.cleanup())
        return sent.result() if blocking else sent
