"""What a run's arguments are good for beside training: filling its teacher cache, and measuring teacher and student."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..config.arguments import KavaArguments
from ..config.data_arguments import DataArguments
from ..config.launcher import is_fsdp_asked
from ..config.model_arguments import ModelArguments
from ..config.student_cut import CUT_ARGUMENTS
from ..data.streaming import ExampleStream
from ..models.lora_files import load_adapter
from ..models.sharding.units import shard_to_read
from ..reports.run_reader import find_student, finished_summary
from ..reports.summary import ModelFigures, Summary, finite, write_text
from ..trainer.final_student import FINAL_STUDENT
from ..utils.console import Console
from ..utils.errors import BadRequest, RunFailed, reason_of
from ..utils.files import no_empty_folders
from ..utils.memory import needs_memory
from ..utils.redaction import without_secrets
from .advice import smaller_batches, smaller_models
from .display import show_figures
from .fill_cache import open_caches, write_caches
from .pair.models import load_models
from .pair.tokenizers import load_tokenizers
from .pipeline import attended, measure, open_console
from .setup import Run, build_trainer, check_teacher, load_data, load_held_out

Figures = dict[str, dict[str, float | None]]
"""Figures of `answers.evaluate_model` by the name of what was measured."""

_ASKED = (
    "max_steps", "per_device_eval_batch_size", "evaluate_generation", "generation_max_new_tokens", "use_cpu", "seed",
    "plain_output",
)  # fmt: skip
"""What a measurement takes over of a run's training arguments."""

_WRITTEN = ("teacher", "student", "dataset", "max_eval_samples", "evaluation")
"""What the file of a measurement holds."""

_OF_THE_START = (
    "student_revision", "student_config_name", "student_init", "student_quantization", "use_peft", "merge_adapter",
    *CUT_ARGUMENTS,
)  # fmt: skip
"""What tells how a run's student began; the finished one has it all in itself."""


def fill_cache(arguments: KavaArguments) -> None:
    """Let the teacher read all examples of a run and write its states to `teacher_cache_dir`, as the run itself would.

    Raises:
        BadRequest: if there is nothing to fill, models or data do not fit, or the cache is another teacher's.
        RunFailed: if memory runs out.
        Interrupted: by a signal; what has been written is whole.
    """
    training = arguments.training
    if training.teacher_cache_dir is None:
        raise BadRequest("teacher_cache_dir is missing, so there is no cache to fill;", "write the name of a folder.")
    training.push_to_hub, training.report_to = False, []  # a trainer would make the repository, and a tracker its run
    with attended(), no_empty_folders(training.output_dir):  # which the trainer makes
        run = Run(open_console(training), arguments)
        tokenizer = load_tokenizers(arguments)
        run.data = load_data(run.console, arguments, tokenizer)
        run.console.stage("Models")
        with needs_memory("while the models were loaded", lambda: smaller_models(arguments)):
            run.models = load_models(run.console, arguments, tokenizer, run.data.written)
            run.trainer = build_trainer(run)
        caches = open_caches(run)
        if not caches:
            raise BadRequest(
                "No loss term reads the teacher's states, so there is nothing to cache;", "raise a weight."
            )
        with needs_memory("while the teacher was tried out", lambda: smaller_batches(arguments)):
            check_teacher(run)
        write_caches(run, caches)
        folder = arguments.training.teacher_cache_dir
        run.console.print(f"A run with teacher_cache_dir {folder} finds the teacher's states there.")


class FinishedRun(NamedTuple):
    """What a run has left that its student can be measured by."""

    summary: Summary
    arguments: dict[str, Any]
    """Those that name its models and data, with the finished student as the student."""
    adapter: Path | None
    """The folder of the finished student where it is an adapter alone; the arguments then name what it belongs on."""


def read_finished_run(folder: Path) -> FinishedRun:
    """Read the output folder of a run. Raises `BadRequest` without a summary, or without the student it finished."""
    summary = finished_summary(folder)
    student, given = find_student(folder, summary), summary.arguments
    names = [*(field.name for part in (ModelArguments, DataArguments) for field in fields(part)), *_ASKED]
    arguments = {name: given[name] for name in names if name in given}
    if (student / "adapter_config.json").is_file():
        return FinishedRun(summary, arguments, student)
    kept = [name for name in arguments if name not in _OF_THE_START and not name.startswith("lora_")]
    finished = {name: arguments[name] for name in kept} | {"student_model_name_or_path": str(student)}
    return FinishedRun(summary, finished, None)


