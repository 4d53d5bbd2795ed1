"""How much each block of a model does, from the states that it reads and gives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hidden_states import first_tensor
from .skipping import Blocks, block_input
from .text import Batch, TextPass


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
    reading = TextPass()

    def recorder(number: int) -> Callable[..., None]:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = block_input(args, kwargs).float(), first_tensor(output).float()
            cosine = torch.nn.functional.cosine_similarity(before.to(after.device), after, dim=-1)
            sums[number] += (1 - cosine[reading.mask.to(after.device)]).sum().to(model.device)

        return record

    hooks = [block.register_forward_hook(recorder(n), with_kwargs=True) for n, block in enumerate(blocks.blocks)]
    reading.run(model, batches, hooks, "Measuring the teacher's layers")
    return [(total / max(reading.count, 1)).item() for total in sums]
