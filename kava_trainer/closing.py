"""The end of a run: its verdict, and the files that tell of it."""

from pathlib import Path

from .arguments import KavaArguments
from .checkpoint_io import broken_reason, list_checkpoints, write_atomically
from .console import Console
from .hub import FINAL_STUDENT, push_student, render_model_card
from .preparation import Data
from .run_folder import record_of
from .showing import show_verdict
from .summary import RunSummary
from .trainer import KavaTrainer
from .verdict import judge


def write_summary(console: Console, output_dir: str, summary: RunSummary, status: str) -> None:
    """Write `run_summary.json` of a run that ended, however it did, and the report made of it."""
    if status == "failed":
        summary.content["verdict"] |= {"success": False, "reasons": ["The run did not complete."]}
    summary.content["checkpoints"] = [str(folder) for folder in list_checkpoints(output_dir)]
    try:
        console.print(f"Summary: {summary.write(output_dir, status)}")
    except OSError as error:
        console.warn(f"The summary could not be written to {output_dir}: {error.strerror}.")
        return
    if (page := report_on(console, output_dir, summary)) is not None:
        console.print(f"Report: {page}")


def report_on(console: Console, output_dir: str, summary: RunSummary) -> Path | None:
    """Write `report.html` and `report.png` of a run that has written its summary; the page, or None with a warning."""
    from .report import write_report  # matplotlib takes a second, which no run should wait for at its start

    try:
        return write_report(record_of(output_dir, summary))
    except OSError as error:
        console.warn(f"The report could not be written to {output_dir}: {error.strerror}.")
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
        report_on(console, training.output_dir, summary)
        problem = push_student(student_folder, trainer.hub_model_id, arguments)
        if problem is None:
            console.print(f"Pushed to {trainer.hub_model_id}")
        else:
            console.warn(problem)
            summary.content["problems"].append({"step": None, "kind": "hub", "action": problem})
