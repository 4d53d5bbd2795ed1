"""How much memory can still be had, of an accelerator or of this machine."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from .errors import RunFailed, reason_of

PROCESS, CONTROL_GROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")

_LIMITS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where a control group of Linux says how much memory it may use, uses, and could give back, by its controllers."""


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is free on a CUDA device; for any other device, on this machine and within the process's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_by_limits()])


def total_memory_bytes(device: torch.device) -> int:
    """Memory of a CUDA device; for any other device, of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def _left_by_limits() -> list[int]:
    """What each memory limit that holds for this process leaves of itself; containers and job schedulers set some.

    Pages of files that nobody uses any more count as free: the kernel drops them before it ends a process.
    """
    left: list[int] = []
    try:
        groups = [line.split(":", 2) for line in (PROCESS / "cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:  # no Linux
        return left
    for _, controllers, path in groups:
        if controllers not in _LIMITS:
            continue
        name, limit, used, unused = _LIMITS[controllers]
        root = CONTROL_GROUPS / name
        group = root / path.lstrip("/")
        for folder in (folder for folder in (group, *group.parents) if folder.is_relative_to(root)):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                left.append(max(0, most - now + (_number(folder / "memory.stat", unused) or 0)))
    return left


def _number(file: Path, name: str | None = None) -> int | None:
    """The number in a file, or that behind a name in it; None where there is none."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:  # the root has no limit
        return None
    words = [line[-1] for line in lines if name is None or line[0] == name]
    return int(words[0]) if words and words[0].isdecimal() else None


def describe_memory(device: torch.device) -> str:
    """Free and total memory of an accelerator, or the machine's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use at once: on the accelerator, or of this process; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def needs_memory(stage: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Within the `with` block memory that runs out ends the run.

    Args:
        stage: when it ran out, as `in the evaluation`.
        remedy: gives what to write instead, as one or more sentences; called only then.

    Raises:
        RunFailed: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"Out of memory {stage} ({reason_of(error)}).", remedy()) from error
