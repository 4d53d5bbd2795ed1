"""One run from arguments to files, stage by stage, with what the user sees of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import hide_tokens, run_command
from ..data.collators import DistillationCollator
from ..evaluation.answers import Evaluation, evaluate_with_answers, first_problems, longest_answer
from ..evaluation.final_answer_match.final_answer_match import is_exact_match
from ..evaluation.teacher_fidelity import TeacherFidelity
from ..models.layers import context_length
from ..reports.model_card import local_sources
from ..reports.summary import MOST_SAMPLES, RunSummary
from ..reports.tables import LONG_NAMES
from ..reports.verdict import CONTROL_FAILED
from ..trainer.checkpoint import Resumption, resolve_checkpoint, sweep
from ..trainer.final_student import FINAL_STUDENT
from ..trainer.run_state import progress_file, read_progress
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console
from ..utils.distributed import from_main_process
from ..utils.environment import describe_environment
from ..utils.errors import BadRequest, Interrupted, RunFailed, exit_code, reason_of
from ..utils.files import make_folder, no_empty_folders_if_refused
from ..utils.memory import needs_memory, peak_memory_bytes
from ..utils.progress_bar import show_progress_bars
from ..utils.signals import WATCH
from .advice import smaller_batches, smaller_models
from .control import build_control, check_place_of_control, forget_control, train_control
from .display import quieten, show_configuration, show_environment, shows_bars, tell_alignment, use_all_cores
from .fill_cache import open_cache, read_from_cache, write_cache
from .finish import conclude, save_student, tell_interruption, was_interrupted, write_summary
from .identity import check_output_dir, check_resumable, data_digest, earlier_run, name_run, run_identity
from .setup import (
    Data,
    Models,
    build_trainer,
    check_teacher,
    load_data,
    load_models,
    load_tokenizers,
    own_parameters,
    tell_memory,
)
from .tracking import RunTracking


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
    with attended(), no_empty_folders_if_refused(arguments.training.output_dir, arguments.training.final_dir):
        return _run(arguments, argv)


@contextmanager
def attended() -> Iterator[None]:
    """Within the `with` block signals are taken, and memory that runs out is a `RunFailed`."""
    try:
        with WATCH:
            yield
    except torch.OutOfMemoryError as error:  # most stages have a message of their own
        raise RunFailed(
            f"Out of memory ({reason_of(error)}). Let nothing else use the device, or choose smaller models."
        ) from error


def open_console(training: KavaTrainingArguments) -> Console:
    """Where a command prints; the libraries are kept from printing beside it, and all cores are used."""
    console = Console(training.plain_output)
    quieten(shows_bars(training))
    show_progress_bars(shows_bars(training))
    hide_tokens()
    use_all_cores(training)
    return console


def _run(arguments: KavaArguments, argv: list[str]) -> int:
    training = arguments.training
    console = open_console(training)
    _prepare_folders(arguments)
    resumption = from_main_process(lambda: _find_checkpoint(arguments))
    training.run_name = from_main_process(lambda: name_run(training, resumption.checkpoint))
    asked = arguments.to_dict()
    environment = {**describe_environment(training.device), "local_sources": local_sources(asked)}
    summary = RunSummary(asked, environment, run_command(argv))
    show_environment(console, training.device)
    show_configuration(console, arguments, resumption)
    tokenizer = load_tokenizers(arguments)
    data = load_data(console, arguments, tokenizer)
    identity = from_main_process(lambda: _identify(console, arguments, data, resumption.checkpoint))
    summary.content.throughput.estimated_memory_bytes = tell_memory(console, arguments)
    console.stage("Models")
    probed = data.train if data.evaluation is None else data.evaluation
    fidelity = TeacherFidelity(console, arguments, tokenizer, probed, data.evaluation is not None, data.collator)
    fidelity.read_unquantised()
    with needs_memory("while the models were loaded", lambda: smaller_models(arguments)):
        models = load_models(console, arguments, tokenizer)
        summary.content.prompt_kind = data.prompt_kind
        summary.content.student_parameters = own_parameters(models.student)
        summary.content.held_out_examples = None if data.evaluation is None else len(data.evaluation)
        summary.content.teacher_fidelity = fidelity.compare(models.teacher)
        trainer = build_trainer(console, arguments, models, data)
    if resumption.checkpoint is not None and training.should_save:
        _go_on_from(resumption.checkpoint, summary)
    trainer.identity, trainer.run_time = identity, summary.run_time
    summary.content.problems = trainer.problems
    tracking = RunTracking(trainer, summary.content)
    trainer.add_callback(tracking)
    cache = open_cache(arguments, models, trainer)
    with needs_memory("while the teacher was tried out", lambda: smaller_batches(arguments)):
        check_teacher(console, models, data, training.per_device_eval_batch_size, trainer.problems)
    console.stage("Evaluation")
    _evaluate(console, arguments, models, data, summary, ("teacher", "student_before"))
    if cache is not None:
        write_cache(console, arguments, cache, models, data, trainer)
        read_from_cache(console, arguments, cache, models, trainer)
    status = "failed"  # from here on the output folder is this run's, and its summary is written however it ends
    try:
        with WATCH.deferred():
            status, code = _train_and_judge(
                console, arguments, models, data, trainer, resumption.checkpoint, summary, argv
            )
        return code
    except BadRequest:
        status = None
        raise
    except Interrupted as interruption:
        status = "interrupted"
        tell_interruption(console, trainer, trainer, argv)
        return exit_code(interruption.number)
    finally:
        if training.should_save and status is not None:
            write_summary(console, training.output_dir, summary, status, tracking)


def _find_checkpoint(arguments: KavaArguments) -> Resumption:
    """Where to go on from, once what a killed run left half done is cleared away."""
    for folder in {arguments.training.output_dir, arguments.training.final_dir}:
        sweep(folder)
    return resolve_checkpoint(arguments.training.resume_from_checkpoint, arguments.training.output_dir)


def _go_on_from(checkpoint: Path, summary: RunSummary) -> None:
    """Let the summary tell of the run's earlier sessions too, where the checkpoint knows of them."""
    known = (checkpoint / progress_file(0)).exists()  # one that cannot be resumed is told of when it is loaded
    if known and (earlier := read_progress(checkpoint, 0, 1).get("run_time")) is not None:
        summary.go_on_from(earlier)


