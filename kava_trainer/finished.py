"""Which student a run has left: another run may have gone to the same folder since."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BadRequest, reason_of
from .finals import FINAL_PROJECTOR, FINAL_STUDENT, difference, has_student
from .recipe import with_defaults
from .run_folder import read_summary
from .summary import SUMMARY_FILE


def finished_summary(output_dir: str | Path) -> dict[str, Any]:
    """The summary of a run that has ended, with today's defaults for arguments that it does not know.

    Raises:
        BadRequest: if there is none, or it cannot be read.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise BadRequest(f"There is no folder {folder}; name the output_dir of a run.")
    summary = read_summary(folder)
    if summary is None:
        raise BadRequest(f"{folder} has no {SUMMARY_FILE}; name the output_dir of a run that has ended.")
    return {**summary, "arguments": with_defaults(summary["arguments"])}


def completed_summary(output_dir: str | Path) -> dict[str, Any]:
    """The summary of a run that was completed.

    Raises:
        BadRequest: as `finished_summary`, and if the run is not complete.
    """
    summary = finished_summary(output_dir)
    if summary["status"] != "completed":
        raise _not_completed(output_dir, summary)
    return summary


def _not_completed(output_dir: str | Path, summary: Mapping[str, Any]) -> BadRequest:
    status, step = summary["status"], summary["global_step"]
    ended = {"interrupted": "was interrupted", "failed": "failed"}.get(status, f"ended as {status!r}")
    when = "before its student was finished"
    if summary["final_checksums"]:
        when = "when its student was finished, but not all of it was measured"
    return BadRequest(
        f"The run in {output_dir} {ended} at step {step}, {when}. Go on with its own command and "
        "--resume_from_checkpoint true."
    )


def find_student(output_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """The folder of a run's finished student: in its output folder, else in the `final_dir` that its summary names.

    Args:
        output_dir: of the run.
        summary: of `finished_summary`. Where an older one has no checksums, any student counts.

    Raises:
        BadRequest: if it is in neither, those there are not this run's, or the run has not come to finishing one.
    """
    checksums = summary["final_checksums"]
    if summary["status"] != "completed" and not checksums:
        raise _not_completed(output_dir, summary)
    asked = summary["arguments"]["final_dir"] or output_dir
    places = list(dict.fromkeys([Path(output_dir), Path(asked)]))
    found = [place for place in places if has_student(place / FINAL_STUDENT)]
    if not found:
        raise BadRequest(
            f"There is no finished student in {' or '.join(str(place / FINAL_STUDENT) for place in places)}. If it was "
            f"moved, put the folder {FINAL_STUDENT} into {output_dir}."
        )
    differences = {place: _difference(place, checksums) for place in found}
    own = next((place for place, what in differences.items() if what is None), None)
    if own is None:
        told = "; ".join(f"in {place} {what}" for place, what in differences.items())
        raise BadRequest(
            f"What is there is not what the run in {output_dir} has finished: {told}. Perhaps another run had the same "
            f"final_dir: name the output_dir of that one, or put {FINAL_STUDENT} and {FINAL_PROJECTOR} of this one "
            f"into {output_dir}."
        )
    return own / FINAL_STUDENT


def _difference(place: Path, checksums: Mapping[str, str] | None) -> str | None:
    """What of a run's finals is another one's; a projector that is gone makes no difference to the student."""
    expected = dict(checksums or {})
    if not (place / FINAL_PROJECTOR).exists():
        expected.pop(FINAL_PROJECTOR, None)
    try:
        return difference(place, expected)
    except OSError as error:
        raise BadRequest(f"The student in {place} cannot be read ({reason_of(error)}).") from error
