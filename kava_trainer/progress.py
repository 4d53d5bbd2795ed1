"""What one rank keeps in a checkpoint beside weights, optimizer and random numbers."""

from pathlib import Path
from typing import Any

import torch

from .checkpoint_io import unreadable_checkpoint


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