def _identify(console: Console, arguments: KavaArguments, data: Data, checkpoint: Path | None) -> dict[str, Any]:
    """What this run is; the checkpoint and the output folder must be its own."""
    identity = run_identity(arguments, data_digest(data.train))
    if checkpoint is not None:
        found = check_resumable(checkpoint, identity)
        if found.harmless:
            console.print(f"Differs from the checkpoint, without effect on the training: {'; '.join(found.harmless)}")
        if found.training:
            console.warn(
                f"Differs from the checkpoint: {'; '.join(found.training)}. From here on the run is not what it would "
                "have been."
            )
    output_dir = arguments.training.output_dir
    check_output_dir(output_dir, identity, resuming=checkpoint is not None)
    if checkpoint is None and (there := earlier_run(output_dir)) is not None:
        console.warn(
            f"{there}, which this one replaces piece by piece. To keep it, stop now and name another output_dir, or "
            "write resume_from_checkpoint true to go on with it."
        )
    return identity


def _train_and_judge(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    data: Data,
    trainer: KavaTrainer,
    checkpoint: Path | None,
    summary: RunSummary,
    argv: list[str],
) -> tuple[str, int]:
    """Everything from the first step on; the status and the exit code of the run."""
    console.stage("Training")
    finished_before = checkpoint is not None and trainer.finished_state(str(checkpoint)) is not None
    if not finished_before:
        forget_control(arguments.training)
    _train(console, trainer, checkpoint, summary)
    if was_interrupted(trainer):
        tell_interruption(console, trainer, trainer, argv)
        return "interrupted", exit_code(trainer.emergency.received)
    save_student(console, arguments, trainer, summary)
    collapse = _measure_finished(console, arguments, models, data, trainer, summary)
    if arguments.training.run_control:
        trainer.release()
        control = _run_control(console, arguments, models, data, summary, resume=finished_before)
        if control is not None and was_interrupted(control):
            tell_interruption(console, control, trainer, argv)
            return "interrupted", exit_code(control.emergency.received)
    conclude(console, arguments, data, trainer, summary, collapse)
    return "completed", 0


def _prepare_folders(arguments: KavaArguments) -> None:
    for name in ("output_dir", "final_dir"):
        make_folder(name, getattr(arguments.training, name))
    check_places(arguments.training)


def check_places(training: KavaTrainingArguments) -> None:
    """Make sure that the places of student and control are free. Raises `BadRequest` if something else is there."""
    check_place_of_control(training)
    student = Path(training.final_dir) / FINAL_STUDENT
    if student.exists() and not student.is_dir():
        raise BadRequest(f"{student} is a file, but the student's folder goes there; move it or set final_dir.")


