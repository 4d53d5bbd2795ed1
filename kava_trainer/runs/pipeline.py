"""One run from arguments to files, stage by stage, with what the user sees of each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from datasets import Dataset

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import hide_tokens
from ..data.collators import DistillationCollator
from ..data.token_alignment.ranges import as_the_teacher_reads
from ..distillation.model import DistillationModel
from ..evaluation.answers import Evaluation, evaluate_with_answers, first_problems, have_prompts, longest_answer
from ..evaluation.final_answer_match.final_answer_match import is_exact_match
from ..models.layers import context_length
from ..models.loading import on_device
from ..models.sharding.passes import read_apart
from ..reports.summary import MOST_SAMPLES
from ..reports.tables import LONG_NAMES
from ..reports.verdict import CONTROL_FAILED
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console
from ..utils.distributed import is_sharded
from ..utils.errors import BadRequest, Interrupted, RunFailed, exit_code, reason_of
from ..utils.files import no_empty_folders_if_refused
from ..utils.memory import needs_memory, peak_memory_bytes
from ..utils.progress_bar import show_progress_bars, told
from ..utils.signals import WATCH
from .advice import smaller_batches
from .control import build_control, forget_control, train_control
from .display import quieten, shows_bars, tell_alignment, tell_busy_cores, use_all_cores
from .fill_cache import read_from_caches, write_caches
from .finish import add_rollouts, conclude, save_student, tell_interruption, was_interrupted, write_summary
from .pair.models import Models
from .setup import Run
from .start import begin, connect, load_examples, load_pair, try_teacher
from .time_estimate import tell_time


def run(arguments: KavaArguments, argv: list[str]) -> int:
    """Distil as asked and write everything a run leaves behind.

    Args:
        arguments: the checked arguments.
        argv: the command line without the program, to print the command that resumes.

    Returns:
        The exit code: 0 when the run completed, 128 plus the number of the signal that ended it once it trained.

    Raises:
        BadRequest: if models or data are not there or do not fit; nothing has been trained by then.
        RunFailed: if the training broke.
        Interrupted: if a signal came before the training; there was nothing to save.
    """
    training = arguments.training
    with attended(), no_empty_folders_if_refused(training.output_dir, training.final_folder):
        run = begin(open_console(training), arguments, argv)
        load_examples(run)
        load_pair(run)
        connect(run)
        try_teacher(run)
        tell_time(run)
        run.console.stage("Evaluation")
        _evaluate(run, run.trainer, ("teacher", "student_before"))
        if run.caches:
            write_caches(run, run.caches)
            read_from_caches(run, run.caches)
        return _train_to_the_end(run)


@contextmanager
def attended() -> Iterator[None]:
    """Within the `with` block signals are taken, and memory that runs out is a `RunFailed`."""
    try:
        with WATCH:
            yield
    except torch.OutOfMemoryError as error:  # most stages have a message of their own
        raise RunFailed(
            f"Out of memory ({reason_of(error)}).", "Let nothing else use the device, or choose smaller models."
        ) from error


def open_console(training: KavaTrainingArguments) -> Console:
    """Where a command prints; the libraries are kept from printing beside it, and all cores are used."""
    console = Console(training.plain_output)
    quieten(shows_bars(training))
    show_progress_bars(shows_bars(training))
    hide_tokens()
    use_all_cores(training)
    tell_busy_cores(console, training)
    return console


def _train_to_the_end(run: Run) -> int:
    """Everything from the first step on: the output folder is this run's now, and a summary is written at any end."""
    status: str | None = "failed"
    try:
        with WATCH.deferred():
            status, code = _train_and_judge(run)
        return code
    except BadRequest:
        status = None
        raise
    except Interrupted as interruption:
        status = "interrupted"
        tell_interruption(run, run.trainer)
        return exit_code(interruption.number)
    finally:
        if run.training.should_save and status is not None:
            write_summary(run, status)


def _train_and_judge(run: Run) -> tuple[str, int]:
    """The status and the exit code of the run."""
    run.console.stage("Training")
    finished_before = run.checkpoint is not None and run.trainer.finished_state(str(run.checkpoint)) is not None
    if not finished_before:
        forget_control(run.training)
    _train(run)
    if was_interrupted(run.trainer):
        return _interrupted(run, run.trainer)
    save_student(run)
    add_rollouts(run.summary, run.trainer)
    collapse = _measure_finished(run)
    if run.training.run_control:
        run.trainer.release()
        control = _run_control(run, resume=finished_before)
        if control is not None and was_interrupted(control):
            return _interrupted(run, control)
    conclude(run, collapse)
    return "completed", 0


def _interrupted(run: Run, stopped: KavaTrainer) -> tuple[str, int]:
    """The status and the exit code of a run of which a signal has ended a training."""
    tell_interruption(run, stopped)
    return "interrupted", exit_code(cast(int, stopped.emergency.received))


def _evaluate(run: Run, trainer: KavaTrainer, names: tuple[str, ...]) -> None:
    """Measure the teacher or a trainer's student on the held-out examples, and print and note the figures."""
    data, summary, models = run.data, run.summary, replace(run.models, student=trainer.student)
    if data.evaluation is not None:
        problems, held_out = first_problems(models.tokenizer, data.evaluation, MOST_SAMPLES), data.evaluation
        found = measure(run.console, run.arguments, models, held_out, names, data.retention, trainer.model)
        for name, measured in found:
            summary.add_evaluation(name, measured.figures)
            summary.add_answers(name, problems, measured.answers, is_exact_match)


