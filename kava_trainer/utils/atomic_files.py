"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

STAGING, PREVIOUS, DELETED = ".staging", ".previous", ".deleted"


def _flush(path: Path) -> None:
    """Make sure that what was written to a file or a folder entry is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}{kind}")


def remove(folder: Path) -> None:
    """Delete a folder, of which never a part stands under its own name."""
    doomed = _beside(folder, DELETED)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def staging_folder(path: str | Path) -> Path:
    """Where a save is made before it is brought to `path`."""
    return _beside(Path(path), STAGING)


def stage(path: str | Path) -> Path:
    """Make an empty `staging_folder`; `publish` brings it into place."""
    staging = staging_folder(path)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(path: str | Path) -> None:
    """Flush what was staged for `path` to the disk and swap it into place."""
    path = Path(path)
    staging, previous = staging_folder(path), _beside(path, PREVIOUS)
    for file in sorted(staging.rglob("*")):
        _flush(file)
    _flush(staging)
    if previous.exists():
        shutil.rmtree(previous)
    if path.exists():
        os.replace(path, previous)
    os.replace(staging, path)
    _flush(path.parent)
    if previous.exists():
        shutil.rmtree(previous)


def discard(path: str | Path) -> None:
    """Give up what was staged for `path`."""
    shutil.rmtree(staging_folder(path), ignore_errors=True)


def write_folder_atomically(
    path: str | Path, write: Callable[[Path], object], stays: Callable[[Path, Path], bool] = lambda there, new: False
) -> bool:
    """Let `write` fill a temporary folder beside `path`, flush it to disk, and swap it into place.

    Args:
        path: the folder.
        write: takes the temporary folder.
        stays: takes the folder that is there already and the temporary one; whether the first one stays.

    Returns:
        Whether it was written; False where the folder that was there stays.
    """
    try:
        write(stage(path))
        if Path(path).is_dir() and stays(Path(path), staging_folder(path)):
            return False
        publish(path)
        return True
    finally:
        discard(path)
