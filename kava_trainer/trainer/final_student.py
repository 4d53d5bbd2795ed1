"""What a run finishes with: a student and its projector, told from others by their checksums, and never lost."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.atomic_files import write_atomically
from ..utils.console import size_text
from ..utils.digests import checksum
from ..utils.errors import reason_of
from ..utils.files import existing_folder

if TYPE_CHECKING:
    import torch

FINAL_STUDENT, FINAL_PROJECTOR = "final_student", "final_projector.pth"
"""The finished student's folder and its projector, in `final_dir`."""

RESCUED = "rescued_student.pt"
"""The weights alone of a student that could not be saved as a model."""


class NotSaved(Exception):
    """A finished student could not be saved; the text says why, what to do about it, and where its weights are."""


def weight_checksums(student: Path) -> dict[str, str]:
    """The SHA-256 of each `*.safetensors` in a student's folder, by its name."""
    return {path.name: checksum(path) for path in sorted(student.glob("*.safetensors"))}


def final_checksums(student: Path, projector: Path) -> dict[str, str]:
    """The checksums of a finished student's weights and of its projector, if any, by their paths in `final_dir`."""
    weights = {f"{FINAL_STUDENT}/{name}": digest for name, digest in weight_checksums(student).items()}
    return {**weights, FINAL_PROJECTOR: checksum(projector)} if projector.exists() else weights


def difference(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """The first file that is not as its checksum says, in a clause; None where all are. Other files do not count.

    Args:
        folder: where they should be.
        checksums: by their paths in the folder.

    Raises:
        OSError: if one cannot be read.
    """
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != expected:
            return f"{name} is another one"
    return None


def has_student(folder: Path) -> bool:
    """Whether a folder holds a whole student, or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def is_same_student(there: Path, new: Path) -> bool:
    """Whether two folders hold a student with the same weights, whatever else is in them."""
    return has_student(there) and difference(there, weight_checksums(new)) is None


def keep_weights(weights: Mapping[str, "torch.Tensor"], folders: Iterable[Path]) -> Path | None:
    """Write weights by their names into one file, in the first of the folders that takes it; None where none does."""
    import torch  # here, where there are weights: what reads a finished run need not wait for it

    content = {name: weight.detach().cpu() for name, weight in weights.items()}
    for folder in dict.fromkeys(folders):
        try:
            write_atomically(folder / RESCUED, lambda temporary: torch.save(content, temporary))
        except Exception:  # the next folder may be on a disk that has room
            continue
        return folder / RESCUED
    return None


def where_kept(file: Path | None) -> str:
    """Where the weights of a student are that could not be saved, in a sentence."""
    if file is None:
        return "Its weights could be written nowhere else either."
    return f"Its weights are in {file}: load_state_dict takes what torch.load reads there."


def why_not_saved(error: Exception, folder: Path, weights: Mapping[str, "torch.Tensor"]) -> str:
    """Why a student could not be saved to a folder, and what to do about it, in two sentences."""
    reason = reason_of(error).rstrip(".")
    needed = sum(weight.numel() * weight.element_size() for weight in weights.values())
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < needed or "No space left" in reason or "quota" in reason:
        return f"{reason}. It takes {size_text(needed)} and {size_text(free)} are free: make room, or set final_dir."
    if isinstance(error, PermissionError):
        return f"{reason}. Make the folder writable, or name another final_dir."
    if isinstance(error, OSError):
        return f"{reason}. Name another final_dir."
    return f"{reason}. That is for the student's config, tokenizer or model class to mend."