def _most_new_tokens(models: Models, read: Mapping[str, Dataset], sizes: Mapping[str, int]) -> dict[str, int]:
    """How long the answers of each role may be: as asked, and no longer than is left of what the models read.

    Args:
        models: the pair.
        read: the held-out examples by role, in its tokens.
        sizes: what is asked by role.
    """
    most = dict(sizes)
    for role, model in (("teacher", models.teacher), ("student", models.student)):
        if (limit := context_length(model)) is not None:
            most[role] = min(most[role], limit - max(read[role]["prompt_length"]))
    if 0 not in models.readings:  # both write as much
        return dict.fromkeys(most, min(most.values()))
    return most


def measure(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    held_out: Dataset,
    names: tuple[str, ...],
    retention: Dataset | None = None,
    student_in: DistillationModel | None = None,
) -> Iterator[tuple[str, Evaluation]]:
    """Measure the teacher or the student on held-out examples, and print the figures.

    Args:
        console: prints.
        arguments: of the run; they say how much is evaluated at once, and whether answers are generated.
        models: the pair.
        held_out: tokenised examples.
        names: `teacher` for the teacher, any other name of `LONG_NAMES` for the student.
        retention: tokenised text that is no answer, see `load_retention`.
        student_in: the model that holds the student, whose weights may be sharded; by default none does.

    Yields:
        Each name with its figures and answers.
    """
    training = arguments.training
    if not is_sharded(models.student):
        on_device(models.student, training.device)
    read_student = partial(read_apart, models.student) if student_in is None else student_in.read
    read = {"teacher": as_the_teacher_reads(held_out), "student": held_out}
    sizes = {role: training.generation_max_new_tokens or 2 * longest_answer(own) for role, own in read.items()}
    most = _most_new_tokens(models, read, sizes)
    generates = training.evaluate_generation and have_prompts(models.tokenizer, held_out)
    if training.evaluate_generation and not generates and "teacher" in names:
        console.print("No answers are generated: the held-out rows are plain text, which has no prompt to answer.")
    for name in names:
        line = f"Measuring on {len(held_out)} held-out examples: {LONG_NAMES[name].lower()}"
        with told(line), needs_memory("in the evaluation", lambda: smaller_batches(arguments)):
            role = "teacher" if name == "teacher" else "student"
            tokenizer = models.tokenizer_of(role)
            evaluate = partial(
                evaluate_with_answers,
                models.by_role[role],
                tokenizer,
                read[role],
                DistillationCollator(tokenizer),
                training.per_device_eval_batch_size,
                most[role] if generates else None,
                as_the_teacher_reads(retention) if role == "teacher" and retention is not None else retention,
            )
            measured = evaluate() if role == "teacher" else read_student(evaluate)
        figures = measured.figures
        match, kept = figures["exact_match"], figures["retention_cross_entropy"]
        shown = "" if match is None else f", exact match {100 * match:.1f} %"
        shown += "" if kept is None else f", retained language {kept:.4g} nats"
        console.print(f"{LONG_NAMES[name]}: perplexity {figures['perplexity']:.4g}{shown}")
        yield name, measured


def _train(run: Run) -> None:
    console, trainer, checkpoint, summary = run.console, run.trainer, run.checkpoint, run.summary
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if (peak := peak_memory_bytes(trainer.args.device)) is not None:
            whose = "on the device" if trainer.args.device.type == "cuda" else "of the whole process"
            console.print(f"Peak memory so far, {whose}: {peak / 1e9:.2f} GB")
    finally:
        summary.add_training(trainer.state.log_history, trainer.state.global_step)
        earlier = [line.get("peak_memory_bytes") for line in trainer.state.log_history]
        peaks = filter(None, [peak_memory_bytes(trainer.args.device), *earlier])
        summary.content.throughput.peak_memory_bytes = max(peaks, default=None)
        summary.content.throughput = replace(summary.content.throughput, **trainer.throughput())


def _measure_finished(run: Run) -> str | None:
    """Measure the finished student; why the alignment counts as collapsed, if it does."""
    console, summary, trainer = run.console, run.summary, run.trainer
    if run.data.evaluation is None:
        return None
    console.stage("Evaluation")
    metrics = trainer.evaluate()
    summary.add_final(metrics, trainer.pair_figures())
    _evaluate(run, trainer, ("student_after",))
    tell_alignment(console, metrics, trainer.collapse, summary.content.final.pairs or [])
    return trainer.collapse


def _run_control(run: Run, resume: bool) -> KavaTrainer | None:
    """Train and measure the control. Where it breaks the run goes on without it: the student is safe already."""
    console, arguments, summary = run.console, run.arguments, run.summary
    console.stage("Control: the same start, data and steps with the next-token loss alone")
    try:
        control = build_control(run)
        train_control(control, resume)
        if arguments.training.samples:  # for equal steps are not equally long
            summary.content.throughput.control_train_seconds = control.clock.spent()["train_seconds"]
        if not was_interrupted(control):
            _evaluate(run, control, ("control_sft",))
        return control
    except (RunFailed, BadRequest, torch.OutOfMemoryError) as error:
        if arguments.training.world_size > 1:  # the other processes may wait for this one
            raise
        console.warn(f"The control broke off, so there is nothing to compare with: {error}")
        action = "went on without the control"
        summary.content.problems.append({"step": None, "kind": CONTROL_FAILED, "action": action})
        return None
