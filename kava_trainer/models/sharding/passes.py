"""Passes of a model whose weights the ranks gather together, outside of its training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from ...utils.distributed import give_up_whole_weights, in_step, is_sharded
from ..hidden_states import run_decoder
from ..layers import find_decoder, made_up_tokens
from ..lm_head import whole_head

T = TypeVar("T")


def read_apart(root: nn.Module, work: Callable[[], T]) -> T:
    """What some work makes of parts of a model, without gradients, which may be sharded.

    FSDP2 wants to know of each pass when it begins and ends at the model that holds all units. Between the passes of
    `work` what no block holds stays whole, such as the head; afterwards each rank has its own parts alone again.

    Args:
        root: the model that holds all units. Every rank must call, and make as many passes, see `passes_in_step`.
        work: runs parts of it; within it nobody may call this of the same model.

    Raises:
        BaseException: what `work` raises.
    """
    if not is_sharded(root):
        with torch.no_grad():
            return work()
    found: list[T] = []
    errors: list[BaseException] = []

    def run_apart(_: None) -> None:
        try:
            found.append(work())
        except BaseException as error:  # is raised again, once FSDP2 knows that the pass is over
            errors.append(error)

    model: Any = root
    model.run_apart = run_apart  # a method of it, for this once
    register_fsdp_forward_method(root, "run_apart")
    try:
        with torch.no_grad():
            model.run_apart(None)  # torch 2.11 moves the first of the arguments to the device, and wants one
    finally:
        del model.run_apart
        give_up_whole_weights(root)
    if errors:
        raise errors[0]
    return found[0]


@contextmanager
def passes_in_step(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` block each rank may run a model as often as it has something to read: its decoder, then its
    vocabulary head, by itself or in `whole_head`.

    Where the weights are sharded, a rank that is through reads a token again and again until all are, see
    `distributed.in_step`. Every rank must enter the block.
    """
    if not is_sharded(model):
        yield
        return

    @torch.no_grad()
    def read_a_token() -> None:
        run_decoder(model, made_up_tokens(model, 1))
        with whole_head(model):  # one that is a unit of its own is gathered once with each pass
            pass

    if isinstance(model, FSDPModule):
        model.unshard()  # what is whole between the passes: no rank may yet wait for a first pass
    with in_step(find_decoder(model), read_a_token):
        yield
