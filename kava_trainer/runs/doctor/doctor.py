"""All checks that can be made before a run without training: what is there, what fits, what to change."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ...config.arguments import KavaArguments
from ...config.launcher import start_command
from ...config.model_arguments import QUICKSTART
from ...config.parser import parse_arguments
from ...utils.console import Console
from ..pipeline import attended, open_console
from .data import check_data
from .findings import Checkup
from .folders import check_cache, check_disk, check_memory, check_output
from .machine import (
    check_device,
    check_hub,
    check_packages,
    check_parallelism,
    check_quantization,
    check_trackers,
    expected_processes,
    quantizes,
)
from .models import (
    check_embedded_teacher,
    check_fit,
    check_other_teachers,
    check_start,
    check_student_model,
    check_teacher_model,
    check_tokenizers,
    check_trainer,
)
from .on_policy import check_own_answers

T = TypeVar("T")


def examine(argv: list[str]) -> bool:
    """Check what a run with these arguments needs, print what is found and what to change. Nothing is written.

    Only the caches of transformers and datasets are filled, as the run would.

    Args:
        argv: KAVA's own arguments.

    Returns:
        Whether the run could train.
    """
    checkup = Checkup(Console())
    arguments = checkup.check("Arguments", lambda: parse_arguments(argv))
    if arguments is None:
        checkup.check("Packages", lambda: check_packages(checkup))
        checkup.conclude("")
        return False
    checkup = Checkup(open_console(arguments.training))
    with attended():
        checkup.check("Arguments", lambda: checkup.ok("all of them are known and go together."))
        _examine(checkup, arguments)
    checkup.conclude(start_command(argv, expected_processes(arguments.training)))
    return checkup.passed


def _examine(checkup: Checkup, arguments: KavaArguments) -> None:
    training = arguments.training

    def check(name: str, work: Callable[..., T], *needs: object) -> T | None:
        return checkup.check(name, partial(work, checkup, arguments), *needs)

    checkup.check("Packages", lambda: check_packages(checkup))
    check("Device", check_device)
    if quantizes(arguments):
        check("Quantisation", check_quantization)
    check("Processes", check_parallelism)
    check("Trackers", check_trackers)
    if training.push_to_hub:
        check("Hub", check_hub)
    tokenizer = check("Tokenizers", check_tokenizers)
    teacher = check("Teacher", check_teacher_model)
    others = check("Other teachers", check_other_teachers) if training.teachers else []
    student = check("Student", check_student_model, teacher)
    examples = check("Data", check_data, tokenizer)
    if examples is not None:
        check("Own answers", check_own_answers, examples)
    if arguments.model.teacher_model_name_or_path == QUICKSTART and teacher is not None and examples is not None:
        check("Teacher", check_embedded_teacher, tokenizer, examples)
    pair = check("Alignment", check_fit, teacher, others, student, tokenizer)
    if training.calibrates:
        check("Start", check_start, pair, examples)
    trainer = checkup.check("Trainer", lambda known: check_trainer(checkup, arguments, known, examples), tokenizer)
    parts = checkup.check("Memory", lambda *_: check_memory(checkup, arguments), teacher, student)
    checkup.check("Disk", lambda: check_disk(checkup, arguments, parts))
    if training.teacher_cache_dir is not None:
        check("Teacher cache", check_cache, pair, examples, trainer)
    check("Output", check_output, pair, examples, tokenizer)
