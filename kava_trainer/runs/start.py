"""The stages of a run before its first step."""

from pathlib import Path
from typing import Any, cast

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import run_command
from ..data.retention import describe_retention
from ..data.selection import choose_examples, first_examples, learned_tokens, mean_length
from ..data.streaming import ExampleStream
from ..distillation.calibration import inputs_of_fit
from ..distillation.teachers.several import role_of
from ..evaluation.probe import PROBE_TOKENS
from ..evaluation.teacher_fidelity import TeacherFidelity
from ..reports.cut.table import described
from ..reports.model_card import local_sources
from ..reports.summary import RunSummary
from ..trainer.callbacks.trackers import tracker_problem
from ..trainer.checkpoint import Resumption, resolve_checkpoint, sweep
from ..trainer.final_student import FINAL_STUDENT
from ..trainer.run_state import progress_file, read_progress
from ..utils.console import Console
from ..utils.distributed import from_main_process
from ..utils.environment import describe_environment
from ..utils.errors import BadRequest
from ..utils.files import make_folder
from ..utils.memory import needs_memory
from .advice import (
    FEW_STEPS,
    examples_read,
    fewer_calibration_tokens,
    fewer_held_out,
    smaller_batches,
    smaller_models,
)
from .control import check_place_of_control
from .display import show_configuration, show_environment
from .fill_cache import open_caches
from .identity import check_output_dir, check_resumable, data_digest, earlier_run, name_run, run_identity
from .pair.choice import CUT, earlier_cut
from .pair.models import load_models, own_parameters
from .pair.tokenizers import load_tokenizers, teacher_reading, weights_that_stand
from .setup import (
    Run,
    build_trainer,
    chance_of,
    check_teacher,
    load_data,
    tell_memory,
)
from .tracking import RunTracking


def begin(console: Console, arguments: KavaArguments, argv: list[str]) -> Run:
    """The folders, the checkpoint to go on from, the name, and what the user sees of them."""
    training = arguments.training
    for name in ("output_dir", "final_dir"):
        make_folder(name, getattr(training, name))
    check_places(training)
    check_trackers(training)
    resumption = from_main_process(lambda: _find_checkpoint(arguments))
    training.run_name = from_main_process(lambda: name_run(training, resumption.checkpoint))
    asked = arguments.to_dict()
    environment = {**describe_environment(training.device), "local_sources": local_sources(asked)}
    summary = RunSummary(asked, environment, run_command(argv))
    show_environment(console, training.device)
    show_configuration(console, arguments, resumption)
    run = Run(console, arguments, argv)
    run.resumption, run.summary = resumption, summary
    return run


def check_places(training: KavaTrainingArguments) -> None:
    """Make sure that the places of student and control are free. Raises `BadRequest` if something else is there."""
    check_place_of_control(training)
    student = training.final_folder / FINAL_STUDENT
    if student.exists() and not student.is_dir():
        raise BadRequest(f"{student} is a file, but the student's folder goes there;", "move it or set final_dir.")


def check_trackers(training: KavaTrainingArguments) -> None:
    """Make sure that what `report_to` names is installed and can be set up. Raises `BadRequest` if not."""
    if problem := tracker_problem([name for name in cast(list[str], training.report_to) if name != "none"]):
        raise BadRequest.of(problem)


def _find_checkpoint(arguments: KavaArguments) -> Resumption:
    """Where to go on from, once what a killed run left half done is cleared away."""
    training = arguments.training
    for folder in {Path(training.output_dir), training.final_folder}:
        sweep(folder)
    return resolve_checkpoint(training.resume_from_checkpoint, training.output_dir)


def load_examples(run: Run) -> None:
    """The examples, and what the run is with them; the checkpoint and the output folder must be its own."""
    run.tokenizer = load_tokenizers(run.arguments)
    run.summary.content.arguments |= weights_that_stand(run.arguments)
    run.data = load_data(run.console, run.arguments, run.tokenizer)
    _hold_fewer_out(run)
    run.identity = from_main_process(lambda: _identify(run))


def _hold_fewer_out(run: Run) -> None:
    """Measure on fewer examples where the training is short and nobody has said on how many."""
    held_out, read = run.data.evaluation, _examples_read(run)
    if held_out is None or run.arguments.data.streaming:  # of a stream it may say what is trained on
        return
    probed = len(choose_examples(held_out, PROBE_TOKENS))  # with fewer its figures would be others
    if (number := fewer_held_out(run.arguments, max(read, probed), len(held_out))) is None:
        return
    run.console.print(
        f"The run trains on {read} examples alone, so {number} of the {len(held_out)} held-out ones are measured on. "
        f"For all of them write max_eval_samples {len(held_out)}."
    )
    run.data.evaluation = held_out.select(range(number))
    if run.data.retention is not None:
        run.data.retention = first_examples(run.data.retention, number)  # as max_eval_samples would have it
    run.arguments.data.max_eval_samples = run.summary.content.arguments["max_eval_samples"] = number


