"""What is different where FSDP2 has spread the weights of student and projectors over the ranks.

Each rank holds a part of every weight, as a `DTensor`. For a forward and a backward pass the parts are gathered block
by block; those of the root and of the vocabulary head stay whole from a forward pass until the next backward pass.
Read in torch 2.13.0 and accelerate 1.15.0.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the weights of a model over the ranks."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def give_up_whole_weights(model: nn.Module) -> None:
    """After a forward pass without a backward pass: hold nothing but the own parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(module: nn.Module, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """The state of a module of a sharded model with whole weights. Every rank must ask.

    Args:
        module: the model or a part of it.
        everywhere: on every rank, on its device; by default on the main process alone, on the CPU.

    Returns:
        Tensors by name; nothing on the other ranks where they are not asked for.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    return cast(dict[str, torch.Tensor], get_model_state_dict(module, options=options))
