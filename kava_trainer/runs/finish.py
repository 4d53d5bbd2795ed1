"""The end of a run: its verdict, and the files that tell of it."""

import json
from collections.abc import Sized
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.alignment.teachers import TeacherChoice
from ..config.launcher import resume_command
from ..data.selection import learned_tokens
from ..distillation.teachers.several import online_teachers
from ..reports.findings.rollouts import RolloutPair, excerpt
from ..reports.next_steps import IN_A_SCRIPT
from ..reports.publish import CARD_FILE, publish, write_card
from ..reports.run_reader import record_of
from ..reports.summary import REPORT_PAGE, RunSummary
from ..reports.verdict import judge
from ..trainer.callbacks.emergency import EMERGENCY_PROJECTOR
from ..trainer.checkpoint import broken_reason, list_checkpoints
from ..trainer.final_student import FINAL_PROJECTOR, FINAL_STUDENT
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console
from ..utils.environment import describe_environment
from ..utils.errors import BadRequest, reason_of
from ..utils.hub import Place
from ..utils.progress_bar import working
from .display import show_verdict
from .pair.models import own_parameters
from .setup import Run


def save_student(run: Run) -> None:
    """Save the finished student and its projector, say where they are, and note their checksums in the summary."""
    folder = Path(cast(str, run.training.final_dir))
    student, projector = folder / FINAL_STUDENT, folder / FINAL_PROJECTOR
    with working("Saving the student"):
        written, checksums = run.trainer.save_finals(student, projector, run.arguments.model.merge_adapter)
    run.summary.content.final_checksums = checksums
    run.console.stage("Saved")
    run.console.print(f"Student: {student}{'' if written else ', as it was saved before'}")
    run.console.print(f"Projector: {projector if run.trainer.target.projectors else 'there is none'}")


def add_rollouts(summary: RunSummary, trainer: KavaTrainer) -> None:
    """Note the student's first own answers of a training that is over, and what it answers to the same prompts now.

    There are none without a tokenizer, which makes them texts. Raises as `Rollouts.first_and_last`.
    """
    tokenizer = cast(PreTrainedTokenizerBase | None, trainer.processing_class)
    if trainer.rollouts is None or tokenizer is None:
        return
    with working("Sampling the student's last answers"):
        found = trainer.rollouts.first_and_last()
    summary.content.rollouts = [
        RolloutPair(
            excerpt(str(tokenizer.decode(first.prompt, skip_special_tokens=True))),
            *(excerpt(str(tokenizer.decode(own.answer))) for own in (first, last)),
        )
        for first, last in found
    ] or None


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

        with working("Writing the report"):
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
    supervised = training.learns_next_tokens or training.kd_weight > 0
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


def write_report(trainer: KavaTrainer, folder: str | Path | None = None) -> Path:
    """Write what a run of the command line leaves, for a training in a script: call it after `trainer.train()`.

    Where the last step was not evaluated and the trainer has an `eval_dataset`, that is done first. All processes have
    to call it; the main one writes `run_summary.json`, `log_history.json`, `report.html` and `report.png`. `python -m
    kava_trainer report FOLDER` builds the page anew then, and compares it with those of other runs.

    Args:
        trainer: that has trained.
        folder: where they go, `args.output_dir` by default.

    Returns:
        The page.

    Raises:
        BadRequest: if nothing was trained yet.
        OSError: if they cannot be written.
    """
    if trainer.state.global_step == 0:
        raise BadRequest("There was no training yet, so there is nothing to report;", "call trainer.train() first.")
    from ..reports.page import write_report as write_page  # with matplotlib, as above

    folder = Path(folder or str(trainer.args.output_dir))
    metrics, summary = _last_evaluation(trainer), _summary_of(trainer)
    if metrics is not None:
        summary.add_final(metrics, trainer.pair_figures())
        _add_perplexity(summary, "student_after", metrics)
    args, content = trainer.args, summary.content
    content.checkpoints = [str(path) for path in list_checkpoints(args.output_dir)]
    broken = [path for path in content.checkpoints if broken_reason(Path(path))]
    supervised, taught = args.learns_next_tokens or args.kd_weight > 0, args.reads_teacher
    status = "interrupted" if was_interrupted(trainer) else "completed"
    if status == "completed":
        add_rollouts(summary, trainer)
        examples = content.held_out_examples
        content.verdict = judge(content, trainer.collapse, supervised, broken, examples, taught)
        content.verdict.next_steps = [IN_A_SCRIPT.get(step, step) for step in content.verdict.next_steps]
    if args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        summary.write(folder, status)
        write_page(record_of(folder, summary))
    return folder / REPORT_PAGE


