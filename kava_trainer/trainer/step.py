"""Carrying out the rows of an optimizer step, and what becomes of it where memory or numbers run out."""

import sys
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate.utils import release_memory
from torch import nn

from ..config.optimizer_names import optimizer_name
from ..data.packing import halve
from ..distillation.token_means import TokenMeans
from ..utils.distributed import any_rank, is_sharded, largest_over_ranks, own_part, whole
from ..utils.errors import RunFailed
from .nonfinite import NonfiniteSteps, skip_if
from .saving import SavingTrainer

Row = dict[str, Any]
"""What one forward and backward pass reads: a packed row or a padded micro-batch of `collating`."""


def _positions(rows: list[Row]) -> int:
    """Tokens, padding included, of the largest row."""
    return max((row["input_ids"].numel() for row in rows), default=0)


def split_rows(rows: list[Row], limit: int | None) -> list[Row]:
    """Rows of at most `limit` positions each, but for single examples that are longer."""
    done, waiting = [], list(reversed(rows))
    while waiting:
        row = waiting.pop()
        too_long = limit is not None and row["input_ids"].numel() > limit
        halves = halve(row) if too_long and "answer_index" in row else None
        if halves is None:
            done.append(row)
        else:
            waiting += reversed(halves)
    return done


class FittingTrainer(SavingTrainer):
    """The part of `KavaTrainer` that does the rows of a step.

    Out of memory: the step is done again from its beginning with rows of half the size, on all ranks, and so are all
    later ones. The effective batch and the token means stay what they were. While there are rows larger than any that
    went well before, the ranks agree on the memory before they exchange gradients; without that a rank that
    runs out of it would leave the others waiting. Sharded weights are exchanged in every pass; there the run ends.

    Not a finite number: where the loss or the gradient of any rank is none, no rank changes its weights.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train_means = TokenMeans()
        self.nonfinite = NonfiniteSteps(self.args.device)
        self.row_limit: int | None = None
        """The most tokens of a forward pass that fit into the memory; None while all did."""
        self._largest_fitting = 0
        self._done: list[Row] = []

    def forget(self) -> None:
        """Begin a training without what an earlier one left, such as the means of its last, unfinished steps."""
        self.train_means = TokenMeans()
        self.nonfinite = NonfiniteSteps(self.args.device)

    def begin_step(self, rows: list[Row]) -> None:
        """Prepare for an optimizer step of these rows on this rank."""
        self._done = []
        self._returned = self._counted = torch.zeros((), device=self.args.device)
        self._means_before = self.train_means.state()
        self._short_of_memory = False
        exchanges_alone = self.args.world_size > 1 and not is_sharded(self.model)
        self._careful = exchanges_alone and any_rank(_positions(rows) > self._largest_fitting)

    def run_rows(self, model: nn.Module, rows: list[Row], num_items: torch.Tensor | None) -> torch.Tensor:
        """Forward and backward passes of the rows of one micro-batch; their loss, 0 where it is no finite number.

        Args:
            model: the wrapped student and projectors.
            rows: of `begin_step`, some of them.
            num_items: see `compute_loss`.

        Raises:
            RunFailed: if memory runs out with a single example.
        """
        rows, last = split_rows(rows, self.row_limit), self.accelerator.sync_gradients
        self._done += rows
        loss = None if self._short_of_memory else self._pass(model, rows, num_items, last and not self._careful)
        self._short_of_memory = loss is None
        if self.args.world_size == 1 or not self._careful:
            while loss is None:
                loss = self._again(model, num_items)
        elif last:
            while any_rank(loss is None):
                loss = self._again(model, num_items)
            self._exchange_gradients(model)
        if last and getattr(self.optimizer, "state", None):  # the first step made these, and they take memory too
            self._largest_fitting = max(self._largest_fitting, _positions(self._done))
        loss = torch.zeros_like(self._returned) if loss is None else loss
        self._returned = self._returned + loss
        finite = torch.where(loss.isfinite(), loss, 0)
        self._counted = self._counted + finite
        return finite

    def _pass(self, model: nn.Module, rows: list[Row], num_items: Any, exchange: bool) -> torch.Tensor | None:
        """The loss of rows with its gradients added up; None where memory ran out.

        Args:
            exchange: whether the ranks exchange gradients with the last row, which Trainer lets through.
        """
        total = torch.zeros((), device=self.args.device)
        try:
            for left, row in enumerate(rows, start=1 - len(rows)):
                with nullcontext() if left == 0 and exchange else self.accelerator.no_sync(model):
                    total += super().training_step(model, row, num_items)
        except torch.OutOfMemoryError:
            return None
        return total

    def _again(self, model: nn.Module, num_items: Any) -> torch.Tensor | None:
        """Do all rows of the step so far once more, in rows of half the size; what is still to be returned of the loss.

        Raises:
            RunFailed: if the rows cannot be made smaller, or some ranks wait for this one already.
        """
        if is_sharded(self.model) or (self.args.world_size > 1 and not self._careful):
            raise self._out_of_memory("while the processes exchanged weights or gradients")
        size = -largest_over_ranks(-_positions(self._done) if self._short_of_memory else -sys.maxsize)
        self.row_limit = size // 2
        rows = split_rows(self._done, self.row_limit)
        if any_rank(self._short_of_memory and len(rows) == len(self._done)):
            raise self._out_of_memory("with a single example in a forward pass")
        told = f"did the step again with at most {self.row_limit} tokens in a forward pass, which stay the most"
        self.console.warn(f"Out of memory in step {self.state.global_step + 1} with {size}; {told}.")
        self.note_problem("oom", told, self.state.global_step + 1)
        model.zero_grad()
        self.train_means.restore(self._means_before, self.args.device)
        release_memory()
        self._done = rows
        exchange = self.args.world_size == 1 and self.accelerator.sync_gradients
        loss = self._pass(model, rows, num_items, exchange)
        self._short_of_memory = loss is None
        return None if loss is None else loss - self._returned

    def _exchange_gradients(self, model: nn.Module) -> None:
        """Give every rank the mean of the gradients, as data parallelism does in a backward pass."""
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            if any_rank(parameter.grad is not None):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad.div_(self.args.world_size))

    def _out_of_memory(self, when: str) -> RunFailed:
        """The error for memory that does not suffice, with what to lower."""
        longest = _positions(self._done)
        remedies = [
            f"lower max_length below the {longest} tokens of this forward pass",
            "set gradient_checkpointing true" if not self.args.gradient_checkpointing else "",
            *self._less_beside_passes(),
        ]
        if self.args.world_size > 1:
            half = f"{self.args.per_device_train_batch_size // 2 or 1} and gradient_accumulation_steps"
            remedies[0] = f"write per_device_train_batch_size {half} {2 * self.args.gradient_accumulation_steps}"
        return RunFailed(
            f"Out of memory in step {self.state.global_step + 1} {when}{self._memory_in_use()}. Do one of these: "
            f"{'; '.join(filter(None, remedies))}. {self.advice()}"
        )

    def _less_beside_passes(self) -> list[str]:
        """What makes the memory smaller that weights and optimizer take whatever is read."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = sum(2 * own_part(weight).numel() * (weight.element_size() - 1) for weight in trained)
        name = "adamw_torch_8bit" if is_sharded(self.model) else "adamw_bnb_8bit"
        small = f"write optim {name}, which saves {states / 1e9:.2f} GB of optimizer states"
        return [
            "" if "8bit" in optimizer_name(self.args.optim) else small,
            "write teacher_quantization 4bit, or name a teacher_cache_dir, which frees the teacher's memory",
        ]

    def out_of_memory_between_passes(self) -> RunFailed:
        """The error for memory that ran out in the optimizer's step, or before the first pass."""
        when = f"in the optimizer's step {self.state.global_step + 1}" if self._done else "before the first step"
        return RunFailed(
            f"Out of memory {when}{self._memory_in_use()}. Do one of these: "
            f"{'; '.join(filter(None, self._less_beside_passes()))}. {self.advice()}"
        )

    def _memory_in_use(self) -> str:
        if self.args.device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info(self.args.device)
        return f" ({(total - free) / 1e9:.2f} of {total / 1e9:.2f} GB in use)"

    def before_optimizer_step(self, grad_norm: torch.Tensor | float) -> None:
        """Skip the optimizer step on all ranks where loss or gradient is no finite number on any.

        Raises:
            RunFailed: after `max_nonfinite_steps` of them in a row.
        """
        finite = torch.stack(
            [
                torch.as_tensor(whole(torch.as_tensor(grad_norm)), device=self.args.device).isfinite(),
                self._returned.isfinite(),
            ]
        )
        flags = torch.stack([~finite.all(), ~finite[1]])
        if self.args.world_size > 1:
            numbers = flags.int()
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            flags = numbers.bool()
        # A lost step does not count with its other micro-batches or on other ranks either.
        self._tr_loss -= torch.where(flags[1], self._counted, 0)
        if self.accelerator.scaler is None:
            skip_if(cast(Any, self.optimizer).optimizer, flags[0], list(self.model.parameters()))
        else:  # it looks for itself, and overflows now and then by design
            flags = flags[[1, 1]]
        self.nonfinite.note(self.state.global_step + 1, flags)
        self.read_nonfinite()

    def read_nonfinite(self, everything: bool = False) -> None:
        """Note the steps that were skipped, see `NonfiniteSteps.read`. Raises as `before_optimizer_step`."""
        for step in self.nonfinite.read(everything):
            self.console.warn(f"Loss or gradient of step {step} is no finite number; its optimizer step was skipped.")
            self.note_problem("nan", "skipped the optimizer step", step)
        if self.nonfinite.in_a_row >= self.args.max_nonfinite_steps:
            raise RunFailed(
                f"Loss or gradient were no finite numbers for {self.nonfinite.in_a_row} steps in a row, up to step "
                f"{self.state.global_step + 1}; the weights are those from before. {self.advice()} Lower the learning "
                "rates, or look at the data around there."
            )

    def progress_state(self) -> dict[str, Any]:
        """Also the means since the last log line, the size of rows that fit, and the steps that were skipped."""
        self.read_nonfinite(everything=True)
        return super().progress_state() | {
            "means": {name: pair.cpu() for name, pair in self.train_means.state().items()},
            "row_limit": self.row_limit,
            "largest_fitting": self._largest_fitting,
            "nonfinite": self.nonfinite.state(),
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Undo `progress_state`."""
        super().restore_progress(state)
        self.row_limit, self._largest_fitting = state["row_limit"], state["largest_fitting"]
        if state["same_ranks"]:
            self.train_means.restore(state["means"], self.args.device)
            self.nonfinite.restore(state["nonfinite"])
