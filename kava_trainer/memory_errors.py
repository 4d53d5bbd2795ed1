"""Memory that runs out, told with the stage it ran out in and what to change for that stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .arguments import KavaArguments
from .errors import RunFailed, reason_of


@contextmanager
def needs_memory(stage: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Within the `with` block memory that runs out ends the run.

    Args:
        stage: when it ran out, as `in the evaluation`.
        remedy: gives what to write instead, as one or more sentences; called only then.

    Raises:
        RunFailed: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"Out of memory {stage} ({reason_of(error)}). {remedy()}") from error


def smaller_models(arguments: KavaArguments) -> str:
    """What to write where teacher and student do not fit together, as a sentence."""
    model = arguments.model
    remedies = [
        "write teacher_quantization 4bit" if model.teacher_quantization != "4bit" else "",
        "write student_dtype bfloat16" if model.student_dtype != "bfloat16" else "",
        "choose smaller models",
        "let nothing else use the device",
    ]
    return f"Do one of these: {'; '.join(filter(None, remedies))}."


def smaller_batches(arguments: KavaArguments) -> str:
    """What to write where an evaluation takes too much, as a sentence."""
    training = arguments.training
    less = " or generation_max_new_tokens" if training.evaluate_generation else ""
    return f"Lower per_device_eval_batch_size (now {training.per_device_eval_batch_size}){less}."


def smaller_rows(arguments: KavaArguments) -> str:
    """What to write where the teacher reads too much at once for its cache, as a sentence."""
    training = arguments.training
    if budget := training.max_tokens_per_batch:
        return f"Lower max_tokens_per_batch (now {budget})."
    return f"Lower per_device_eval_batch_size (now {training.per_device_eval_batch_size})."
