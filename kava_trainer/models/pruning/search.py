"""A greedy search for the blocks that a model loses least without."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from ...utils.errors import BadRequest
from ...utils.progress_bar import progress_bar
from ..hidden_states import run_decoder
from ..layers import evaluating
from ..lm_head import vocabulary_logits
from .skipping import Blocks, block_input
from .text import Batch, real_tokens

_LOGITS = 2**25
"""Numbers in the logits that exist at once."""

_FIRST, _BEST, _FEWEST = 8, 5, 3
"""Every block is tried on one in so many batches, and one in so many of the blocks, but some at least, on all."""

_LOOK = "Look for weights that are NaN or infinite, and at its data type."


@dataclass(frozen=True)
class Removal:
    """A block that the search left out."""

    block: int
    """Of the model, counted from 0."""
    loss: float
    """Next-token loss in nats without it and all that were left out before."""


def search_layers(model: PreTrainedModel, batches: Sequence[Batch], keep: int, shortlist: bool = True) -> list[Removal]:
    """Leave out blocks one by one, each time the one without which the next-token loss is lowest.

    A trial runs only the blocks behind the one it leaves out, from the state that was there before.

    Args:
        model: a causal language model; it is left in the mode it came in.
        batches: of a collator, padded, on any device.
        keep: blocks that remain.
        shortlist: try every block on one in eight of the batches, and only the best fifth of the blocks on the others.
            Without it the search takes about three times as long.

    Returns:
        What was left out, in its order.

    Raises:
        BadRequest: as `Blocks`.
    """
    blocks = Blocks(model)
    depth = len(blocks)
    first = math.ceil(len(batches) / _FIRST) if shortlist else len(batches)
    rounds = range(depth, keep, -1)
    trials = sum(left * first + _best(left) * (len(batches) - first) for left in rounds)
    removals: list[Removal] = []
    with torch.no_grad(), evaluating(model), progress_bar(trials, "Searching for layers to leave out", "trial") as bar:
        while depth - len(removals) > keep:
            removed = [removal.block for removal in removals]
            trial = _Trial(blocks, removed, bar.update)
            losses = trial.losses(batches[:first], trial.kept)
            if first < len(batches):
                best = sorted(trial.kept, key=lambda block: losses[block])[: _best(len(trial.kept))]
                losses = trial.losses(batches[first:], best)
            block = min(losses, key=lambda one: losses[one])
            if math.isinf(losses[block]):
                raise BadRequest("The teacher's next-token loss on the training examples is no number.", _LOOK)
            removals.append(Removal(block, losses[block] / max(trial.tokens, 1)))
    return removals


def _best(count: int) -> int:
    """How many of so many blocks are tried on all batches."""
    return min(count, max(_FEWEST, math.ceil(count / _BEST)))


class _Trial:
    """One round of the search: what each of the blocks that are left costs."""

    def __init__(self, blocks: Blocks, removed: list[int], tell: Callable[[], Any]) -> None:
        self.blocks, self.removed, self.tell = blocks, removed, tell
        self.kept = [number for number in range(len(blocks)) if number not in removed]
        self.sums: dict[int, float] = {}
        self.tokens = 0

    def losses(self, batches: Sequence[Batch], candidates: list[int]) -> dict[int, float]:
        """Add the losses of some batches without each candidate; the sums over all batches until now."""
        for batch in batches:
            moved = send_to_device(dict(batch), self.blocks.model.device)
            index, tokens = predicted_tokens(moved)
            self.tokens += len(tokens)
            states = self._states(moved)
            for block in candidates:
                loss = self._loss_without(block, states, moved, index, tokens)
                self.sums[block] = self.sums.get(block, 0.0) + (loss if math.isfinite(loss) else math.inf)
                self.tell()
        return {block: self.sums[block] for block in candidates}

    def _states(self, batch: Batch) -> dict[int, torch.Tensor]:
        """What each of the blocks that are left reads."""
        found: dict[int, torch.Tensor] = {}

        def recorder(number: int) -> Callable[..., None]:
            def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[number] = block_input(args, kwargs)

            return record

        with ExitStack() as stack:
            for number in self.kept:
                block = self.blocks.blocks[number]
                stack.enter_context(block.register_forward_pre_hook(recorder(number), with_kwargs=True))
            stack.enter_context(self.blocks.skipped(self.removed))
            run_decoder(self.blocks.model, batch["input_ids"], batch["attention_mask"])
        return found

    def _loss_without(
        self, block: int, states: dict[int, torch.Tensor], batch: Batch, index: torch.Tensor, tokens: torch.Tensor
    ) -> float:
        model, before = self.blocks.model, [number for number in self.kept if number < block]
        with (
            self.blocks.skipped([*self.removed, *before]),
            self.blocks.standing_in({block: lambda state: states[block]}),
        ):
            last = run_decoder(model, batch["input_ids"], batch["attention_mask"])
        return next_token_loss(model, last.flatten(0, 1)[index], tokens)


def predicted_tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions [K] among the flattened tokens of a batch that a token follows, and these next tokens [K]."""
    real, ids = real_tokens(batch), batch["input_ids"]
    index = torch.nn.functional.pad(real[:, :-1] & real[:, 1:], (0, 1)).flatten().nonzero().flatten()
    return index, ids.flatten()[index + 1]


@torch.no_grad()
def next_token_loss(model: PreTrainedModel, states: torch.Tensor, tokens: torch.Tensor) -> float:
    """Cross-entropy in nats, summed, of tokens [K] that follow last hidden states [K, d]; few logits exist at once."""
    size = max(1, _LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    total = torch.zeros((), device=states.device)
    for start in range(0, len(tokens), size):
        logits = vocabulary_logits(model, states[start : start + size]).float()
        following = tokens[start : start + size].to(logits.device)
        total += torch.nn.functional.cross_entropy(logits, following, reduction="sum").to(total.device)
    return total.item()
