"""Carrying out the rows of an optimizer step, and what becomes of it where memory or numbers run out."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config.arguments import KavaTrainingArguments
from ..config.launcher import FSDP_CONFIG, is_fsdp_asked
from ..config.optimizer_names import optimizer_name
from ..data.packing import halve
from ..distillation.token_means import TokenMeans
from ..utils.distributed import any_rank, is_sharded, largest_over_ranks, own_part, whole
from ..utils.errors import RunFailed
from .incidents import Incidents
from .nonfinite import NonfiniteSteps, skip_if
from .optimizers import rate_of

Row = dict[str, Any]
"""What one forward and backward pass reads: a packed row or a padded micro-batch of `collators`."""


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


class StepRunner(TrainerCallback):
    """Does the rows of an optimizer step.

    Out of memory: the step is done again from its beginning with rows of half the size, on all ranks, and so are all
    later ones. The effective batch and the token means stay what they were. While there are rows larger than any that
    went well before, the ranks agree on the memory before they exchange gradients; without that a rank that
    runs out of it would leave the others waiting. Sharded weights are exchanged in every pass; there the run ends.

    Not a finite number: where the loss or the gradient of any rank is none, no rank changes its weights.

    Args:
        args: of the run.
        accelerator: knows when gradients are exchanged.
        incidents: is told what was survived, and advises where nothing helps.
        backward: forward and backward pass of one row by the wrapped model, given the counts of the step; its loss.
    """

    def __init__(
        self,
        args: KavaTrainingArguments,
        accelerator: Accelerator,
        incidents: Incidents,
        backward: Callable[[nn.Module, Row, Any], torch.Tensor],
    ) -> None:
        self._args, self._accelerator, self._incidents, self._backward = args, accelerator, incidents, backward
        self.row_limit: int | None = None
        """The most tokens of a forward pass that fit into the memory; None while all did."""
        self._largest_fitting = 0
        self._done: list[Row] = []
        self._optimizer: Any = None
        self.projector_rate = 0.0
        """Learning rate of the projectors in the last step; 0 where nothing trains them."""
        self.forget()

    def forget(self) -> None:
        """Begin a training without what an earlier one left, such as the means of its last, unfinished steps."""
        self.means = TokenMeans()
        """Of the loss terms since the last log line."""
        self.nonfinite = NonfiniteSteps(self._args.device)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Know the optimizer, whose states take memory from its first step on.

        Raises:
            RunFailed: if the weights should be sharded, and are not.
        """
        if is_fsdp_asked() and not is_sharded(kwargs["model"]):
            what = "FSDP was asked for, but there is no process group to spread the student over; nothing was trained."
            raise RunFailed(f"{what} Start with accelerate launch --config_file {FSDP_CONFIG}.")
        self._optimizer = kwargs["optimizer"]

    def release(self) -> None:
        """Let go of the optimizer."""
        self._optimizer = None

    def begin(self, rows: list[Row], sharded: bool) -> None:
        """Prepare for an optimizer step.

        Args:
            rows: all of this rank's.
            sharded: whether the ranks gather weights together in each forward pass.
        """
        self._done, self._sharded = [], sharded
        self._returned = self._counted = torch.zeros((), device=self._args.device)
        self._means_before = self.means.state()
        self._short_of_memory = False
        exchanges_alone = self._args.world_size > 1 and not sharded
        self._careful = exchanges_alone and any_rank(_positions(rows) > self._largest_fitting)

    def run(self, model: nn.Module, rows: list[Row], num_items: torch.Tensor | None) -> torch.Tensor:
        """Forward and backward passes of the rows of one micro-batch; their loss, 0 where it is no finite number.

        Args:
            model: the wrapped student and projectors.
            rows: of `begin`, some of them.
            num_items: see `compute_loss`.

        Raises:
            RunFailed: if memory runs out with a single example.
        """
        # A limit of an earlier run, in which each rank was for itself, would give the ranks unlike numbers of passes.
        limit, last = None if self._sharded else self.row_limit, self._accelerator.sync_gradients
        rows = split_rows(rows, limit)
        self._done += rows
        loss = None if self._short_of_memory else self._pass(model, rows, num_items, last and not self._careful)
        self._short_of_memory = loss is None
        if self._args.world_size == 1 or not self._careful:
            while loss is None:
                loss = self._again(model, num_items)
        elif last:
            while any_rank(loss is None):
                loss = self._again(model, num_items)
            self._exchange_gradients(model)
        if last and getattr(self._optimizer, "state", None):  # the first step made these, and they take memory too
            self._largest_fitting = max(self._largest_fitting, _positions(self._done))
        loss = torch.zeros_like(self._returned) if loss is None else loss
        self._returned = self._returned + loss
        finite = torch.where(loss.isfinite(), loss, 0)
        self._counted = self._counted + finite
        return self._settled(model, finite) if last else finite

    def _settled(self, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the last micro-batch; where no rank may change its weights, less what the others returned."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = whole(get_total_norm(gradients)).to(self._args.device)
        finite = torch.stack([norm.isfinite(), self._returned.isfinite()])
        flags = torch.stack([~finite.all(), ~finite[1]])
        if self._args.world_size > 1:
            numbers = flags.int()
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            flags = numbers.bool()
        self._flags = flags
        # A lost step does not count with its other micro-batches or on other ranks either.
        return loss - torch.where(flags[1], self._counted, 0)

    def _pass(self, model: nn.Module, rows: list[Row], num_items: Any, exchange: bool) -> torch.Tensor | None:
        """The loss of rows with its gradients added up; None where memory ran out.

        Args:
            exchange: whether the ranks exchange gradients with the last row, which Trainer lets through. Where the
                student is sharded they do so with each, and keep their own parts of the sum.
        """
        total = torch.zeros((), device=self._args.device)
        spread = is_sharded(model)
        if spread:  # gradients that wait for the last pass would be whole ones, on every rank
            cast(FSDPModule, model).set_requires_gradient_sync(True)
        try:
            for left, row in enumerate(rows, start=1 - len(rows)):
                exchanges = spread or (left == 0 and exchange)
                with nullcontext() if exchanges else self._accelerator.no_sync(model):
                    total += self._backward(model, row, num_items)
        except torch.OutOfMemoryError:
            return None
        return total

    def _again(self, model: nn.Module, num_items: Any) -> torch.Tensor | None:
        """Do all rows of the step so far once more, in rows of half the size; what is still to be returned of the loss.

        Raises:
            RunFailed: if the rows cannot be made smaller, or some ranks wait for this one already.
        """
        if self._sharded or (self._args.world_size > 1 and not self._careful):
            raise self._out_of_memory(model, "while the processes exchanged weights or gradients")
        size = -largest_over_ranks(-_positions(self._done) if self._short_of_memory else -sys.maxsize)
        self.row_limit = size // 2
        rows = split_rows(self._done, self.row_limit)
        if any_rank(self._short_of_memory and len(rows) == len(self._done)):
            raise self._out_of_memory(model, "with a single example in a forward pass")
        told = f"did the step again with at most {self.row_limit} tokens in a forward pass, which stay the most"
        self._incidents.console.warn(f"Out of memory in step {self._incidents.step + 1} with {size}; {told}.")
        self._incidents.note("oom", told, self._incidents.step + 1)
        model.zero_grad()
        self.means.restore(self._means_before, self._args.device)
        release_memory()
        self._done = rows
        exchange = self._args.world_size == 1 and self._accelerator.sync_gradients
        loss = self._pass(model, rows, num_items, exchange)
        self._short_of_memory = loss is None
        return None if loss is None else loss - self._returned

    def _exchange_gradients(self, model: nn.Module) -> None:
        """Give every rank the mean of the gradients, as data parallelism does in a backward pass."""
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            if any_rank(parameter.grad is not None):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad.div_(self._args.world_size))

    def _out_of_memory(self, model: nn.Module, when: str) -> RunFailed:
        """The error for memory that does not suffice, with what to lower."""
        longest = _positions(self._done)
        remedies = [
            f"lower max_length below the {longest} tokens of this forward pass",
            "set gradient_checkpointing true" if not self._args.gradient_checkpointing else "",
            *self._less_beside_passes(model),
        ]
        if self._args.world_size > 1:
            half = f"{self._args.per_device_train_batch_size // 2 or 1} and gradient_accumulation_steps"
            remedies[0] = f"write per_device_train_batch_size {half} {2 * self._args.gradient_accumulation_steps}"
        return RunFailed(
            f"Out of memory in step {self._incidents.step + 1} {when}{self._memory_in_use()}. Do one of these: "
            f"{'; '.join(filter(None, remedies))}. {self._incidents.advice()}"
        )

    def _less_beside_passes(self, model: nn.Module) -> list[str]:
        """What makes the memory smaller that weights and optimizer take whatever is read."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        states = sum(2 * own_part(weight).numel() * (weight.element_size() - 1) for weight in trained)
        name = "adamw_torch_8bit" if is_sharded(model) else "adamw_bnb_8bit"
        small = f"write optim {name}, which saves {states / 1e9:.2f} GB of optimizer states"
        spread = ", or teacher_sharding fsdp where the teacher is whole on every process"
        return [
            "" if "8bit" in optimizer_name(self._args.optim) else small,
            "write teacher_quantization 4bit"
            + (f" with teacher_sharding none{spread}" if self._args.world_size > 1 else "")
            + (", or name a teacher_cache_dir, which frees the teacher's memory" if self._may_cache else ""),
        ]

    @property
    def _may_cache(self) -> bool:
        """Whether the teacher's states can be had beforehand; those of answers that are yet to be sampled cannot."""
        return not self._args.samples

    def out_of_memory_between_passes(self, model: nn.Module) -> RunFailed:
        """The error for memory that ran out in the optimizer's step, or before the first pass."""
        when = f"in the optimizer's step {self._incidents.step + 1}" if self._done else "before the first step"
        return RunFailed(
            f"Out of memory {when}{self._memory_in_use()}. Do one of these: "
            f"{'; '.join(filter(None, self._less_beside_passes(model)))}. {self._incidents.advice()}"
        )

    def _memory_in_use(self) -> str:
        if self._args.device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info(self._args.device)
        return f" ({(total - free) / 1e9:.2f} of {total / 1e9:.2f} GB in use)"

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Skip the optimizer step on all ranks where loss or gradient is no finite number on any.

        Raises:
            RunFailed: after `max_nonfinite_steps` of them in a row.
        """
        flags = self._flags
        if self._accelerator.scaler is None:
            skip_if(self._optimizer.optimizer, flags[0], list(kwargs["model"].parameters()))
        else:  # it looks for itself, and overflows now and then by design
            flags = flags[[1, 1]]
        self.nonfinite.note(state.global_step + 1, flags)
        self.read_nonfinite()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Know the projectors' rate of this step, before the schedule moves on, as Trainer does of the student's."""
        self.projector_rate = rate_of(self._optimizer, kwargs["model"].target)

    def read_nonfinite(self, everything: bool = False) -> None:
        """Note the steps that were skipped, see `NonfiniteSteps.read`. Raises as `on_pre_optimizer_step`."""
        for step in self.nonfinite.read(everything):
            told = f"Loss or gradient of step {step} is no finite number; its optimizer step was skipped."
            self._incidents.console.warn(told)
            self._incidents.note("nan", "skipped the optimizer step", step)
        if self.nonfinite.in_a_row >= self._args.max_nonfinite_steps:
            raise RunFailed(
                f"Loss or gradient were no finite numbers for {self.nonfinite.in_a_row} steps in a row, up to step "
                f"{self._incidents.step + 1}; the weights are those from before. {self._incidents.advice()} Lower the "
                "learning rates, or look at the data around there."
            )

    def state_dict(self) -> dict[str, Any]:
        """The means since the last log line, the size of rows that fit, and the steps that were skipped."""
        self.read_nonfinite(everything=True)
        return {
            "means": {name: pair.cpu() for name, pair in self.means.state().items()},
            "row_limit": self.row_limit,
            "largest_fitting": self._largest_fitting,
            "nonfinite": self.nonfinite.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; with another number of ranks the means cover the steps from here on."""
        self.row_limit, self._largest_fitting = state["row_limit"], state["largest_fitting"]
        if state["same_ranks"]:
            self.means.restore(state["means"], self._args.device)
            self.nonfinite.restore(state["nonfinite"])
