"""All checks that can be made before a run without training: what is there, what fits, what to change."""

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
    check_start,
    check_student_model,
    check_teacher_model,
    check_tokenizers,
    check_trainer,
)


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
    checkup.check("Packages", lambda: check_packages(checkup))
    checkup.check("Device", lambda: check_device(checkup, arguments))
    if quantizes(arguments.model):
        checkup.check("Quantisation", lambda: check_quantization(checkup, arguments))
    checkup.check("Processes", lambda: check_parallelism(checkup, arguments))
    checkup.check("Trackers", lambda: check_trackers(checkup, arguments))
    if training.push_to_hub:
        checkup.check("Hub", lambda: check_hub(checkup, arguments))
    tokenizer = checkup.check("Tokenizers", lambda: check_tokenizers(checkup, arguments))
    teacher = checkup.check("Teacher", lambda: check_teacher_model(checkup, arguments))
    student = checkup.check(
        "Student", lambda: check_student_model(checkup, arguments, teacher), needs=teacher is not None
    )
    both = teacher is not None and student is not None
    known = tokenizer is not None
    examples = checkup.check("Data", lambda: check_data(checkup, arguments, tokenizer), needs=known)
    if arguments.model.teacher_model_name_or_path == QUICKSTART and teacher is not None and examples is not None:
        checkup.check("Teacher", lambda: check_embedded_teacher(checkup, arguments, tokenizer, examples))
    pair = checkup.check(
        "Alignment", lambda: check_fit(checkup, arguments, teacher, student, tokenizer), needs=both and known
    )
    ready = pair is not None and examples is not None
    if training.calibrates:
        checkup.check("Start", lambda: check_start(checkup, arguments, pair, examples), needs=ready)
    trainer = checkup.check("Trainer", lambda: check_trainer(checkup, arguments, tokenizer, examples), needs=known)
    parts = checkup.check("Memory", lambda: check_memory(checkup, arguments), needs=both)
    checkup.check("Disk", lambda: check_disk(checkup, arguments, parts))
    if training.teacher_cache_dir is not None:
        checkup.check(
            "Teacher cache",
            lambda: check_cache(checkup, arguments, pair, examples, trainer),
            needs=ready and trainer is not None,
        )
    checkup.check("Output", lambda: check_output(checkup, arguments, pair, examples, tokenizer), needs=ready)
