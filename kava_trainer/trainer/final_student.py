"""What a run finishes with, a student and its projector, told from those of another run by their checksums."""

from collections.abc import Mapping
from pathlib import Path

from ..utils.digests import checksum

FINAL_STUDENT, FINAL_PROJECTOR = "final_student", "final_projector.pth"
"""The finished student's folder and its projector, in `final_dir`."""


def weight_checksums(student: Path) -> dict[str, str]:
    """The SHA-256 of each `*.safetensors` in a student's folder, by its name."""
    return {path.name: checksum(path) for path in sorted(student.glob("*.safetensors"))}


def final_checksums(student: Path, projector: Path) -> dict[str, str]:
    """The checksums of a finished student's weights and of its projector, by their paths in `final_dir`."""
    weights = {f"{FINAL_STUDENT}/{name}": digest for name, digest in weight_checksums(student).items()}
    return {**weights, FINAL_PROJECTOR: checksum(projector)}


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