def _held_out(trainer: KavaTrainer) -> tuple[str, Any]:
    """What metrics of the held-out examples begin with, and these; of several sets the first, which the probe is of."""
    held_out = trainer.eval_dataset
    if not isinstance(held_out, dict):
        return "eval", held_out
    return next(((f"eval_{name}", examples) for name, examples in held_out.items()), ("eval", None))


def _as_of_one_set(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics that begin with a prefix, beginning with `eval` as where there is one set alone."""
    return {f"eval{n.removeprefix(prefix)}": value for n, value in metrics.items() if n.startswith(f"{prefix}_")}


def _last_evaluation(trainer: KavaTrainer) -> dict[str, Any] | None:
    """The metrics of the student as it is now; None where nothing is held out."""
    state, best = trainer.state, trainer.state.best_global_step
    prefix, held_out = _held_out(trainer)
    at_the_end = [line for line in state.log_history if line["step"] == state.global_step]
    found = next((line for line in reversed(at_the_end) if f"{prefix}_runtime" in line), None)
    if trainer.args.load_best_model_at_end and best not in (None, state.global_step):
        found = None  # of the last step's weights, which the student has no more
    if found is None and held_out is not None:
        found = trainer.evaluate()
    return found and _as_of_one_set(found, prefix)


def _summary_of(trainer: KavaTrainer) -> RunSummary:
    """What a trainer knows of its training."""
    teacher, student, history = trainer.teacher, trainer.student, trainer.state.log_history
    arguments = {**trainer.args.to_dict(), "student_model_name_or_path": _name_of(student)}
    names = [_name_of(own.model) for own in online_teachers(teacher)]
    if names:
        arguments["teacher_model_name_or_path"] = names[0]
    if len(names) > 1:
        choices = trainer.args.choices or [TeacherChoice()] * len(names)
        named = zip(names, choices, strict=True)
        arguments["teachers"] = json.dumps([{"model": name, "weight": own.weight} for name, own in named])
    if name := getattr(getattr(trainer.train_dataset, "info", None), "dataset_name", None):
        arguments["dataset_name"] = name
    summary = RunSummary(arguments, describe_environment(trainer.args.device))
    seconds = next((line["train_runtime"] for line in reversed(history) if "train_runtime" in line), 0.0)
    began = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    summary.go_on_from({"started_at": began.isoformat(timespec="seconds"), "seconds": seconds})
    summary.add_training(history, trainer.state.global_step)
    content = summary.content
    content.problems, content.student_parameters = trainer.problems, own_parameters(student)
    prefix, held_out = _held_out(trainer)
    content.held_out_examples = len(held_out) if isinstance(held_out, Sized) else None
    content.held_out_tokens = learned_tokens(held_out)
    peaks = [line["peak_memory_bytes"] for line in history if line.get("peak_memory_bytes")]
    content.throughput = replace(content.throughput, **trainer.throughput(), peak_memory_bytes=max(peaks, default=None))
    starts = (line for line in history if line["step"] == 0 and f"{prefix}_runtime" in line)
    if (start := next(starts, None)) is not None:
        _add_perplexity(summary, "student_before", _as_of_one_set(start, prefix))
    return summary


def _name_of(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _add_perplexity(summary: RunSummary, who: str, metrics: dict[str, Any]) -> None:
    """Note what an evaluation of Trainer's tells of a model's answers, if it does."""
    if (loss := metrics.get("eval_answer_loss", metrics.get("eval_lm_loss"))) is not None:
        figures = {"cross_entropy": loss, "perplexity": metrics["eval_perplexity"], "exact_match": None}
        summary.add_evaluation(who, figures)


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
