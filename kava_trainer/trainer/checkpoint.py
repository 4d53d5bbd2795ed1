"""Saves that are whole or absent, and finding the newest checkpoint that can be resumed.

A save is made in a staging folder beside its place, flushed to the disk, sealed with a manifest of sizes and checksums,
and renamed into place. Whatever ends the process on the way leaves the former save as it was, and a folder whose name
begins with a dot, which `sweep` clears away when the next run starts.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.atomic_files import DELETED, PREVIOUS, STAGING, remove
from ..utils.digests import checksum
from ..utils.errors import BadRequest, reason_of

PREFIX_CHECKPOINT_DIR = "checkpoint"
"""As in `transformers.trainer_utils`, which takes seconds to import; whoever reads a finished run need not wait."""

PROJECTOR_FILE = "projector.pth"
"""Name of the projector file inside a checkpoint folder."""

TRAINER_STATE_FILE = "trainer_state.json"

MANIFEST_FILE = "manifest.json"
"""Name of the list of all files of a checkpoint, which is written last."""

_RESUMABLE = (TRAINER_STATE_FILE, PROJECTOR_FILE, "scheduler.pt")

_OPTIMIZER = ("optimizer.pt", "optimizer_0/.metadata")
"""One of the two: the second one is that of sharded weights."""

_LEFT_BEHIND = re.compile(rf"\.({PREFIX_CHECKPOINT_DIR}-\d+|final_student)({STAGING}|{PREVIOUS}|{DELETED})")

_TEMPORARY = re.compile(r"\.(\w+_projector|proj_step_\d+|run_summary|log_history|report)\.\w+\.\d+\.tmp")


def sweep(folder: str | Path) -> None:
    """Clear away what a run that was killed has left half done in its output folder.

    A save that was being replaced and is not there any more comes back.
    """
    folder = Path(folder)
    for entry in folder.glob(".*"):
        if _TEMPORARY.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
        elif left := _LEFT_BEHIND.fullmatch(entry.name):
            place = folder / left[1]
            if left[2] == PREVIOUS and not place.exists():
                os.replace(entry, place)
            else:
                shutil.rmtree(entry)


def _sealed(content: dict[str, Any]) -> str:
    """A manifest as text, with a checksum of its own."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, run: dict[str, Any] | None) -> None:
    """Seal a folder: list all its files with their sizes and checksums.

    Args:
        folder: a save that is complete but for this.
        run: what the run was asked for, of plain JSON types, so that another run is not resumed by mistake.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": checksum(path)} for path in files
    }
    (folder / MANIFEST_FILE).write_text(_sealed({"format": 1, "files": listed, "run": run}), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: in a clause, if there is none or it is not as it was written.
    """
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST_FILE}, so its save was cut off") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"its {MANIFEST_FILE} cannot be read ({reason_of(error)})") from error
    try:
        content = json.loads(text)
        del content["sha256"]
    except (ValueError, KeyError, TypeError):
        content = None
    if content is None or _sealed(content) != text:
        raise ValueError(f"its {MANIFEST_FILE} is not as it was written")
    return content


def broken_reason(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in a clause; None where every file is as it was written."""
    try:
        listed = read_manifest(folder)["files"]
        for name, expected in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes in place of {expected['size']}"
            if checksum(path) != expected["sha256"]:
                return f"the checksum of {name} differs"
    except (OSError, ValueError) as error:
        return reason_of(error)
    missing = [] if any(name in listed for name in _OPTIMIZER) else [_OPTIMIZER[0]]
    missing += [name for name in _RESUMABLE if name not in listed]
    return f"it was saved without {' and '.join(missing)}" if missing else None


def unreadable_checkpoint(folder: str | Path | None, error: BaseException) -> BadRequest:
    """The error for a checkpoint that is there and cannot be loaded."""
    reason = reason_of(error)
    return BadRequest(
        f"The checkpoint {folder} cannot be loaded ({reason}).", "Resume from an older one, or start afresh."
    )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<N>` folders by rising N."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = ((pattern.fullmatch(path.name), path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def rotate(output_dir: str | Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints, by when they were written, so that at most `limit` are left.

    Args:
        output_dir: where they are.
        limit: as `save_total_limit`; None or 0 for no limit.
        keep: never deleted.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path).resolve() for path in keep}
    oldest_first = sorted(list_checkpoints(output_dir), key=lambda path: path.stat().st_mtime_ns)
    spare = [path for path in oldest_first if path.resolve() not in kept]
    for folder in spare[: max(0, len(oldest_first) - limit)]:
        remove(folder)


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on from."""

    checkpoint: Path | None
    """The folder; None to start afresh."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer checkpoints that are broken, and why."""


def find_newest_checkpoint(output_dir: str | Path) -> Resumption:
    """The checkpoint with the highest step that is as it was written."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(output_dir)):
        reason = broken_reason(folder)
        if reason is None:
            return Resumption(folder, skipped)
        skipped.append((folder, reason))
    return Resumption(None, skipped)


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Resumption:
    """The checkpoint folder that `resume_from_checkpoint` means.

    Args:
        resume_from_checkpoint: a folder, `true` for the newest sound one in `output_dir`, `false` or None for none.
        output_dir: where `true` looks.

    Returns:
        The folder, or None to start afresh: also for `true` where there is no sound checkpoint yet.

    Raises:
        BadRequest: if a named folder does not exist or is not a sound checkpoint.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return Resumption(None)
    if resume_from_checkpoint.lower() == "true":
        return find_newest_checkpoint(output_dir)
    folder = Path(resume_from_checkpoint)
    if not folder.is_dir():
        raise BadRequest(f"resume_from_checkpoint names {folder}, which is not a folder;", "write true for the newest.")
    if (reason := broken_reason(folder)) is not None:
        raise BadRequest(
            f"The checkpoint {folder} cannot be resumed: {reason}.",
            "Write true for the newest one that can, or name another.",
        )
    return Resumption(folder)
