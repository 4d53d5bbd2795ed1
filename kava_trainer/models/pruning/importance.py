"""How much each block of a model does, from the states that it reads and gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from ...utils.progress_bar import with_progress
from ..hidden_states import first_tensor, run_decoder
from ..layers import evaluating
from .skipping import Blocks, block_input

Batch = Mapping[str, Any]
"""What a collator gives: at least `input_ids` and `attention_mask` [B, T]."""


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens [B, T] of a batch are text."""
    return batch.get("counted", batch["attention_mask"]).bool()


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Sequence[Batch]) -> list[float]:
    """The share of direction that each block changes: 1 minus the mean cosine of what it reads and what it gives.

    That is the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853), over all real tokens and in float32.
    The last block is taken before the final norm.

    Args:
        model: a causal language model; it is left in the mode it came in.
        batches: of a collator, padded, on any device.

    Returns:
        One number from 0 to 2 for each block; the lower, the less is lost without it.

    Raises:
        BadRequest: as `Blocks`.
    """
    blocks = Blocks(model)
    sums = [torch.zeros((), device=model.device) for _ in blocks.blocks]
    mask = torch.zeros(0, dtype=torch.bool)

    def recorder(number: int) -> Callable[..., None]:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = block_input(args, kwargs).float(), first_tensor(output).float()
            cosine = torch.nn.functional.cosine_similarity(before.to(after.device), after, dim=-1)
            sums[number] += (1 - cosine[mask.to(after.device)]).sum().to(model.device)

        return record

    hooks = [block.register_forward_hook(recorder(n), with_kwargs=True) for n, block in enumerate(blocks.blocks)]
    count = 0
    try:
        with evaluating(model):
            for batch in with_progress(batches, "Measuring the teacher's layers", "batch"):
                moved = send_to_device(dict(batch), model.device)
                mask = real_tokens(moved)
                count += int(mask.sum())
                run_decoder(model, moved["input_ids"], moved["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return [(total / max(count, 1)).item() for total in sums]