def _evaluate(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    data: Data,
    summary: RunSummary,
    names: tuple[str, ...],
) -> None:
    """Measure the teacher or the student on the held-out examples, and print and note the figures."""
    if data.evaluation is not None:
        problems = first_problems(models.tokenizer, data.evaluation, MOST_SAMPLES)
        for name, measured in measure(console, arguments, models, data.evaluation, data.collator, names):
            summary.add_evaluation(name, measured.figures)
            summary.add_answers(name, problems, measured.answers, is_exact_match)


def measure(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    held_out: Dataset,
    collator: DistillationCollator,
    names: tuple[str, ...],
) -> Iterator[tuple[str, Evaluation]]:
    """Measure the teacher or the student on held-out examples, and print the figures.

    Args:
        console: prints.
        arguments: of the run; they say how much is evaluated at once, and whether answers are generated.
        models: the pair.
        held_out: tokenised examples.
        collator: pads them.
        names: `teacher` for the teacher, any other name of `LONG_NAMES` for the student.

    Yields:
        Each name with its figures and answers.
    """
    training = arguments.training
    models.student.to(training.device)
    new_tokens = training.generation_max_new_tokens or 2 * longest_answer(held_out)
    limits = [limit for model in (models.teacher, models.student) if (limit := context_length(model)) is not None]
    new_tokens = min([new_tokens, *(limit - max(held_out["prompt_length"]) for limit in limits)])
    for name in names:
        with needs_memory("in the evaluation", lambda: smaller_batches(arguments)):
            measured = evaluate_with_answers(
                models.teacher if name == "teacher" else models.student,
                models.tokenizer,
                held_out,
                collator,
                training.per_device_eval_batch_size,
                new_tokens if training.evaluate_generation else None,
            )
        figures = measured.figures
        match = figures["exact_match"]
        shown = "" if match is None else f", exact match {100 * match:.1f} %"
        console.print(f"{LONG_NAMES[name]}: perplexity {figures['perplexity']:.4g}{shown}")
        yield name, measured


def _train(console: Console, trainer: KavaTrainer, checkpoint: Path | None, summary: RunSummary) -> None:
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not result.metrics:
            console.print("The checkpoint is at the last step already; nothing is left to train.")
        if (peak := peak_memory_bytes(trainer.args.device)) is not None:
            whose = "on the device" if trainer.args.device.type == "cuda" else "of the whole process"
            console.print(f"Peak memory so far, {whose}: {peak / 1e9:.2f} GB")
    finally:
        summary.add_training(trainer.state.log_history, trainer.state.global_step)
        earlier = [line.get("peak_memory_bytes") for line in trainer.state.log_history]
        peaks = filter(None, [peak_memory_bytes(trainer.args.device), *earlier])
        summary.content.throughput.peak_memory_bytes = max(peaks, default=None)
        summary.content.throughput = replace(summary.content.throughput, **trainer.throughput())


def _run_control(
    console: Console, arguments: KavaArguments, models: Models, data: Data, summary: RunSummary, resume: bool
) -> KavaTrainer | None:
    """Train and measure the control. Where it breaks the run goes on without it: the student is safe already."""
    console.stage("Control: the same start, data and steps with the next-token loss alone")
    try:
        control = build_control(arguments, models, data)
        train_control(control, resume)
        if not was_interrupted(control):
            own = Models(models.teacher, control.whole_student(), models.tokenizer)
            _evaluate(console, arguments, own, data, summary, ("control_sft",))
        return control
    except (RunFailed, BadRequest, torch.OutOfMemoryError) as error:
        if arguments.training.world_size > 1:  # the other processes may wait for this one
            raise
        console.warn(f"The control broke off, so there is nothing to compare with: {error}")
        action = "went on without the control"
        summary.content.problems.append({"step": None, "kind": CONTROL_FAILED, "action": action})
        return None


def _measure_finished(
    console: Console, arguments: KavaArguments, models: Models, data: Data, trainer: KavaTrainer, summary: RunSummary
) -> str | None:
    """Measure the finished student; why the alignment counts as collapsed, if it does."""
    if data.evaluation is None:
        return None
    console.stage("Evaluation")
    metrics = trainer.evaluate()
    summary.add_final(metrics)
    own = Models(models.teacher, trainer.whole_student(), models.tokenizer)
    _evaluate(console, arguments, own, data, summary, ("student_after",))
    tell_alignment(console, metrics, trainer.collapse)
    return trainer.collapse
