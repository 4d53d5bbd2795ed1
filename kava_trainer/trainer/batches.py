"""How an optimizer step gets its examples: packed rows where both models can read them, else padded micro-batches."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from ..config.arguments import KavaTrainingArguments
from ..data.collators import DistillationCollator, JoiningCollator, completed
from ..data.formats import ASKED, IGNORED, SAMPLED
from ..data.packing import as_many_rows, pack_step, spread
from ..data.streaming import ExampleStream, stream_loader
from ..data.token_alignment.ranges import readers
from ..distillation.token_alignment.states import is_compared
from ..models.packed_attention import disable_packing, enable_packing, packing_problem
from ..utils.distributed import largest_over_ranks
from ..utils.errors import RunFailed
from ..utils.signals import spare_worker
from .incidents import Incidents

_FOLLOWED = ("answer_index", "next_index")
"""Positions of a batch that a token of an answer follows, or any token of their example."""

_BROKEN = 2**40
"""Stands for a stream that breaks off, beside the number of rows that one has left out."""


class StepBatches(TrainerCallback):
    """Gathers, packs and counts the examples of an optimizer step, and knows where in a stream this rank is.

    With packing, Trainer still counts micro-batches of `per_device_train_batch_size` examples, so epochs, resuming
    and the effective batch are what the arguments say. All examples of a step are then dealt out anew, in rows of
    `max_tokens_per_batch` tokens.

    Args:
        args: of the run.
        incidents: advises where a stream breaks.
    """

    def __init__(self, args: KavaTrainingArguments, incidents: Incidents) -> None:
        self._args, self._incidents = args, incidents
        self.packs = False
        """Whether rows are packed."""
        self.stream: ExampleStream | None = None
        """The training examples, where they are a stream."""
        self.mix: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None
        """Puts the student's own answers in the place of some examples of a step's micro-batches, see `Rollouts`."""
        self.teachers = 1
        """How many teachers read each example."""
        self._refused = 0
        self._told: dict[str, Any] | None = None

    def choose_packing(self, models: dict[str, PreTrainedModel], collator: Any) -> str | None:
        """Turn packing on where it is wanted and every model keeps packed examples apart.

        Args:
            models: by role; each is tried out.
            collator: of the trainer; only KAVA's own joins examples.

        Returns:
            Why there is none although it is wanted, else None.
        """
        self.packs = False
        if self._args.max_tokens_per_batch == 0:
            return None
        if type(collator) is not DistillationCollator:
            return "the data collator is not KAVA's"
        if self._args.torch_compile:
            return "torch_compile would compile anew for the lengths of every row"
        for role, model in models.items():
            enable_packing(model)
            if problem := packing_problem(model):
                for tried in models.values():
                    disable_packing(tried)
                return f"the {role}, a {type(model).__name__}, cannot read packed examples ({problem})"
        self.packs = True
        return None

    def open(self, stream: ExampleStream, collator: Any, batch_size: int) -> DataLoader[Any]:
        """A loader of a stream's examples, which itself goes on where it stood."""
        self.stream, self._args.ignore_data_skip = stream, True
        return with_spared_workers(stream_loader(stream, collator, self._args, batch_size))

    def collator(self, padding: Any) -> Any:
        """What collates training examples: the trainer's own, or for packing one that only joins them."""
        if type(padding) is not DistillationCollator:
            return padding
        return JoiningCollator(padding.read_states) if self.packs else padding.for_training()

    def gather(
        self, batches: Iterator[Any], count: int, batch_size: int, row_limit: int | None, sharded: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], torch.Tensor]:
        """Fetch the micro-batches of one optimizer step.

        Args:
            batches: of the loader.
            count: how many of them make a step.
            batch_size: examples of each.
            row_limit: the most tokens of a row that fit into the memory; None where all did.
            sharded: whether the ranks gather weights together in each forward pass.

        Returns:
            The micro-batches as Trainer carries them, all rows of the step, and this rank's real tokens, answer tokens,
            positions, examples, and tokens that follow another of their example [5]; where the student writes answers,
            also the three that `LossTerms.loss` wants then [8]; where the teacher reads other tokens the one that it
            wants then [6]. With packing each micro-batch has its rows under `rows`.
        """
        found = list(islice(batches, count))
        if self.stream is not None:
            self._note_places(self.stream, found)
        if not found:
            return [], [], torch.zeros(5, dtype=torch.int64)
        is_joined = "lengths" in found[0]  # else a loader or a collator of the user's own may have made them
        found = found if is_joined else [dict(completed(batch)) for batch in found]
        if self.mix is not None:
            found = self.mix(found)
        if not self.packs or not is_joined:
            return found, found, torch.stack(_count_padded(found, self.teachers))
        rows = pack_step(found, self._row_budget(found, batch_size, row_limit))
        if sharded:
            rows = as_many_rows(rows, largest_over_ranks(len(rows)))
        dealt = [_micro_batch(share, rows[0]) for share in spread(rows, len(found))]
        return dealt, rows, torch.tensor([*_count_packed(found, rows), *_count_origins(rows, self.teachers)])

    def _note_places(self, stream: ExampleStream, batches: list[dict[str, Any]]) -> None:
        """Keep count of where in the stream this rank is, and of the rows it left out.

        Raises:
            RunFailed: on all ranks if one cannot read on.
        """
        problem = next((batch["problem"] for batch in batches if "problem" in batch), None)
        reasons = [reason for batch in batches for reason in batch.pop("refused", ())]
        self._refused += len(reasons)
        most = largest_over_ranks(self._refused if problem is None else _BROKEN)
        if most == _BROKEN:
            told = problem or "Another process could not read on in its data."
            raise RunFailed(
                f"{told} If a file is broken, repair it without changing its size. {self._incidents.advice()}"
            )
        if most:
            self._tell_refused(most, reasons[0] if reasons else "another process read it")
        for batch in batches:
            stream.note(batch.pop("place"))

    def _tell_refused(self, count: int, reason: str) -> None:
        """Warn of the first row that was left out, and keep how many there are among the problems of the run."""
        if self._told is None:
            self._incidents.console.warn(f"A row of the stream cannot be used and is left out: {reason}.")
            self._incidents.note("data", "")
            self._told = self._incidents.problems[-1]
        process = " in one process" if self._args.world_size > 1 else ""
        self._told["action"] = f"left out rows of the stream that cannot be used, {count} times so far{process}"

    def _row_budget(self, batches: list[dict[str, Any]], batch_size: int, row_limit: int | None) -> int:
        """Tokens of one row; memory that ran out lowers it."""
        if self._args.max_tokens_per_batch is None:
            budget = batch_size * max(length for batch in batches for length in batch["lengths"])
        else:
            budget = self._args.max_tokens_per_batch * batch_size // self._args.per_device_train_batch_size
        return min(budget, row_limit or budget)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin with the first example of a stream, which an earlier training may have moved."""
        if self.stream is not None:
            self.stream.rewind()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Of a stream Trainer knows no epoch, and begins to count one where the run was resumed; put that right."""
        if self.stream is not None:
            state.epoch = state.global_step / state.max_steps

    def state_dict(self) -> dict[str, Any]:
        """Where in a stream this rank is, for a checkpoint."""
        return {"stream": None if self.stream is None else self.stream.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in a stream from where a checkpoint was."""
        if self.stream is not None:
            self.stream.restore(state["stream"])


def with_spared_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, with workers that no signal to the process group ends before the trainer has saved."""
    if loader.num_workers > 0:
        loader.worker_init_fn = partial(spare_worker, loader.worker_init_fn)
    return loader


def _micro_batch(rows: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    """Rows as Trainer carries them; `like` is any row, for the kind of an empty micro-batch's tensors."""
    nothing = like["input_ids"][:, :0]
    tokens = torch.cat([nothing, *(row["input_ids"] for row in rows)], dim=1)
    return {"rows": rows, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _count_packed(batches: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[int]:
    """The counts of `gather`, without asking the device."""
    lengths = [length for batch in batches for length in batch["lengths"]]
    answers = sum(sum(batch["answers"]) for batch in batches)
    following = sum(len(row["next_index"]) for row in rows)
    return [sum(lengths), answers, sum(lengths), len(lengths), following]


def _count_padded(batches: list[dict[str, Any]], teachers: int) -> list[torch.Tensor]:
    """The counts of `gather`."""
    tokens = sum(batch["attention_mask"].sum() for batch in batches)
    answers = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    sizes = [sum(own) for own in zip(*(_sizes(batch) for batch in batches), strict=True)]
    return [tokens, answers, *torch.tensor([*sizes, *_count_origins(batches, teachers)], device=tokens.device)]


def _count_origins(rows: list[dict[str, Any]], teachers: int) -> list[int]:
    """Where the student wrote some answers: tokens whose states are compared, and answer and following tokens that it
    did not write. Where a teacher reads other tokens: those whose states are compared."""
    if readers(rows[0]):
        return [sum(int(is_compared(row, row["attention_mask"].bool(), teachers).sum()) for row in rows)]
    if "origins" not in rows[0]:
        return []
    compared = sum(int((row["attention_mask"].bool() & (row["origins"] != ASKED)).sum()) for row in rows)
    written = ([row["origins"].flatten()[row[name] + 1] != SAMPLED for row in rows] for name in _FOLLOWED)
    return [compared, *(sum(int(own.sum()) for own in part) for part in written)]


def _sizes(batch: dict[str, Any]) -> tuple[int, int, int]:
    return batch["input_ids"].numel(), len(batch["input_ids"]), len(batch["next_index"])


def without_repeated(inputs: dict[str, torch.Tensor], args: KavaTrainingArguments, state: Any) -> dict[str, Any]:
    """Take the examples of an evaluation out of every mean that accelerate repeats to give all ranks equally many.

    Args:
        inputs: a batch of `collators`.
        args: of the run.
        state: accelerate's `GradientState`, which knows how many examples the last batch of all ranks has.
    """
    rows = len(inputs["input_ids"])
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    first = args.process_index * args.eval_batch_size
    repeated = torch.arange(first, first + rows, device=inputs["input_ids"].device) >= state.remainder
    counted = inputs.get("counted", inputs["attention_mask"]).bool() & ~repeated.unsqueeze(1)
    ignored = ~counted.flatten()[inputs["answer_index"]]
    return {
        **inputs,
        "counted": counted,
        "labels": inputs["labels"].masked_fill(~counted, IGNORED),
        "next_tokens": inputs["next_tokens"].masked_fill(ignored, IGNORED),
    }
