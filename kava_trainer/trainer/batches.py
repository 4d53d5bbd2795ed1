"""How an optimizer step gets its examples: packed rows where both models can read them, else padded micro-batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.collators import DistillationCollator, JoiningCollator
from ..data.formats import IGNORED
from ..data.packing import as_many_rows, pack_step, spread
from ..data.streaming import ExampleStream, stream_loader
from ..models.packed_attention import disable_packing, enable_packing, packing_problem
from ..utils.distributed import any_rank, is_sharded, largest_over_ranks
from ..utils.errors import RunFailed
from ..utils.memory import peak_memory_bytes
from ..utils.signals import spare_worker
from .step import FittingTrainer, Row
from .throughput import Stopwatch


class SteppingTrainer(FittingTrainer):
    """The part of `KavaTrainer` that gathers, packs and counts the examples of an optimizer step.

    With packing, Trainer still counts micro-batches of `per_device_train_batch_size` examples, so epochs, resuming
    and the effective batch are what the arguments say. All examples of a step are then dealt out anew, in rows of
    `max_tokens_per_batch` tokens.
    """

    _seen: torch.Tensor
    """Real tokens, positions and examples of all ranks."""
    _line_began: float | None
    _began: float | None
    _ended: float | None
    _earlier: dict[str, float]

    packs = False
    """Whether rows are packed."""

    def choose_packing(self, models: dict[str, PreTrainedModel]) -> str | None:
        """Turn packing on where it is wanted and every model keeps packed examples apart.

        Args:
            models: by role; each is tried out.

        Returns:
            Why there is none although it is wanted, else None.
        """
        self.packs = False
        if self.args.max_tokens_per_batch == 0:
            return None
        if type(self.data_collator) is not DistillationCollator:
            return "the data collator is not KAVA's"
        if self.args.torch_compile:
            return "torch_compile would compile anew for the lengths of every row"
        for role, model in models.items():
            enable_packing(model)
            if problem := packing_problem(model):
                for tried in models.values():
                    disable_packing(tried)
                return f"the {role}, a {type(model).__name__}, cannot read packed examples ({problem})"
        self.packs = True
        return None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's loader of the training examples, which pads or, for packing, only joins them."""
        padding: Any = self.data_collator
        collator = JoiningCollator(padding.read_states) if self.packs else padding
        if isinstance(self.train_dataset, ExampleStream):
            self.args.ignore_data_skip = True  # the stream itself goes on where it stood
            loader = stream_loader(self.train_dataset, collator, self.args, self._train_batch_size)
            return _with_spared_workers(loader)
        self.data_collator = collator
        try:
            return _with_spared_workers(super().get_train_dataloader())
        finally:
            self.data_collator = padding

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Trainer's loader, whose workers leave signals to the trainer."""
        return _with_spared_workers(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count real tokens and answer tokens over all ranks.

        Trainer's own would count the labels first, with a gather over the ranks that nothing here needs. With packing
        each micro-batch is a list of rows under `rows`, beside their tokens for Trainer's own counting.
        """
        self._line_began = self._line_began or time.monotonic()
        batches = list(islice(epoch_iterator, num_batches))
        if isinstance(self.train_dataset, ExampleStream):
            self._note_places(batches)
        if not batches:
            return batches, None
        if self.packs:
            rows = pack_step(batches, self._row_budget(batches))
            if is_sharded(self.model):  # in each forward pass the ranks gather weights together
                rows = as_many_rows(rows, largest_over_ranks(len(rows)))
            counts = torch.tensor(_count_packed(batches))
            batches = [_micro_batch(dealt, rows[0]) for dealt in spread(rows, len(batches))]
        else:
            counts, rows = torch.stack(_count_padded(batches)), batches
        self.begin_step(rows)
        counts = self._sum_over_ranks(counts.to(device))
        self._seen = self._seen.to(device) + counts[[0, 2, 3]]
        return batches, counts[:2]

    def _note_places(self, batches: list[dict[str, Any]]) -> None:
        """Keep count of where in the stream this rank is. Raises `RunFailed` on all ranks if one cannot read on."""
        problem = next((batch["problem"] for batch in batches if "problem" in batch), None)
        if any_rank(problem is not None):
            told = problem or "Another process could not read on in its data."
            raise RunFailed(f"{told} If a file is broken, repair it without changing its size. {self.advice()}")
        for batch in batches:
            cast(ExampleStream, self.train_dataset).note(batch.pop("place"))

    def _row_budget(self, batches: list[dict[str, Any]]) -> int:
        """Tokens of one row; memory that ran out lowers it."""
        wanted = self.args.per_device_train_batch_size
        if self.args.max_tokens_per_batch is None:
            budget = self._train_batch_size * max(length for batch in batches for length in batch["lengths"])
        else:
            budget = self.args.max_tokens_per_batch * self._train_batch_size // wanted
        return min(budget, self.row_limit or budget)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; with packing, of each of its rows.

        Args:
            model: the wrapped student and projectors.
            inputs: of `get_batch_samples`.
            num_items_in_batch: real tokens and answer tokens [2] of the whole optimizer step.
        """
        with self.stopwatch.measure("step"):
            return self.run_rows(model, inputs.get("rows", [inputs]), num_items_in_batch)

    def rewind(self) -> None:
        """Begin with the first example, where the data is a stream that an earlier training may have moved."""
        if isinstance(self.train_dataset, ExampleStream):
            self.train_dataset.rewind()

    def progress_state(self) -> dict[str, Any]:
        """Also where in a stream this rank is."""
        stream = self.train_dataset.state() if isinstance(self.train_dataset, ExampleStream) else None
        return super().progress_state() | {"stream": stream, "spent": self.spent()}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Undo `progress_state`."""
        super().restore_progress(state)
        self.add_earlier(state)
        if isinstance(self.train_dataset, ExampleStream):
            self.train_dataset.restore(state["stream"])

    def add_earlier(self, state: dict[str, Any]) -> None:
        """Go on counting time and tokens from a `progress_state`."""
        self._earlier = state.get("spent", {})

    def forget_throughput(self) -> None:
        """Begin to count anew."""
        self._seen = torch.zeros(3, dtype=torch.int64)
        self._began, self._ended, self._earlier = None, None, {}
        self._seen_before_line, self._line_began = 0, None
        self.stopwatch = Stopwatch(self.args.device)

    def line_throughput(self) -> dict[str, float]:
        """What a training log line tells of speed and memory. Read it where the device was waited for already.

        Returns:
            `tokens_per_second`: real tokens of all ranks since the last such line, over the time since then, with
            evaluations and saves in between; `peak_memory_bytes`: of this rank since its start, where it can be told.
        """
        now, tokens = time.monotonic(), int(self._seen[0])
        self.stopwatch.seconds()  # so that events do not pile up
        figures: dict[str, float] = {}
        if self._line_began is not None and now > self._line_began:
            figures["tokens_per_second"] = (tokens - self._seen_before_line) / (now - self._line_began)
        if (peak := peak_memory_bytes(self.args.device)) is not None:
            figures["peak_memory_bytes"] = peak
        self._seen_before_line, self._line_began = tokens, now
        return figures

    def start_clock(self) -> None:
        """Begin to count time and tokens, at the first step."""
        self.forget_throughput()
        self._began = time.monotonic()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The `with` block is one training; what comes after it counts no more."""
        self.forget_throughput()
        try:
            yield
        finally:
            self._ended = time.monotonic()

    def spent(self) -> dict[str, float]:
        """Seconds and counts of the training so far, with those of the sessions that it goes on from."""
        tokens, positions, examples = self._seen.tolist()
        seconds = self.stopwatch.seconds()
        spent = {
            "train_seconds": 0.0 if self._began is None else (self._ended or time.monotonic()) - self._began,
            "teacher_seconds": seconds.get("teacher", 0.0),
            "step_seconds": seconds.get("step", 0.0),
            "tokens": tokens,
            "positions": positions,
            "examples": examples,
        }
        return {name: value + self._earlier.get(name, 0) for name, value in spent.items()}

    def throughput(self) -> dict[str, float | None]:
        """What the last `train()` came to, with the sessions that it resumed; empty before it.

        Returns:
            Real tokens and examples a second of all ranks, evaluations and saves included, the share of padding, and
            the seconds that this rank's teacher and student (forward and backward, with projectors and losses) took.
        """
        spent = self.spent()
        if spent["positions"] == 0:
            return {}
        return {
            "tokens_per_second": spent["tokens"] / spent["train_seconds"],
            "samples_per_second": spent["examples"] / spent["train_seconds"],
            "padding_fraction": 1 - spent["tokens"] / spent["positions"],
            "teacher_seconds": spent["teacher_seconds"],
            "student_seconds": spent["step_seconds"] - spent["teacher_seconds"],
        }

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, reduction="sum")


def _with_spared_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, with workers that no signal to the process group ends before the trainer has saved."""
    if loader.num_workers > 0:
        loader.worker_init_fn = partial(spare_worker, loader.worker_init_fn)
    return loader


def _micro_batch(rows: list[Row], like: Row) -> dict[str, Any]:
    """Rows as Trainer carries them; `like` is any row, for the kind of an empty micro-batch's tensors."""
    nothing = like["input_ids"][:, :0]
    tokens = torch.cat([nothing, *(row["input_ids"] for row in rows)], dim=1)
    return {"rows": rows, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _count_packed(batches: list[dict[str, Any]]) -> list[int]:
    """Real tokens, answer tokens, positions and examples, without asking the device."""
    lengths = [length for batch in batches for length in batch["lengths"]]
    return [sum(lengths), sum(sum(batch["answers"]) for batch in batches), sum(lengths), len(lengths)]


def _count_padded(batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Real tokens, answer tokens, positions and examples."""
    tokens = sum(batch["attention_mask"].sum() for batch in batches)
    answers = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    sizes = (sum(batch["input_ids"].numel() for batch in batches), sum(len(batch["input_ids"]) for batch in batches))
    return [tokens, answers, *torch.tensor(sizes, device=tokens.device)]
