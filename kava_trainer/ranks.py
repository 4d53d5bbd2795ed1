"""What the ranks tell each other beside tensors: small numbers, on the host, so that no device is waited for."""

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint import CheckpointException

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


def all_succeed(work: Callable[[], None]) -> str | None:
    """Let every rank do something that may fail on disk. Every rank must ask.

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
    return (problem or "another process could not write its part") if failed else None


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
            found[1] = str(error)
    result, problem = broadcast_object_list(found)
    if problem is not None:
        raise BadRequest(problem)
    return result
