"""Training examples that are read, mixed and tokenised while a model trains, and where in them a run stands.

Rows are dealt out one by one over ranks and data workers: each of these parts goes through its own share, pass after
pass, and no row falls to two of them. All of them read every row, which is cheap, and tokenise their own. A part counts
the rows it has come past, so that a resumed run reads up to there without tokenising anything, and goes on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from fsspec.asyn import reset_lock
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..config.arguments import KavaTrainingArguments
from ..utils.errors import BadRequest
from ..utils.progress_bar import progress_bar
from .encoding import encoding_fingerprint, no_answers, unusable
from .row_locations import locate_rows
from .rows.remarks import Found, gather
from .stream_sources import Rows
from .text_files import CHECKED_ROWS
from .token_alignment.pair_encoder import NO_READINGS, Readings, counts_column, make_encoder, readings_key
from .token_alignment.ranges import add_counts, is_pair_column


class ExampleStream(IterableDataset[dict[str, Any]]):
    """Tokenised examples without an end: pass after pass over some rows, each in another order.

    Iterated by a data loader, it gives the share of this rank and of the loader's worker, from where `place` says.
    Rows that leave no answer are passed over, and rows that cannot be used are left out.

    Args:
        rows: where the text comes from.
        tokenizer: the tokenizer of both models, or of the student.
        max_length: longest example in tokens.
        shuffle_buffer: rows that are mixed with each other; 0 for the order as it stands.
        seed: of that.
        assistant_turns: which answers of a conversation are learned, `last` or `all`.
        readings: how those teachers read the same whose tokens are others.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        shuffle_buffer: int,
        seed: int,
        assistant_turns: str = "last",
        readings: Readings = NO_READINGS,
    ) -> None:
        self._rows, self._max_length = rows, max_length
        self._encode = make_encoder(
            rows.columns, tokenizer, max_length, assistant_turns, rows.features, readings=readings
        )
        self._shuffle_buffer, self._seed = shuffle_buffer, seed
        self.rank, self.ranks = 0, 1
        digest = encoding_fingerprint(rows.digest, rows.columns, tokenizer, max_length, assistant_turns)
        self.digest = readings_key(readings, digest)
        """What tells these examples from others without reading them, see `stream_sources.files_digest`."""
        self.checked = 0
        """Rows that were looked at by `check`."""
        self.remarks: Found = {}
        """What is to be told of these."""
        self._counted = {number: counts_column(number) for number in readings}
        self.token_alignment: dict[int, list[int]] = {}
        """How many tokens of these are aligned in each of the `ranges.KINDS` with each teacher that reads others."""
        self._refused: list[str] = []
        self.rewind()

    def rewind(self) -> None:
        """Begin with the first example again."""
        self._turn = 0
        self._places: dict[int, tuple[int, int]] = {}

    def state(self) -> dict[str, Any]:
        """Where this rank is: the worker whose batch is next, and of each worker the pass and the rows behind it."""
        return {"turn": self._turn, "places": dict(self._places)}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`; the next loader goes on from there."""
        self._turn, self._places = state["turn"], dict(state["places"])

    def note(self, place: tuple[int, int, int, int]) -> None:
        """Remember that a batch has been used, by the `place` of its last example."""
        turn, workers, number, row = place
        self._turn, self._places[turn] = (turn + 1) % workers, (number, row)

    def one_pass(self, number: int = 0, part: int = 0, parts: int = 1, start: int = 0) -> Iterator[dict[str, Any]]:
        """The examples of one pass over the rows, or of one of `parts` equal shares of it.

        Args:
            number: of the pass, from 0; it decides on the order.
            part: which share, from 0.
            parts: how many shares there are.
            start: rows to pass over; they are read and not tokenised.

        Returns:
            What an `Encoder` gives, and `row`: how many rows have been passed with this one.

        Raises:
            BadRequest: where a file is broken.
        """
        end = 0
        for table in self._rows.tables(self._shuffle_buffer, [self._seed, number]):
            begin, end = end, end + len(table)
            own = [i for i in range((part - begin) % parts, len(table), parts) if begin + i >= start]
            for index, row in zip(own, self._rows.plain(table.take(own)) if own else [], strict=True):
                try:
                    example = self._encode(row)
                except ValueError as error:
                    self._refused.append(str(error))
                    continue
                if example["answered"]:
                    yield {**example, "row": begin + index + 1}

    def check(self) -> None:
        """Look at the first rows, as many as `CHECKED_ROWS`. Raises `BadRequest` if one of them cannot be used."""
        first = (row for table in self._rows.tables(0, [0]) for row in self._rows.plain(table))
        remarks, examples = [], []
        for number, row in enumerate(islice(first, CHECKED_ROWS), start=self._rows.skipped):
            try:
                example = self._encode(row)
            except ValueError as error:
                raise unusable(locate_rows(self._rows.name, [number]), error) from error
            remarks.append(example["remarks"])
            examples.append({name: example[name] for name in self._counted.values()})
        self.token_alignment = {
            number: add_counts(own[name] for own in examples) for number, name in self._counted.items()
        }
        self.checked = len(remarks)
        self.remarks = gather(remarks, self._rows.skipped)

    def count_rows(self, limit: int) -> int:
        """Rows of one pass, read and not tokenised, up to a limit."""
        counted = 0
        with progress_bar(None, "Counting the rows of the stream", "row", True) as bar:
            for table in self._rows.tables(0, [0]):
                counted += len(table)
                bar.update(len(table))
                if counted >= limit:
                    return limit
        return counted

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This rank's and worker's examples with their `place`, and why rows before each were left out, as `refused`.

        Where the data is broken there is a `problem` in place of an example.
        An exception would reach the trainer with the traceback of the worker in place of its message.
        """
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker is not None:
            reset_lock()  # else a forked worker waits for ever for a connection of its parent
        self._refused.clear()  # what was looked at before counts for nothing
        turn = (self._turn + own) % workers
        first, start = self._places.get(turn, (0, 0))
        try:
            for number in count(first):
                place = None
                for example in self.one_pass(number, self.rank * workers + turn, self.ranks * workers, start):
                    place = (turn, workers, number, example["row"])
                    refused, self._refused = self._refused, []
                    yield {**_tokens(example), "place": place, "refused": refused}
                if place is None and start == 0:
                    raise self._nothing_for(workers)
                start = 0
        except BadRequest as error:
            yield {"problem": str(error)}

    def _nothing_for(self, workers: int) -> BadRequest:
        if self.ranks * workers == 1:
            return no_answers(self._max_length)
        return BadRequest(
            f"The data set {self._rows.name!r} has too few examples for {self.ranks} processes with {workers} data "
            "workers each: at least one of them gets none.",
            "Set dataloader_num_workers lower, or use fewer processes.",
        )


def open_stream(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    shuffle_buffer: int,
    seed: int,
    assistant_turns: str = "last",
    readings: Readings = NO_READINGS,
) -> ExampleStream:
    """The stream of some rows. Raises `BadRequest` if no example has an answer, or one of the first cannot be used."""
    stream = ExampleStream(rows, tokenizer, max_length, shuffle_buffer, seed, assistant_turns, readings)
    stream.check()
    if next(stream.one_pass(), None) is None:
        raise no_answers(max_length)
    return stream


def stream_loader(
    stream: ExampleStream,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    args: KavaTrainingArguments,
    batch_size: int,
) -> DataLoader[Any]:
    """A loader of a stream's examples for this rank.

    accelerate's own would have every rank tokenise the examples of all of them. Its batches never end, so ranks never
    have different numbers of them.

    Returns:
        Batches with their `place`, see `ExampleStream.note`, and why rows were left out, as `refused`; where the data
        is broken one with a `problem` alone.
    """
    stream.rank, stream.ranks = args.process_index, args.world_size
    return DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=partial(_placed, collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        generator=torch.Generator(),  # the seed of the workers is no draw from the training's random numbers
    )


def _tokens(example: dict[str, Any]) -> dict[str, Any]:
    """What of an example is learned from."""
    return {name: own for name, own in example.items() if name in ("input_ids", "labels") or is_pair_column(name)}


def _placed(
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """A batch of the collator's with where it ends in the stream and what was left out, or why there is none."""
    last = examples[-1]
    if "problem" in last:
        return last
    refused = [reason for example in examples for reason in example["refused"]]
    batch = collator([_tokens(example) for example in examples])
    return {**batch, "place": last["place"], "refused": refused}
