"""What a run has left on disk, read back: also of a run that was cut off and wrote no summary."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..trainer.checkpoint import TRAINER_STATE_FILE, find_newest_checkpoint, list_checkpoints, read_manifest
from ..trainer.final_student import FINAL_PROJECTOR, FINAL_STUDENT, difference, has_student
from ..utils.errors import BadRequest, Problem, reason_of
from ..utils.files import is_utf8
from .summary import HISTORY_FILE, SCHEMA_VERSION, SUMMARY_FILE, Evaluations, RunSummary, Sample, Summary, finite

CUT_OFF = "cut_off"
"""Status of a run that wrote no summary when it ended, beside those that a summary can have."""

ENDED = "ended"
"""The same of a training in a script that came to its end."""

_NO_ARGUMENTS = {"data", "teacher", "student", "sharded", "world_size", "datasets_version"}
"""What `identity.run_identity` adds to the arguments."""

_READ = {
    "output_dir", "final_dir", "alignment_target", "mercator_weight", "mse_weight", "relative_mse_weight",
    "attention_weight", "relations_weight", "projector_direction", "projector_anchor", "generation_max_new_tokens",
}  # fmt: skip
"""Arguments of the training that something is made of, not only shown; of those of models and data all are."""

_UNTRAINED = ("teacher", "student_before")
"""The models that are measured before the training."""


@dataclass(frozen=True)
class RunRecord:
    """One run, as a report needs it."""

    folder: Path
    """Its `output_dir`."""
    summary: Summary
    """For one that left none of its end, one with status `cut_off`, or `ended` where its training was over."""
    log_history: list[dict[str, Any]]
    """The log lines of its training."""
    note: str | None = None
    """Sentences on where these come from, where that is not a summary and its log lines."""


def record_of(output_dir: str | Path, summary: RunSummary) -> RunRecord:
    """The record of a run that has just written its summary."""
    return RunRecord(Path(output_dir), summary.as_written(), json.loads(summary.history_to_json()))


def read_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], list[Problem]]:
    """The output folders of runs, and what is wrong with those that cannot be read or are named twice."""
    records: list[RunRecord] = []
    problems: list[Problem] = []
    twice = sorted({str(folder) for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1})
    if twice:
        problems.append(Problem(None, f"{', '.join(twice)} is named more than once;", "name each run once."))
    for folder in dict.fromkeys(folders):
        try:
            records.append(read_run(folder))
        except BadRequest as error:
            problems += error.problems
    return records, problems


def read_run(folder: str | Path) -> RunRecord:
    """Read the output folder of a run.

    A run that was killed has no summary, or an old one from before it was resumed. Then the log lines and the
    arguments are those of its newest sound checkpoint.

    Raises:
        BadRequest: if there is no such folder, or no run has left anything in it that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder; name the output_dir of a run.")
    summary = read_summary(folder)
    saved = list_checkpoints(folder)
    last = int(saved[-1].name.rsplit("-", 1)[1]) if saved else -1
    if summary is None or last > summary.global_step:
        cut_off = _from_checkpoint(folder, summary)
        if cut_off is not None:
            return cut_off
    if summary is None:
        raise BadRequest(
            f"{folder} holds neither {SUMMARY_FILE} nor a checkpoint that is whole, so there is nothing to report; "
            "name the output_dir of a run."
        )
    if (folder / HISTORY_FILE).exists():
        history = finite(_read_json(folder / HISTORY_FILE))
        if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
            raise BadRequest(f"{folder / HISTORY_FILE} is no list of log lines; delete it to go without curves.")
        return RunRecord(folder, summary, history)
    return _with_lines_of_checkpoint(folder, summary)


def _of_their_types(arguments: Mapping[str, Any]) -> bool:
    """Whether those arguments that something is made of are of their types."""
    from ..config.data_arguments import DataArguments
    from ..config.model_arguments import ModelArguments
    from ..config.parser import fits_type  # takes seconds, which a folder without a run need not wait for

    read = _READ.union(*({field.name for field in fields(group)} for group in (ModelArguments, DataArguments)))
    return all(fits_type(name, value) for name, value in arguments.items() if name in read)


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{path} cannot be read ({reason_of(error)}).") from error
    if not is_utf8(content):
        raise BadRequest(f"{path} holds text that is not UTF-8.")
    return content


def read_summary(folder: Path) -> Summary | None:
    """The summary in a run's folder; None where there is none. Raises `BadRequest` if it is not what KAVA writes."""
    path = folder / SUMMARY_FILE
    if not path.exists():
        return None
    found = finite(_read_json(path))
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BadRequest(f"{path} is no summary of a run.")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BadRequest(
            f"{path} has schema_version {found['schema_version']}, but this version of KAVA reads {SCHEMA_VERSION}; "
            "use the version that wrote it."
        )
    try:
        summary = Summary.from_dict(found)
        if not _of_their_types(summary.arguments):
            raise ValueError("arguments")
    except ValueError as error:
        raise BadRequest(f"{path} is not as it was written: look at {error}.") from error
    return summary


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return finite(_read_json(checkpoint / TRAINER_STATE_FILE))