def _examples_read(run: Run) -> int:
    examples = 0 if isinstance(run.data.train, ExampleStream) else len(run.data.train)
    return examples_read(run.training, examples, run.training.world_size)


def _spare_time(run: Run) -> None:
    """Do less beside the training where it is short, and nobody has said how much."""
    training, trainer = run.training, run.trainer
    per_step = training.gradient_accumulation_steps * training.per_device_train_batch_size * training.world_size
    trainer.probe.sparing = _examples_read(run) < FEW_STEPS * per_step
    if not training.calibrates or run.checkpoint is not None:
        return
    read = _examples_read(run) * mean_length(run.data.train)
    if (tokens := fewer_calibration_tokens(run.arguments, read, inputs_of_fit(trainer.target))) is not None:
        run.console.print(
            f"The run trains on about {read:.0f} tokens alone, so the projectors are fitted to {tokens}. For more "
            f"write calibration_tokens, such as {training.calibration_tokens}."
        )
        training.calibration_tokens = run.summary.content.arguments["calibration_tokens"] = tokens


def _identify(run: Run) -> dict[str, Any]:
    console, checkpoint = run.console, run.checkpoint
    identity = run_identity(run.arguments, data_digest(run.data.train))
    if checkpoint is not None:
        found = check_resumable(checkpoint, identity)
        if found.harmless:
            console.print(f"Differs from the checkpoint, without effect on the training: {'; '.join(found.harmless)}")
        if found.training:
            console.warn(
                f"Differs from the checkpoint: {'; '.join(found.training)}. From here on the run is not what it would "
                "have been."
            )
    output_dir = run.training.output_dir
    check_output_dir(output_dir, identity, resuming=checkpoint is not None)
    if checkpoint is None and (there := earlier_run(output_dir)) is not None:
        console.warn(
            f"{there}, which this one replaces piece by piece. To keep it, stop now and name another output_dir, or "
            "write resume_from_checkpoint true to go on with it."
        )
    return identity


def load_pair(run: Run) -> None:
    """What training will take of each device; the pair, what the teacher lost by quantisation, and the trainer."""
    console, arguments, tokenizer, data, summary = run.console, run.arguments, run.tokenizer, run.data, run.summary
    summary.content.throughput.estimated_memory_bytes = tell_memory(console, arguments)
    console.stage("Models")
    probed = data.train if data.evaluation is None else data.evaluation
    reading = teacher_reading(arguments, tokenizer)
    fidelity = TeacherFidelity(
        console, arguments, tokenizer, probed, data.evaluation is not None, data.collator, reading
    )
    fidelity.read_unquantised()
    with needs_memory("while the models were loaded", lambda: smaller_models(arguments)):
        earlier = earlier_cut(run.checkpoint, arguments)
        run.models = models = load_models(console, arguments, tokenizer, data.written, earlier)
        if models.cut is not None:
            run.identity[CUT], summary.content.cut = models.cut.to_dict(), described(models.cut)
        summary.content.prompt_kind = data.prompt_kind
        shares = {role_of(number): own for number, own in data.token_alignment.items()}
        summary.content.token_alignment = shares.pop(role_of(0), None)
        summary.content.other_token_alignments = shares or None
        summary.content.student_parameters = own_parameters(models.student)
        summary.content.held_out_examples = None if data.evaluation is None else len(data.evaluation)
        summary.content.held_out_tokens = learned_tokens(data.evaluation)
        summary.content.retention = describe_retention(arguments.data, data.retention, chance_of(models.teacher))
        summary.content.teacher_fidelity = fidelity.compare(models.teacher)
        run.trainer = build_trainer(run)
    _spare_time(run)


def connect(run: Run) -> None:
    """Tie the trainer to the summary and to the trackers."""
    trainer, summary = run.trainer, run.summary
    if run.checkpoint is not None and run.training.should_save:
        _go_on_from(run.checkpoint, summary)
    trainer.identity, trainer.run_time = run.identity, summary.run_time
    summary.content.problems = trainer.problems
    run.tracking = RunTracking(trainer, summary.content)
    trainer.add_callback(run.tracking)


def _go_on_from(checkpoint: Path, summary: RunSummary) -> None:
    """Let the summary tell of the run's earlier sessions too, where the checkpoint knows of them."""
    known = (checkpoint / progress_file(0)).exists()  # one that cannot be resumed is told of when it is loaded
    if known and (earlier := read_progress(checkpoint, 0, 1).get("run_time")) is not None:
        summary.go_on_from(earlier)


def try_teacher(run: Run) -> None:
    """Whether its cache is this teacher's, and whether the teacher knows more than chance."""
    run.caches = open_caches(run)
    with needs_memory("while the teacher was tried out", lambda: smaller_batches(run.arguments)):
        check_teacher(run)
