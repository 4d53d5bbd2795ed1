"""Text that a model reads while hooks look on at what its parts do."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...utils.progress_bar import with_progress
from ..hidden_states import run_decoder
from ..layers import evaluating

Batch = Mapping[str, Any]
"""What a collator gives: at least `input_ids` and `attention_mask` [B, T]."""


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens [B, T] of a batch are text."""
    return batch.get("counted", batch["attention_mask"]).bool()


class TextPass:
    """One pass of a model over some text."""

    def __init__(self) -> None:
        self.mask = torch.zeros(0, dtype=torch.bool)
        """Which tokens [B, T] of the batch that is being read are text; for the hooks."""
        self.count = 0
        """Tokens of text that were read."""

    def run(
        self, model: PreTrainedModel, batches: Sequence[Batch], hooks: Iterable[RemovableHandle], description: str
    ) -> None:
        """Read all batches in evaluation mode; the hooks are removed afterwards.

        Args:
            model: a causal language model; it is left in the mode it came in.
            batches: of a collator, padded, on any device.
            hooks: on parts of the model.
            description: of the progress bar.
        """
        with ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(hook)
            stack.enter_context(evaluating(model))
            for batch in with_progress(batches, description, "batch"):
                moved = send_to_device(dict(batch), model.device)
                self.mask = real_tokens(moved)
                self.count += int(self.mask.sum())
                run_decoder(model, moved["input_ids"], moved["attention_mask"])
