"""The end of a run: its verdict, and the files that tell of it."""

from pathlib import Path
from typing import cast

from ..config.launcher import resume_command
from ..reports.publish import CARD_FILE, publish, write_card
from ..reports.run_reader import record_of
from ..reports.summary import RunSummary
from ..reports.verdict import judge
from ..trainer.callbacks.emergency import EMERGENCY_PROJECTOR
from ..trainer.checkpoint import broken_reason, list_checkpoints
from ..trainer.final_student import FINAL_PROJECTOR, FINAL_STUDENT
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console
from ..utils.errors import reason_of
from ..utils.hub import Place
from .display import show_verdict
from .setup import Run


def save_student(run: Run) -> None:
    """Save the finished student and its projector, say where they are, and note their checksums in the summary."""
    folder = Path(cast(str, run.training.final_dir))
    student, projector = folder / FINAL_STUDENT, folder / FINAL_PROJECTOR
    written, checksums = run.trainer.save_finals(student, projector, run.arguments.model.merge_adapter)
    run.summary.content.final_checksums = checksums
    run.console.stage("Saved")
    run.console.print(f"Student: {student}{'' if written else ', as it was saved before'}")
    run.console.print(f"Projector: {projector}")


def write_summary(run: Run, status: str) -> None:
    """Write `run_summary.json` of a run that ended, however it did, the report made of it, and tell its trackers.

    All that is local comes before the network. A tracker that fails here is a problem that the summary tells of too.
    """
    console, output_dir, content = run.console, run.training.output_dir, run.summary.content
    if status == "failed":
        content.verdict.success, content.verdict.reasons = False, ["The run did not complete."]
    if (path := _try_to_write(run, status)) is not None:
        console.print(f"Summary: {path}")
        if (page := report_on(console, output_dir, run.summary)) is not None:
            console.print(f"Report: {page}")
    known = len(content.problems)
    run.tracking.tell()
    run.tracking.attach_report(output_dir)
    run.tracking.close(status == "completed")
    if path is not None and len(content.problems) > known:
        _try_to_write(run, status)
        report_on(console, output_dir, run.summary)


def _try_to_write(run: Run, status: str) -> Path | None:
    output_dir = run.training.output_dir
    run.summary.content.checkpoints = [str(folder) for folder in list_checkpoints(output_dir)]
    try:
        return run.summary.write(output_dir, status)
    except OSError as error:
        run.console.warn(f"The summary could not be written to {output_dir}: {error.strerror}.")
        return None


def report_on(console: Console, output_dir: str, summary: RunSummary) -> Path | None:
    """Write `report.html` and `report.png` of a run that has written its summary; the page, or None with a warning."""
    try:
        from ..reports.page import write_report  # matplotlib takes a second, which no run should wait for at its start

        return write_report(record_of(output_dir, summary))
    except Exception as error:  # the run is over: whatever keeps a page from being drawn takes nothing else away
        console.warn(
            f"The report could not be written to {output_dir}: {reason_of(error).rstrip('.')}. Once that is mended: "
            f"python -m kava_trainer report {output_dir}"
        )
        return None


def conclude(run: Run, collapse: str | None) -> None:
    """Judge the run, write the student's card, and send it to the hub if asked."""
    console, training, data, summary = run.console, run.training, run.data, run.summary
    supervised = training.lm_weight > 0 or training.kd_weight > 0
    broken = [str(folder) for folder in list_checkpoints(training.output_dir) if broken_reason(folder)]
    examples, taught = data.evaluation and len(data.evaluation), training.reads_teacher
    summary.content.verdict = judge(summary.content, collapse, supervised, broken, examples, taught)
    show_verdict(console, summary)
    if not training.should_save:
        return
    _try_to_write(run, "completed")  # all that is local comes before the network
    student = Path(cast(str, training.final_dir)) / FINAL_STUDENT
    revision = training.hub_revision if training.push_to_hub else None
    try:
        if not write_card(student, run.trainer.hub_model_id or FINAL_STUDENT, summary.as_written(), revision):
            console.print(f"{student / CARD_FILE} was changed by hand, so it is left as it is.")
    except (OSError, UnicodeDecodeError) as error:
        console.warn(f"The model card could not be written to {student}: {reason_of(error)}.")
    if training.push_to_hub:
        report_on(console, training.output_dir, summary)
        _push(run, student)


def _push(run: Run, student: Path) -> None:
    """Send the run to the hub; what fails is told and noted."""
    console, training, summary = run.console, run.training, run.summary
    repository = cast(str, run.trainer.hub_model_id)
    place = Place(repository, training.hub_token, training.hub_private_repo, training.hub_revision)
    bars = not (training.plain_output or training.disable_tqdm)
    console.stage("Hub")
    problem = publish(console, training.output_dir, student, summary.as_written(), place, bars)
    if problem is None:
        console.print(f"Pushed to {repository}")
    else:
        console.warn(problem)
        summary.content.problems.append({"step": None, "kind": "hub", "action": problem})


def last_checkpoint(trainer: KavaTrainer) -> Path:
    """Where the checkpoint of the last step is, if it was written."""
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def was_interrupted(trainer: KavaTrainer) -> bool:
    """Whether a signal ended the training."""
    return trainer.emergency.received is not None


def tell_interruption(run: Run, stopped: KavaTrainer) -> None:
    """Say what was saved of the trainer that a signal ended, the run's own or its control's, and how to go on."""
    console, main = run.console, run.trainer
    places = [last_checkpoint(stopped), Path(stopped.args.output_dir) / EMERGENCY_PROJECTOR]
    saved = [str(path) for path in places if path.exists()]
    console.stage("Interrupted")
    if last_checkpoint(stopped).is_dir():
        console.print(f"Saved after step {stopped.state.global_step}: {' and '.join(saved)}")
    if last_checkpoint(main).is_dir():
        console.print(f"Resume with: {resume_command(run.argv, last_checkpoint(main))}")
    elif main.state.global_step == 0:
        console.print(f"No step was done. Start again with: {resume_command(run.argv, None)}")
    else:
        console.print(f"There is no checkpoint of step {main.state.global_step}. {main.advice()}")