def measure_models(arguments: KavaArguments, finished: FinishedRun | None = None) -> Figures:
    """Measure teacher and student on the held-out examples, and print the figures.

    Args:
        arguments: as of a run; its `student` is measured as it is before the training.
        finished: the run whose student is measured; the figures in its summary are printed too.

    Returns:
        The figures of `teacher` and `student`.

    Raises:
        BadRequest: if there are no held-out examples, or models or data do not fit.
        RunFailed: if memory runs out.
    """
    with attended():
        console = open_console(arguments.training)
        tokenizer = load_tokenizers(arguments)
        train, held_out, retention = _examples(console, arguments, tokenizer)
        console.stage("Models")
        with needs_memory("while the models were loaded", lambda: smaller_models(arguments)):
            models = load_models(console, arguments, tokenizer, train)
        if finished is not None and finished.adapter is not None:
            put_adapter_on(finished.adapter, models.student)
        if is_fsdp_asked():
            shard_to_read(models.student, arguments.training.device)
        console.stage("Evaluation")
        measured = measure(console, arguments, models, held_out, ("teacher", "student"), retention)
        evaluation = {name: one.figures for name, one in measured}
        console.stage("Measured")
        show_figures(console, {name: ModelFigures(**figures) for name, figures in evaluation.items()})
        if finished is not None:
            console.stage("In the run's summary")
            show_figures(console, finished.summary.evaluation.measured())
        elif (note := _finished_student(arguments)) is not None:
            console.print(note)
    return evaluation


def _examples(
    console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset | ExampleStream | None, datasets.Dataset, datasets.Dataset | None]:
    """The training examples, where the student is cut out of its teacher by them, the held-out ones, and the text for
    retained language."""
    if arguments.model.is_cut:
        data = load_data(console, arguments, tokenizer)
        if data.evaluation is not None:
            return data.written, data.evaluation, data.retention
    return None, *load_held_out(console, arguments, tokenizer)


def put_adapter_on(adapter: Path, student: Any) -> None:
    """Load a saved adapter into a student. Raises `BadRequest` if that cannot be done."""
    try:
        load_adapter(adapter, student)
    except Exception as error:  # broken files raise many kinds
        raise BadRequest(f"The adapter {adapter} cannot be loaded: {reason_of(error)}") from error


def _finished_student(arguments: KavaArguments) -> str | None:
    """How the finished student is measured, where there is one and it was not."""
    student = arguments.training.final_folder / FINAL_STUDENT
    name = arguments.model.student_model_name_or_path
    if not student.is_dir() or (name is not None and Path(name).resolve() == student.resolve()):
        return None
    return f"That is the student before training. For the finished one add --student_model_name_or_path {student}"


def are_figures(text: str) -> bool:
    """Whether a file holds what `write_figures` writes."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == set(_WRITTEN)


def _student_of(model: ModelArguments) -> str:
    """What the student is called beside its teacher."""
    cut = model.is_cut and not (model.student_model_name_or_path or model.student_config_name)
    return f"cut out of {model.teacher_name}" if cut else model.student_name


def write_figures(path: Path, arguments: KavaArguments, evaluation: Figures, finished: FinishedRun | None) -> None:
    """Write figures as JSON, and of which models on which data they are. Raises `RunFailed` if the disk refuses."""
    model, data = arguments.model, arguments.data
    adapter = finished.adapter if finished is not None else None
    values = (
        model.teacher_model_name_or_path,
        str(adapter) if adapter is not None else _student_of(model),
        data.dataset_name,
        data.max_eval_samples,
        finite(evaluation),
    )
    content = dict(zip(_WRITTEN, values, strict=True))
    text = without_secrets(json.dumps(content, indent=2, ensure_ascii=False)) + "\n"
    if not PartialState().is_main_process:
        return
    try:
        write_text(path, text)
    except OSError as error:
        raise RunFailed(f"The figures could not be written to {path} ({reason_of(error)}).") from error
