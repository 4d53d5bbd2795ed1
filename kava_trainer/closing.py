"""The end of a run: its verdict, and the files that tell of it."""

from pathlib import Path

from .arguments import KavaArguments
from .checkpoint_io import broken_reason, list_checkpoints, write_atomically
from .console import Console
from .hub import FINAL_STUDENT, push_student, render_model_card
from .preparation import Data
from .showing import show_verdict
from .summary import RunSummary
from .tracking import RunTracking
from .trainer import KavaTrainer
from .verdict import judge


def write_summary(console: Console, output_dir: str, summary: RunSummary, status: str, tracking: RunTracking) -> None:
    """Write `run_summary.json` of a run that ended, however it did, and tell its trackers of the end.

    All that is local comes before the network. A tracker that fails here is a problem that the summary tells of too.
    """
    if status == "failed":
        summary.content["verdict"] |= {"success": False, "reasons": ["The run did not complete."]}
    summary.content["checkpoints"] = [str(folder) for folder in list_checkpoints(output_dir)]
    if (path := _try_to_write(console, output_dir, summary, status)) is not None:
        console.print(f"Summary: {path}")
    known = len(summary.content["problems"])
    tracking.tell()
    tracking.attach_report(output_dir)
    tracking.close(status == "completed")
    if path is not None and len(summary.content["problems"]) > known:
        _try_to_write(console, output_dir, summary, status)


def _try_to_write(console: Console, output_dir: str, summary: RunSummary, status: str) -> Path | None:
    try:
        return summary.write(output_dir, status)
    except OSError as error:
        console.warn(f"The summary could not be written to {output_dir}: {error.strerror}.")
        return None


def conclude(
    console: Console,
    arguments: KavaArguments,
    data: Data,
    trainer: KavaTrainer,
    summary: RunSummary,
    collapse: str | None,
) -> None:
    """Judge the run, write the student's card, and send it to the hub if asked."""
    training = arguments.training
    supervised = training.lm_weight > 0 or training.kd_weight > 0
    broken = [str(folder) for folder in list_checkpoints(training.output_dir) if broken_reason(folder)]
    examples, taught = data.evaluation and len(data.evaluation), training.aligns or training.kd_weight > 0
    summary.content["verdict"] = judge(summary.content, collapse, supervised, broken, examples, taught)
    show_verdict(console, summary)
    if not training.should_save:
        return
    student_folder = Path(training.final_dir) / FINAL_STUDENT
    card = render_model_card(trainer.hub_model_id or FINAL_STUDENT, arguments, summary.content)
    try:
        write_atomically(student_folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    except OSError as error:
        console.warn(f"The model card could not be written to {student_folder}: {error.strerror}.")
    if training.push_to_hub:
        summary.write(training.output_dir, "completed")  # all that is local comes before the network
        problem = push_student(student_folder, trainer.hub_model_id, arguments)
        if problem is None:
            console.print(f"Pushed to {trainer.hub_model_id}")
        else:
            console.warn(problem)
            summary.content["problems"].append({"step": None, "kind": "hub", "action": problem})