def _with_lines_of_checkpoint(folder: Path, summary: Summary) -> RunRecord:
    """A run whose summary has no log lines beside it, as those of earlier versions."""
    newest = find_newest_checkpoint(folder).checkpoint
    if newest is None:
        return RunRecord(folder, summary, [], f"There is no {HISTORY_FILE} in the folder, so there are no curves.")
    note = f"There is no {HISTORY_FILE} in the folder; the curves are those of {newest.name}."
    return RunRecord(folder, summary, _trainer_state(newest)["log_history"], note)


def _of_untrained(sample: Sample) -> Sample:
    """A held-out problem without the answers that training changes."""

    def untrained(by_name: dict[str, Any]) -> dict[str, Any]:
        return {who: value if who in _UNTRAINED else None for who, value in by_name.items()}

    return replace(sample, answers=untrained(sample.answers), matches=untrained(sample.matches))


def _take_over(summary: Summary, before: Summary) -> None:
    """Add to the summary of a run that was cut off what that of its earlier part knows."""
    summary.environment, summary.command = before.environment, before.command
    summary.teacher_fidelity = before.teacher_fidelity
    summary.evaluation = Evaluations(**{who: getattr(before.evaluation, who) for who in _UNTRAINED})
    summary.samples = [_of_untrained(sample) for sample in before.samples]
    summary.started_at = summary.started_at or before.started_at


def _from_checkpoint(folder: Path, before: Summary | None) -> RunRecord | None:
    """What is known of a run that was cut off.

    Args:
        folder: of the run.
        before: the summary of its earlier part, if it was interrupted and resumed.

    Returns:
        None where no checkpoint is sound, or none is newer than the summary.
    """
    newest = find_newest_checkpoint(folder).checkpoint
    if newest is None:
        return None
    state = _trainer_state(newest)
    step, history = state["global_step"], state["log_history"]
    if before is not None and step <= before.global_step:
        return None
    from ..trainer.run_state import read_progress  # with torch

    asked = read_manifest(newest)["run"] or {}
    arguments = {name: value for name, value in asked.items() if name not in _NO_ARGUMENTS}
    collected = RunSummary(arguments or (before.arguments if before else {}), {})
    collected.add_training(history, step)
    summary, progress = collected.content, read_progress(newest, 0, 1)
    summary.status, summary.started_at = CUT_OFF, None
    summary.problems = progress.get("problems", [])
    if (run_time := progress.get("run_time")) is not None:
        summary.started_at, summary.duration_seconds = run_time["started_at"], round(run_time["seconds"], 1)
    summary.checkpoints = [str(path) for path in list_checkpoints(folder)]
    peaks = [line["peak_memory_bytes"] for line in history if line.get("peak_memory_bytes")]
    summary.throughput.peak_memory_bytes = max(peaks, default=None)
    shown = f"What is shown is what {newest.name} holds; whatever came after step {step} is lost or not yet there."
    note = f"The run was cut off, or is still running: there is no {SUMMARY_FILE} of its end. {shown}"
    if not asked and step >= state.get("max_steps", math.inf):
        summary.status = ENDED
        note = (
            f"The training ended at step {step}, and left no {SUMMARY_FILE}: in a script kava_trainer.write_report "
            f"writes it. What is shown is what {newest.name} holds."
        )
    if before is not None:
        _take_over(summary, before)
        note += f" It had been resumed after step {before.global_step}."
    return RunRecord(folder, summary, history, note)


def finished_summary(output_dir: str | Path) -> Summary:
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
    from .recipe import with_defaults  # takes seconds, as above

    return replace(summary, arguments=with_defaults(summary.arguments))


def completed_summary(output_dir: str | Path) -> Summary:
    """The summary of a run that was completed.

    Raises:
        BadRequest: as `finished_summary`, and if the run is not complete.
    """
    summary = finished_summary(output_dir)
    if summary.status != "completed":
        raise _not_completed(output_dir, summary)
    return summary


def _not_completed(output_dir: str | Path, summary: Summary) -> BadRequest:
    status, step = summary.status, summary.global_step
    ended = {"interrupted": "was interrupted", "failed": "failed"}.get(status, f"ended as {status!r}")
    when = "before its student was finished"
    if summary.final_checksums:
        when = "when its student was finished, but not all of it was measured"
    return BadRequest(
        f"The run in {output_dir} {ended} at step {step}, {when}. Go on with its own command and "
        "--resume_from_checkpoint true."
    )


def find_student(output_dir: str | Path, summary: Summary) -> Path:
    """The folder of a run's finished student: in its output folder, else in the `final_dir` that its summary names.

    Args:
        output_dir: of the run.
        summary: of `finished_summary`. Where an older one has no checksums, any student counts.

    Raises:
        BadRequest: if it is in neither, those there are not this run's, or the run has not come to finishing one.
    """
    checksums = summary.final_checksums
    if summary.status != "completed" and not checksums:
        raise _not_completed(output_dir, summary)
    asked = summary.arguments["final_dir"] or output_dir
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
