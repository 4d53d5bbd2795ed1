"""What one rank keeps in a checkpoint beside weights, optimizer and random numbers (those: `saving`)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..distillation.model import DistillationModel
from .checkpoint import unreadable_checkpoint


class Part(Protocol):
    """A part of the trainer with a state of its own, under names that no other part has."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python types by name."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what all parts saved, see `read_progress`."""


class RunState(TrainerCallback):
    """Gathers the states of the parts for a checkpoint, and hands them back when a training goes on from one.

    It must come after the callbacks that begin anew with a training, and before those that measure it.

    Args:
        parts: whose states are kept.
        evaluate: does an evaluation that was due at a checkpoint, whose folder it takes, and gave way to a signal.
        probe: measures the alignment of a model at a state, as is due after a save.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        evaluate: Callable[[str], None],
        probe: Callable[[DistillationModel, TrainerState], None],
    ) -> None:
        self._parts, self._evaluate, self._probe = list(parts), evaluate, probe
        self.checkpoint: str | None = None
        """The one that the training goes on from."""
        self.began = False
        """Whether all that a checkpoint holds has been taken up."""

    def keep(self, part: Part) -> None:
        """From now on a checkpoint holds the state of one more part."""
        self._parts.append(part)

    def save(self, folder: Path, rank: int, world_size: int) -> None:
        """Write the state of one rank into a checkpoint."""
        state = {name: value for part in self._parts for name, value in part.state_dict().items()}
        save_progress(folder, rank, world_size, state)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up what the checkpoint holds, after Trainer has set its own counters to zero."""
        self.began = True
        if self.checkpoint is None:
            return
        saved = read_progress(self.checkpoint, args.process_index, args.world_size)
        for part in self._parts:
            part.load_state_dict(saved)
        state.compute_steps(args, state.max_steps)  # Trainer would keep the checkpoint's intervals
        if saved["evaluation_pending"]:
            self._evaluate(self.checkpoint)
        if saved["probe_due"]:
            self._probe(kwargs["model"], state)


def progress_file(rank: int) -> str:
    """Name of a rank's file in a checkpoint folder."""
    return f"progress_{rank}.pth"


def save_progress(folder: str | Path, rank: int, world_size: int, state: dict[str, Any]) -> None:
    """Write the progress of one rank, of tensors and plain Python types."""
    torch.save(state | {"world_size": world_size}, Path(folder) / progress_file(rank))


def read_progress(checkpoint: str | Path, rank: int, world_size: int) -> dict[str, Any]:
    """What a rank wrote; with another number of ranks, what the first one wrote that holds for all.

    Args:
        checkpoint: the folder.
        rank: of this process.
        world_size: number of processes now.

    Returns:
        The state that was saved, with `same_ranks`: whether the sums of this very rank are in it.

    Raises:
        BadRequest: if it cannot be read.
    """
    file = Path(checkpoint) / progress_file(rank)
    try:
        found = file if file.exists() else file.with_name(progress_file(0))
        state = torch.load(found, map_location="cpu", weights_only=True)
        same_ranks = state.get("world_size", world_size) == world_size
        if same_ranks and not file.exists():
            raise FileNotFoundError(f"there is no {file.name}")
        return state | {"same_ranks": same_ranks}
    except Exception as error:  # what is no such file is found out in many ways
        raise unreadable_checkpoint(checkpoint, error) from error
