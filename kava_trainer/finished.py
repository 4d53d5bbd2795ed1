"""Which student a run has left: told by its weights, because another run may have gone to the same folder since."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .arguments import KavaArguments
from .checkpoint_io import checksum
from .errors import BadRequest, reason_of
from .run_folder import read_summary
from .summary import SUMMARY_FILE

FINAL_STUDENT, FINAL_PROJECTOR = "final_student", "final_projector.pth"
"""The finished student's folder and its projector, in `final_dir`."""


def weights_digest(student: str | Path) -> str:
    """The SHA-256 of the weights in a student's folder, a hexadecimal number.

    Names and contents of its `*.safetensors` count. A card, a tokenizer or a generation config may be changed by hand,
    and it stays the same student.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(student).glob("*.safetensors")):
        digest.update(f"{path.name}\n{checksum(path)}\n".encode())
    return digest.hexdigest()


def finished_summary(output_dir: str | Path) -> dict[str, Any]:
    """The summary of a run that has ended.

    Raises:
        BadRequest: if there is none, or it cannot be read.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise BadRequest(f"There is no folder {folder}; name the output_dir of a run.")
    summary = read_summary(folder)
    if summary is None:
        raise BadRequest(f"{folder} has no {SUMMARY_FILE}; name the output_dir of a run that has ended.")
    return summary


def completed_summary(output_dir: str | Path) -> dict[str, Any]:
    """The summary of a run that was completed.

    Raises:
        BadRequest: as `finished_summary`, and if the run is not complete.
    """
    summary = finished_summary(output_dir)
    if summary["status"] != "completed":
        raise _not_finished(output_dir, summary)
    return summary


def _not_finished(output_dir: str | Path, summary: Mapping[str, Any]) -> BadRequest:
    status = summary["status"]
    ended = {"interrupted": "was interrupted", "failed": "failed"}.get(status, f"ended as {status!r}")
    return BadRequest(
        f"The run in {output_dir} {ended} at step {summary['global_step']}, so it has no finished student. Go on with "
        "its own command and --resume_from_checkpoint true."
    )


def find_student(output_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """The folder of a run's finished student: in its output folder, else in the `final_dir` that its summary names.

    Raises:
        BadRequest: if it is in neither, the students there are not this run's, or it has not come to finishing one.
    """
    if summary["status"] != "completed" and summary["student_digest"] is None:
        raise _not_finished(output_dir, summary)
    asked = summary["arguments"].get("final_dir") or output_dir
    places = list(dict.fromkeys([Path(output_dir) / FINAL_STUDENT, Path(asked) / FINAL_STUDENT]))
    found = [folder for folder in places if _has_student(folder)]
    if not found:
        raise BadRequest(
            f"There is no finished student in {' or '.join(map(str, places))}. If it was moved, put the folder "
            f"{FINAL_STUDENT} into {output_dir}."
        )
    own = [folder for folder in found if _is_own(folder, summary)]
    if not own:
        raise BadRequest(
            f"The student in {' and in '.join(map(str, found))} is not the one that the run in {output_dir} has "
            "finished: its weights differ, as where another run had the same final_dir. Name the output_dir of the run "
            f"that it is of, or put this run's folder {FINAL_STUDENT} into {output_dir}."
        )
    return own[0]


def student_is_saved(arguments: KavaArguments) -> bool:
    """Whether the student that a run's summary tells of is in its place, saved in the form that is asked for now."""
    training = arguments.training
    folder = Path(training.final_dir or str(training.output_dir))
    student, projector = folder / FINAL_STUDENT, folder / FINAL_PROJECTOR
    with suppress(BadRequest, OSError):  # what cannot be read is written anew
        summary = read_summary(Path(training.output_dir))
        if summary is None or summary["student_digest"] is None or not projector.is_file():
            return False
        same_form = summary["arguments"].get("merge_adapter") == arguments.model.merge_adapter
        return same_form and _has_student(student) and _is_own(student, summary)
    return False


def _has_student(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _is_own(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether a folder holds the weights that a run has finished; yes where an older summary does not tell."""
    expected = summary["student_digest"]
    try:
        return expected is None or weights_digest(folder) == expected
    except OSError as error:
        raise BadRequest(f"The student in {folder} cannot be read ({reason_of(error)}).") from error
