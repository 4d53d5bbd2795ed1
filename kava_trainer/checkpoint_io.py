"""Saves that are whole or absent, and finding the newest checkpoint that can be resumed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import BadRequest, reason_of

PROJECTOR_FILE = "projector.pth"
"""Name of the projector file inside a checkpoint folder."""

TRAINER_STATE_FILE = "trainer_state.json"


def _flush(path: Path) -> None:
    """Make sure that what was written to a file or a folder entry is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
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


def write_folder_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, flush it to disk, and swap it into place."""
    path = Path(path)
    staging, previous = (path.with_name(f".{path.name}.{kind}") for kind in ("staging", "previous"))
    for leftover in (staging, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    staging.mkdir(parents=True)
    write(staging)
    for file in staging.rglob("*"):
        _flush(file)
    if path.exists():
        os.replace(path, previous)
    os.replace(staging, path)
    _flush(path.parent)
    if previous.exists():
        shutil.rmtree(previous)


def is_resumable(folder: Path) -> bool:
    """Whether a folder holds a projector and a readable trainer's state, which is written last."""
    try:
        return bool(json.loads((folder / TRAINER_STATE_FILE).read_text())) and (folder / PROJECTOR_FILE).is_file()
    except (OSError, ValueError):
        return False


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds weights and training state, every part of them, and none was cut short."""
    if not is_resumable(folder):
        return False
    weights, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    parts = [weights]
    try:
        if index.is_file():
            parts = [folder / name for name in set(json.loads(index.read_text())["weight_map"].values())]
        for part in parts:
            with safe_open(part, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    needed = ["optimizer.pt", "scheduler.pt"] if any(folder.glob("rng_state*.pth")) else []  # not with save_only_model
    archives = [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth")]
    return all((folder / name).is_file() for name in needed) and all(map(is_zipfile, archives))


def unreadable_checkpoint(folder: str | Path | None, error: Exception) -> BadRequest:
    """The error for a checkpoint that is there and cannot be loaded."""
    reason = reason_of(error)
    return BadRequest(
        f"The checkpoint {folder} cannot be loaded ({reason}). Resume from an older one, or start afresh."
    )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<N>` folders by rising N."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folders = {path: pattern.fullmatch(path.name) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path, match in folders.items() if match), key=lambda path: int(folders[path].group(1)))


def find_newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The resumable `checkpoint-<N>` folder with the highest N, or None."""
    return next((folder for folder in reversed(list_checkpoints(output_dir)) if is_resumable(folder)), None)


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint folder that `resume_from_checkpoint` means.

    Args:
        resume_from_checkpoint: a folder, `true` for the newest resumable one in `output_dir`, `false` or None for none.
        output_dir: where `true` looks.

    Returns:
        The folder, or None to start afresh: also for `true` where there is no checkpoint yet.

    Raises:
        BadRequest: if a named folder does not exist or is not a KAVA checkpoint.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() == "true":
        return find_newest_checkpoint(output_dir)
    folder = Path(resume_from_checkpoint)
    if not folder.is_dir():
        raise BadRequest(f"resume_from_checkpoint names {folder}, which is not a folder; write true for the newest.")
    if not is_resumable(folder):
        raise BadRequest(
            f"{folder} is not a checkpoint that KAVA can resume: it lacks a readable {TRAINER_STATE_FILE} or "
            f"{PROJECTOR_FILE}."
        )
    return folder
