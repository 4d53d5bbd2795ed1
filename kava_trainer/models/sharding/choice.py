"""Whether a teacher is spread over the ranks of a run."""

from typing import NamedTuple

import torch

from ...config.launcher import is_fsdp_asked, may_shard
from ...config.model_arguments import ModelArguments
from ...utils.distributed import any_rank
from ...utils.errors import BadRequest
from ...utils.memory import total_memory_bytes
from ..loading import build_causal_lm, load_config
from ..sizes import model_bytes
from .teacher import sharding_problem

SHARE_OF_DEVICE = 0.25
"""A teacher that takes more of a device is sharded under FSDP2 where nobody has said how it is held."""


class Holding(NamedTuple):
    """How a teacher is held."""

    sharded: bool
    """Whether each rank holds a share of it, and not all."""
    note: str | None = None
    """Why one that is large enough to be sharded is not, in a sentence."""


def choose_holding(
    arguments: ModelArguments, device: torch.device, processes: int, role: str = "teacher", fetch: bool = False
) -> Holding:
    """How a teacher is held, from its config and the headers of its files. Every rank must ask.

    Args:
        arguments: which model it is, and what is asked for.
        device: of this rank.
        processes: of the run.
        role: what messages call it.
        fetch: see `sharding_problem`.

    Raises:
        BadRequest: if it shall be sharded, and cannot be; or as `sharding_problem`.
    """
    if arguments.teacher_sharding == "fsdp":
        if (problem := sharding_problem(arguments, role, fetch)) is not None:
            raise BadRequest.of(problem)
        return Holding(sharded=True)
    may = arguments.teacher_sharding == "auto" and is_fsdp_asked() and processes > 1 and may_shard(device.type)
    if not may or arguments.teacher_quantization != "none" or not any_rank(_is_large(arguments, device, role)):
        return Holding(sharded=False)
    if arguments.is_cut:
        return Holding(False, f"The {role} is replicated, because the student is cut out of its whole weights.")
    if (problem := sharding_problem(arguments, role, fetch)) is not None:
        return Holding(False, f"{problem.what.removesuffix(';')}. Every process holds all of it.")
    return Holding(sharded=True)


def _is_large(arguments: ModelArguments, device: torch.device, role: str) -> bool:
    """Whether a teacher takes more than its share of a device."""
    config = load_config(arguments.teacher_name, role, arguments.teacher_revision, arguments)
    with torch.device("meta"):
        teacher = build_causal_lm(config, arguments.teacher_dtype, arguments, role)
    return model_bytes(teacher) > SHARE_OF_DEVICE * total_memory_bytes(device)
