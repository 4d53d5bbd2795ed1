"""Bytes that are whole on a rank while the rest of a sharded model is spread."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ...utils.distributed import own_part
from ..layers import find_blocks, find_decoder
from ..sizes import weight_bytes


def gathered_bytes(student: PreTrainedModel, target: nn.Module, computes_in: torch.dtype | None) -> int:
    """What is whole at once of a sharded model, see `shard_model`, with the gradients of what of it is trained.

    That are the projectors, the decoder but for its blocks, the head, and two blocks, of which one is on its way in or,
    as gradients, out. Where blocks are gathered in another type, their gradients are added up in float32.

    Args:
        student: its weights may be fake.
        target: the projectors.
        computes_in: the type that blocks are gathered in, see `Sharding`.
    """
    blocks = [list(block.parameters()) for block in find_blocks(student)]
    inside = {id(weight) for block in blocks for weight in block}
    read = [*find_decoder(student).parameters(), *student.get_output_embeddings().parameters()]
    ends = {id(weight): weight for weight in (*read, *target.parameters()) if id(weight) not in inside}
    whole = sum(weight.nbytes * (2 if weight.requires_grad else 1) for weight in ends.values())

    def at_work(block: list[nn.Parameter]) -> int:
        trained = [weight for weight in block if weight.requires_grad]
        if computes_in is None:
            return 2 * (weight_bytes(block) + weight_bytes(trained))
        counts = [sum(weight.numel() for weight in weights) for weights in (block, trained)]
        return 2 * counts[0] * computes_in.itemsize + counts[1] * (computes_in.itemsize + torch.float32.itemsize)

    return whole + max(map(at_work, blocks))


def gather_in(student: PreTrainedModel, kind: torch.dtype) -> None:
    """Let the blocks of a student with fake weights have those that its passes read where they are sharded."""
    for module in (module for block in find_blocks(student) for module in block.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach().to(kind), weight.requires_grad))


def held_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of weights that this rank itself holds."""
    return weight_bytes(map(own_part, parameters))


def gathered_of_teacher(model: PreTrainedModel) -> int:
    """What is whole at once of a sharded teacher, at most: two blocks, or its vocabulary head, beside what its decoder
    has between embeddings and blocks; or the embeddings beside that.

    The model may have no storage.
    """
    decoder, head, embeddings = find_decoder(model), model.get_output_embeddings(), model.get_input_embeddings()
    blocks = [weight_bytes(block.parameters()) for block in find_blocks(model)]
    whole, first, last = (weight_bytes(module.parameters()) for module in (decoder, embeddings, head))
    between = whole - sum(blocks) - first
    return max(between, 0) + max(2 * max(blocks), max(blocks) + first, last)
