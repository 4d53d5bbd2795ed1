"""The ranks of a run: what they tell each other, on the host so that no device is waited for, and sharded weights."""

import gc
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import BadRequest, RunFailed, reason_of

T = TypeVar("T")


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """A process group for tensors of the host, whatever the devices' one is."""
    return torch.distributed.new_group(backend="gloo")


def disconnect() -> None:
    """End Gloo's connections to the other ranks, in a process that is about to exit and asks them nothing more.

    One that exits with Gloo's threads at work may be aborted (SIGABRT) in place of giving its exit code: PyTorch's
    issue 190489, seen in one of 48 runs. NCCL's stay as they are: to end them waits for the other ranks, without limit.
    After FSDP2 on CPUs some threads remain, because PyTorch itself keeps the device mesh.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # what a trainer has wrapped holds its group, and a group's threads end with its last reference
    if torch.distributed.get_backend() == "gloo":
        _host_group.cache_clear()
        torch.distributed.destroy_process_group()
    elif _host_group.cache_info().currsize:
        torch.distributed.destroy_process_group(_host_group())
        _host_group.cache_clear()


def largest_over_ranks(value: int) -> int:
    """The largest of the numbers that the ranks have. Every rank must ask."""
    if PartialState().num_processes == 1:
        return value
    numbers = torch.tensor(value)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX, group=_host_group())
    return int(numbers)


def any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank. Every rank must ask."""
    return largest_over_ranks(int(flag)) > 0


def all_succeed(work: Callable[[], None], elsewhere: str = "another process could not write its part") -> str | None:
    """Let every rank do something that may fail on disk. Every rank must ask.

    Args:
        work: is done.
        elsewhere: what is said where it failed on other ranks alone.

    Returns:
        Why it failed on this rank or another; None where it failed on none.

    Raises:
        RunFailed, torch.OutOfMemoryError: where `work` does.
    """
    problem = None
    try:
        work()
    except (RunFailed, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:  # tokenizers have no kind of their own for a full disk
        problem = reason_of(error)
    failed = any_rank(problem is not None)
    return (problem or elsewhere) if failed else None


def from_main_process(work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on every rank. Every rank must ask.

    Raises:
        BadRequest: on every rank, where it is raised on the main process.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except BadRequest as error:
            found[1] = error.problems
    result, problems = broadcast_object_list(found)
    if problems is not None:
        raise BadRequest.of(*problems)
    return result


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the weights of a model, or of any part of it, over the ranks; it may be compiled."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def in_step(module: nn.Module, idle: Callable[[], object]) -> Iterator[None]:
    """Within the `with` block the ranks may run a module of a sharded model different numbers of times.

    They gather the weights of each pass together, so a rank that is through with its own passes makes idle ones until
    all are. Every rank must enter the block, and within it no rank may wait for the others but in these passes. An
    error on one rank leaves the others waiting, as it does in any pass of a sharded model.

    Args:
        module: each call of it is a pass. What is gathered before the call, such as weights of the model around it, has
            to be there already.
        idle: runs it once on anything, and in the same way, for nothing.
    """
    hook = module.register_forward_pre_hook(lambda module, args: _keep_pace(), prepend=True)  # before it gathers
    try:
        yield
    finally:
        hook.remove()
    while any_rank(False):
        idle()


def _keep_pace() -> None:
    """Tell the ranks that wait that there is one more pass to come."""
    any_rank(True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put_whole(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite a tensor, of which each rank may hold a part, with whole values [the same shape]. Every rank must."""
    values = values.to(device=tensor.device, dtype=tensor.dtype)
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


@contextmanager
def whole_weights(unit: nn.Module) -> Iterator[None]:
    """Within the `with` block the own weights of a unit of FSDP2 are whole, to be read. Every rank must enter it."""
    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def give_up_whole_weights(model: nn.Module) -> None:
    """After a forward pass without a backward pass: hold nothing but the own parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(module: nn.Module, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """The state of a module of a sharded model with whole weights, on the main process's host. Every rank must ask.

    They are gathered one after the other, so that no device holds more than one of them whole.

    Args:
        module: the model or a part of it.
        names: of what is asked for; all of it by default.

    Returns:
        Tensors by name; nothing on the other ranks.
    """
    if names is None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, torch.Tensor], get_model_state_dict(module, options=options))
    found = {}
    for name, part in get_model_state_dict(module).items():
        if name in names:
            tensor = whole(cast(torch.Tensor, part))
            if PartialState().is_main_process:
                found[name] = tensor.cpu()
    return found


def write_parts(module: nn.Module, folder: Path, left_out: Container[str]) -> None:
    """Let every rank write its part of a sharded model's state, but for what is left out by name."""
    checkpoint.save({"model": _parts(module, left_out)}, checkpoint_id=folder)


def read_parts(module: nn.Module, folder: Path, left_out: Container[str]) -> None:
    """Put back what `write_parts` wrote, by whichever number of ranks. Every rank must ask."""
    state = {"model": _parts(module, left_out)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))


def _parts(module: nn.Module, left_out: Container[str]) -> dict[str, Any]:
    return {name: part for name, part in get_model_state_dict(module).items() if name not in left_out}
