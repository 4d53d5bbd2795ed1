"""The teacher cache of a run: opened, filled with the states of its examples, and read from in place of the teacher."""

from collections.abc import Sequence

import datasets
from accelerate.utils import release_memory

from .arguments import KavaArguments
from .capture import hidden_size
from .console import Console
from .memory_errors import needs_memory, smaller_rows
from .preparation import Data, Models
from .signals import WATCH
from .stream_cache import announce, fill_from_stream
from .streaming import ExampleStream
from .teacher_cache import CachedTeacher, TeacherCache, release_weights, teacher_identity
from .trainer import KavaTrainer


def open_cache(arguments: KavaArguments, models: Models, trainer: KavaTrainer) -> TeacherCache | None:
    """The folder of teacher states, where one is asked for and some term reads the teacher.

    Raises:
        BadRequest: if it holds something else.
    """
    training = arguments.training
    if training.teacher_cache_dir is None or trainer.teacher is None:
        return None
    identity = teacher_identity(arguments.model, models.teacher, trainer.accelerator.mixed_precision)
    return TeacherCache(training.teacher_cache_dir, identity, trainer.teacher.layers, training.teacher_cache_dtype)


def _examples_at_hand(data: Data, trainer: KavaTrainer) -> Sequence[list[int]]:
    """Token ids of all examples whose states will be read, but for those of a stream."""
    if not isinstance(data.train, ExampleStream):
        parts = [data.train] if data.evaluation is None else [data.train, data.evaluation]
        return datasets.concatenate_datasets([part.select_columns("input_ids") for part in parts])["input_ids"]
    calibration = trainer.calibration_examples() if trainer.args.calibrates else []
    return [example["input_ids"] for example in [*calibration, *(data.evaluation or [])]]


def write_cache(
    console: Console, arguments: KavaArguments, cache: TeacherCache, models: Models, data: Data, trainer: KavaTrainer
) -> None:
    """Write the states that are missing. A signal ends it once what was read is on disk.

    Raises:
        BadRequest: if the cache is broken, or the disk too small for it.
        Interrupted: on all ranks, if any has got a signal.
        RunFailed: if the teacher runs out of memory.
    """
    with WATCH.deferred(), needs_memory("while the cache was written", lambda: smaller_rows(arguments)):
        _fill(console, arguments, cache, models, data, trainer)


def _fill(
    console: Console, arguments: KavaArguments, cache: TeacherCache, models: Models, data: Data, trainer: KavaTrainer
) -> None:
    console.stage("Teacher cache")
    cache.verify()
    streamed = isinstance(data.train, ExampleStream)
    examples = _examples_at_hand(data, trainer)
    missing = cache.missing(examples)
    tokens = sum(len(examples[i]) for i in missing)
    size = cache.bytes_for(tokens, hidden_size(models.teacher))
    layers = ", ".join(map(str, cache.layers))
    which = "examples beside the stream" if streamed else "examples"
    console.print(
        f"{len(missing)} of {len(examples)} {which} are to be written to {cache.folder}: {tokens} tokens, layers "
        f"{layers}, {cache.dtype}, {size / 1e6:.1f} MB"
    )
    training = arguments.training
    budget = training.max_tokens_per_batch or training.per_device_eval_batch_size * arguments.data.max_length
    if missing:
        cache.check_space(size)
        cache.build(models.teacher, examples, missing, budget, trainer.accelerator.autocast)
    if streamed:
        announce(console, cache, data.train, training, hidden_size(models.teacher))
        written = fill_from_stream(cache, models.teacher, data.train, training, budget, trainer.accelerator.autocast)
        console.print(f"{written} examples of the stream were missing and have been written.")


def read_from_cache(
    console: Console, arguments: KavaArguments, cache: TeacherCache, models: Models, trainer: KavaTrainer
) -> None:
    """Let the trainer read the teacher's states from a cache that is filled, and free the teacher's weights."""
    trainer.read_cache(CachedTeacher(models.teacher, cache.read))
    release_weights(models.teacher, keep_head=arguments.training.kd_weight > 0)
    release_memory()
    console.print("The teacher's states come from there from now on; its weights are freed.")
