"""Filling the teacher cache from a stream: exactly the examples that the run will read, few of them at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from .arguments import KavaTrainingArguments
from .console import Console, size_text
from .ranks import any_rank
from .streaming import ExampleStream
from .teacher_cache import TeacherCache

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


def _tokens(examples: Iterator[dict[str, Any]]) -> Iterator[list[int]]:
    return (example["input_ids"] for example in examples)


def announce(
    console: Console, cache: TeacherCache, stream: ExampleStream, args: KavaTrainingArguments, width: int
) -> int:
    """Say what the examples of a run will take on the disk, from the mean length of the first ones.

    Args:
        console: takes the line.
        cache: where they will go.
        stream: of the training examples.
        args: say how many of them are read.
        width: of the teacher's states.

    Returns:
        The size in bytes.

    Raises:
        BadRequest: if the disk is too small for what the cache does not hold yet.
    """
    batches = args.max_steps * args.gradient_accumulation_steps * PartialState().num_processes
    examples = stream.count_rows(batches * args.per_device_train_batch_size)
    lengths = [len(ids) for ids in islice(_tokens(stream.one_pass()), SAMPLE)]
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

    Returns:
        How many examples the ranks have written.

    Raises:
        Interrupted: on all ranks, if any has got a signal; what was read until then stays.
    """
    shares, ended = _shares(stream, args), False

    def wanted() -> Iterator[list[int]]:
        nonlocal ended
        for examples, number in shares:
            taken = 0
            for ids in _tokens(islice(examples, number)):
                taken += 1
                yield ids
            ended |= taken < number

    written = cache.extend(model, wanted(), budget, autocast)
    if any_rank(ended):
        rest = (ids for examples, _ in shares for ids in _tokens(examples))
        written += cache.extend(model, rest, budget, autocast)
    return sum(gather_object([written]))
