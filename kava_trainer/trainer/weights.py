"""What a trainer of a student beside projectors writes and reads as weights: each of the two by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import save_fsdp_optimizer
from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers.trainer import SCHEDULER_NAME

from ..config.arguments import KavaTrainingArguments
from ..distillation.model import DistillationModel
from ..distillation.projector_files import projector_content, restore_projectors, write_projectors
from ..models.lora import has_adapter
from ..models.lora_files import (
    adapter_weights,
    load_adapter,
    load_weights,
    reload_problem,
    save_weights,
    trained_names,
)
from ..models.student import mend_generation_config
from ..utils.distributed import any_rank, is_sharded, own_part, read_parts, whole_state, write_parts
from ..utils.errors import BadRequest, reason_of
from .checkpoint import PROJECTOR_FILE
from .final_student import NotSaved, keep_weights, where_kept, why_not_saved


@dataclass(frozen=True)
class Weights:
    """The weights of a student and its projectors, in memory and on disk.

    Where they are sharded, every rank must ask for what is gathered, before any of them writes: that may fail on one
    alone.
    """

    model: DistillationModel
    args: KavaTrainingArguments
    tokenizer: Any
    """Is written beside the student; None for nothing."""

    def are_finite(self) -> bool:
        """Whether every weight is a finite number, on every rank."""
        return not any_rank(not all(own_part(weight).isfinite().all() for weight in self.model.parameters()))

    def check_writable(self) -> None:
        """Write all but the weights once, so that what would keep the student from being saved is found beforehand.

        Raises:
            BadRequest: with the reason.
        """
        student = self.model.student
        try:
            with TemporaryDirectory() as folder:
                for part in filter(None, (student.config, student.generation_config, self.tokenizer)):
                    part.save_pretrained(folder)
        except Exception as error:  # configs and tokenizers fail in ways of their own
            raise BadRequest(f"The student could not be saved ({reason_of(error)}).") from error
        if (problem := reload_problem(student)) is not None:
            raise BadRequest(f"The student could not be saved: {problem}.", "Change its config along with its modules.")

    def projectors(self, with_decoders: bool = False) -> dict[str, Any]:
        """What the projectors' file will hold.

        Args:
            with_decoders: also the decoders of a reconstruction anchor, which only further training needs.
        """
        target = self.model.target
        return projector_content(target.projectors, target.use, target.decoders if with_decoders else None)

    def gathered_student(self, merge_adapter: bool = False) -> dict[str, torch.Tensor] | None:
        """The student's weights, on the main process, where they are sharded; else None.

        Args:
            merge_adapter: also those beneath adapters, which merging needs.
        """
        if not is_sharded(self.model):
            return None
        student = self.model.student
        tied = getattr(student, "all_tied_weights_keys", {})
        if has_adapter(student):
            return whole_state(student, names=None if merge_adapter else trained_names(student))
        return {name: tensor for name, tensor in whole_state(student).items() if name not in tied}

    @property
    def are_adapters(self) -> bool:
        """Whether the student is trained through adapters."""
        return has_adapter(self.model.student)

    @property
    def _untouched(self) -> set[str]:
        """The names of what is beneath a student's adapters, which no checkpoint holds."""
        student = self.model.student
        return {f"student.{name}" for name in student.state_dict().keys() - trained_names(student)}

    def write_adapter_parts(self, folder: Path, accelerator: Accelerator, optimizer: Any, scheduler: Any) -> None:
        """Write what Trainer writes of a sharded training, without the weights beneath the student's adapters.

        Every rank must ask. Trainer leaves them out only where its model is a `PeftModel` (transformers 5.23.0).
        """
        write_parts(self.model, folder / f"{FSDP_MODEL_NAME}_0", self._untouched)
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, self.model, str(folder))
        if self.args.should_save:
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def save_projector(self, path: str | Path) -> None:
        """Write the projectors to one `.pth` file, from the main process."""
        content = self.projectors()
        if self.args.should_save:
            write_projectors(content, path)

    def write_student(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None, merge_adapter: bool = False
    ) -> None:
        """Write student and tokenizer, from the main process.

        No pickled arguments, as Trainer writes them: they would carry the hub token.

        Args:
            folder: where to.
            state_dict: of `gathered_student`, as it is for `merge_adapter`.
            merge_adapter: merge adapters into the student; else they are written alone.
        """
        if self.args.should_save:
            save_weights(self.model.student, str(folder), merge_adapter, state_dict)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def export_student(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None, merge_adapter: bool = True
    ) -> None:
        """Write the student as `write_student` does, with a config as it was before the training."""
        mend_generation_config(self.model.student)  # somebody may have changed it since the training began
        config = self.model.student.config
        before, added = self.model.student_uses_cache, vars(config).pop("use_cache", None)
        if before is not None:
            config.use_cache = before
        try:
            self.write_student(folder, state_dict, merge_adapter)
        finally:
            if added is not None:
                config.use_cache = added

    @contextmanager
    def kept(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Within the `with` block a student that cannot be saved is not lost: its trained weights are written alone.

        Args:
            folder: where the student should go.
            state_dict: of `gathered_student`.

        Raises:
            NotSaved: in place of any error, with the reason, what to do about it, and where the weights are.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # configs, tokenizers, safetensors and disks fail in ways of their own
            student = self.model.student
            weights = state_dict or student.state_dict()
            if has_adapter(student):
                weights = adapter_weights(student, state_dict)
            told = why_not_saved(error, folder, weights)
            places = (folder.parent, Path(str(self.args.output_dir)), Path(gettempdir()))
            raise NotSaved(f"{told} {where_kept(keep_weights(weights, places))}") from error

    def load(self, checkpoint: str, load_model: Callable[[Any], None], sharded: bool) -> None:
        """Put back the weights of a checkpoint.

        Args:
            checkpoint: its folder.
            load_model: reads the weights of student and projectors together, as Trainer does.
            sharded: whether Trainer wrote student and projectors together.
        """
        student, target = self.model.student, self.model.target
        if has_adapter(student) and sharded:
            read_parts(self.model, Path(checkpoint) / f"{FSDP_MODEL_NAME}_0", self._untouched)
        elif has_adapter(student):
            load_adapter(checkpoint, student)
        elif sharded:
            load_model(self.model)
        else:
            load_weights(checkpoint, student)
        if not sharded:
            file = Path(checkpoint) / PROJECTOR_FILE
            with torch.random.fork_rng([]):  # new projectors are drawn, and overwritten
                restore_projectors(target.projectors, file, target.use, target.decoders)
