"""The teacher cache of a run: opened, filled with the states of its examples, and read from in place of the teacher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, cast

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from transformers import PreTrainedModel

from ..config.alignment.teachers import cache_folders, other_teachers
from ..config.arguments import KavaTrainingArguments
from ..data.streaming import ExampleStream
from ..data.token_alignment.ranges import of_teacher
from ..distillation.teacher_cache import CachedTeacher, TeacherCache, release_weights, teacher_identity
from ..distillation.teachers.several import SeveralTeachers, each_teacher, role_of, teacher_weights
from ..models.attention.capture import hidden_layers
from ..models.layers import state_width
from ..models.teacher import OnlineTeacher
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console, size_text
from ..utils.distributed import any_rank
from ..utils.memory import needs_memory
from ..utils.signals import WATCH
from .advice import smaller_rows
from .setup import Data, Run


def open_caches(run: Run) -> dict[int, TeacherCache]:
    """The folders of teacher states by the number of the teacher, where they are asked for and some term reads it.

    Raises:
        BadRequest: if one holds something else, or the layers' states differ in width.
    """
    training, trainer = run.training, run.trainer
    if training.teacher_cache_dir is None or trainer.teacher is None:
        return {}
    named, sources = [run.arguments.model, *other_teachers(run.arguments)], each_teacher(trainer.teacher)
    caches = {}
    for number, folder in cache_folders(training).items():
        model, layers = run.models.teachers[number], hidden_layers(cast(OnlineTeacher, sources[number]).layers)
        identity = teacher_identity(named[number], model, trainer.accelerator.mixed_precision)
        state_width(model, layers)
        caches[number] = TeacherCache(folder, identity, layers, training.teacher_cache_dtype)
    return caches


def examples_at_hand(data: Data, trainer: KavaTrainer, number: int = 0) -> Sequence[list[int]]:
    """Token ids, as a teacher reads them, of all examples whose states will be read, but for those of a stream."""
    if not isinstance(data.train, ExampleStream):
        parts = [data.train] if data.evaluation is None else [data.train, data.evaluation]
        own = f"{of_teacher(number)}input_ids"
        name = own if own in data.train.column_names else "input_ids"
        return datasets.concatenate_datasets([part.select_columns(name) for part in parts])[name]
    calibration = trainer.calibration_examples() if trainer.args.calibrates else []
    return list(_tokens(iter([*calibration, *(data.evaluation or [])]), number))


def write_caches(run: Run, caches: Mapping[int, TeacherCache]) -> None:
    """Write the states that are missing. A signal ends it once what was read is on disk.

    Raises:
        BadRequest: if a cache is broken, or the disk too small for it.
        Interrupted: on all ranks, if any has got a signal.
        RunFailed: if a teacher runs out of memory.
    """
    with WATCH.deferred(), needs_memory("while the cache was written", lambda: smaller_rows(run.arguments)):
        for number, cache in caches.items():
            _fill(run, cache, number)


def _fill(run: Run, cache: TeacherCache, number: int) -> None:
    console, training, teacher, stream = run.console, run.training, run.models.teachers[number], run.data.train
    console.stage("Teacher cache")
    cache.verify()
    examples = examples_at_hand(run.data, run.trainer, number)
    missing = cache.missing(examples)
    tokens = sum(len(examples[i]) for i in missing)
    size = cache.bytes_for(tokens, state_width(teacher, cache.layers))
    layers = ", ".join(map(str, cache.layers))
    which = "examples beside the stream" if isinstance(stream, ExampleStream) else "examples"
    console.print(
        f"{len(missing)} of {len(examples)} {which} are to be written to {cache.folder}: {tokens} tokens, layers "
        f"{layers}, {cache.dtype}, {size / 1e6:.1f} MB"
    )
    budget = training.max_tokens_per_batch or training.per_device_eval_batch_size * run.arguments.data.max_length
    autocast = run.trainer.accelerator.autocast
    if missing:
        cache.check_space(size)
        cache.build(teacher, examples, missing, budget, autocast)
    if isinstance(stream, ExampleStream):
        announce(console, cache, stream, training, state_width(teacher, cache.layers), number)
        written = fill_from_stream(cache, teacher, stream, training, budget, autocast, number)
        console.print(f"{written} examples of the stream were missing and have been written.")


def read_from_caches(run: Run, caches: Mapping[int, TeacherCache]) -> None:
    """Let the trainer read the teachers' states from caches that are filled, and free the weights of these teachers.

    It keeps them where the student writes answers, which they have to read.
    """
    models, trainer = run.models.teachers, run.trainer
    sources = [
        CachedTeacher(models[number], caches[number].read) if number in caches else own
        for number, own in enumerate(each_teacher(trainer.teacher))
    ]
    shares = teacher_weights(trainer.teacher)
    trainer.read_cache(sources[0] if len(sources) == 1 else SeveralTeachers(sources, shares))
    if run.training.samples:
        run.console.print("The teacher's states on the data come from there from now on; it reads the answers alone.")
        return
    for number in caches:
        release_weights(models[number], keep_head=run.training.kd_weight > 0)
    release_memory()
    told = "The teacher's states come from there from now on; its weights are freed."
    if len(sources) > 1:
        told = (
            f"The states of {' and '.join(map(role_of, caches))} come from there from now on; their weights are freed."
        )
    run.console.print(told)


SAMPLE = 256
"""Examples whose mean length stands for that of all in the announcement."""


def _shares(stream: ExampleStream, args: KavaTrainingArguments) -> list[tuple[Iterator[dict[str, Any]], int]]:
    """The first pass of each data worker of this rank, and how many examples of it the training will take."""
    workers = max(args.dataloader_num_workers, 1)
    batches = args.max_steps * args.gradient_accumulation_steps
    state = PartialState()
    shares = []
    for turn in range(workers):
        part = state.process_index * workers + turn
        own = batches // workers + (turn < batches % workers)
        examples = stream.one_pass(0, part, state.num_processes * workers)
        shares.append((examples, own * args.per_device_train_batch_size))
    return shares


def _tokens(examples: Iterator[dict[str, Any]], number: int) -> Iterator[list[int]]:
    name = f"{of_teacher(number)}input_ids"
    return (example.get(name, example["input_ids"]) for example in examples)


def announce(
    console: Console,
    cache: TeacherCache,
    stream: ExampleStream,
    args: KavaTrainingArguments,
    width: int,
    number: int = 0,
) -> int:
    """Say what the examples of a run will take on the disk, from the mean length of the first ones; that in bytes.

    The arguments say how many of the stream are read, the width is that of the states of the teacher of this number.

    Raises:
        BadRequest: if the disk is too small for what the cache does not hold yet.
    """
    batches = args.max_steps * args.gradient_accumulation_steps * PartialState().num_processes
    examples = stream.count_rows(batches * args.per_device_train_batch_size)
    lengths = [len(ids) for ids in islice(_tokens(stream.one_pass(), number), SAMPLE)]
    tokens = round(examples * sum(lengths) / len(lengths))
    size = cache.bytes_for(tokens, width)
    console.print(
        f"Up to {examples} examples of the stream will be read from {cache.folder}: about {tokens} tokens, layers "
        f"{', '.join(map(str, cache.layers))}, {cache.dtype}, about {size_text(size)} (by the first {len(lengths)} "
        "examples). Those that are missing are written now."
    )
    there = sum(path.stat().st_size for path in cache.shards.paths)
    cache.check_space(max(size - there, 0))
    return size


def fill_from_stream(
    cache: TeacherCache,
    model: PreTrainedModel,
    stream: ExampleStream,
    args: KavaTrainingArguments,
    budget: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    number: int = 0,
) -> int:
    """Let the teacher read what the training will read and the cache lacks, each rank its own share.

    Where any share is used up before the training ends, later passes mix the examples of all of them anew. Then all
    examples are written, and nothing is missing in any pass.

    Args:
        cache: where the states go.
        model: the teacher.
        stream: of the training examples.
        args: say how many of them are read.
        budget: tokens of one forward pass.
        autocast: makes the context that the teacher runs in.
        number: of the teacher.

    Returns:
        How many examples the ranks have written.

    Raises:
        Interrupted: on all ranks, if any has got a signal; what was read until then stays.
    """
    shares, ended = _shares(stream, args), False

    def wanted() -> Iterator[list[int]]:
        nonlocal ended
        for examples, most in shares:
            taken = 0
            for ids in _tokens(islice(examples, most), number):
                taken += 1
                yield ids
            ended |= taken < most

    written = cache.extend(model, wanted(), budget, autocast)
    if any_rank(ended):
        rest = (ids for examples, _ in shares for ids in _tokens(examples, number))
        written += cache.extend(model, rest, budget, autocast)
    return sum(gather_object([written]))
