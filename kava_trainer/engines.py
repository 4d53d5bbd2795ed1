"""What spreads a run over several processes, and which of it KAVA would really do as it was asked.

`accelerate launch` hands its configuration on in environment variables (names read in accelerate 1.15.0).
"""

import os
from typing import Any

SHARDING_DEVICES = {"cuda"}
"""Kinds of devices on which transformers shards where it is asked to; on any other it runs plain data parallelism."""

FSDP_CONFIG = "training_args/accelerate/fsdp2.yaml"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def is_fsdp_asked() -> bool:
    """Whether the launcher was told to shard with FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def describe_engine(world_size: int) -> str:
    """How many processes there are, and what they share, in a few words."""
    if is_fsdp_asked():
        return f"{world_size}, student and projectors spread over them (FSDP2)"
    return "1" if world_size == 1 else f"{world_size}, each with the whole student (DDP)"


def engine_problems(fsdp: Any, deepspeed: Any) -> list[str]:
    """One sentence for each thing that was asked for and would not be done, or not as asked; empty if there is none.

    Args:
        fsdp: the argument of that name.
        deepspeed: the argument of that name.
    """
    instead = f"accelerate launch --config_file {FSDP_CONFIG}"
    found = []
    if deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        found.append(f"deepspeed is not supported; shard with FSDP2 in its place: {instead}.")
    if fsdp and not is_fsdp_asked():
        found.append(f"fsdp is not read from the arguments; start with {instead}.")
    if not is_fsdp_asked():
        return found
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append("FSDP1 is not supported; write fsdp_version: 2 in the accelerate config.")
    unwanted = {
        "fsdp_cpu_ram_efficient_loading": "all processes but one would load the teacher without its weights",
        "fsdp_offload_params": "it was never tried",
        "fsdp_activation_checkpointing": "it hides the blocks whose states are read (use gradient_checkpointing)",
    }
    for name, reason in unwanted.items():
        if _is_set(name.upper()):
            found.append(f"{name} is not supported, because {reason}; write {name}: false in the accelerate config.")
    return found


def device_problem(device_type: str) -> str | None:
    """Why what was asked for would not be done on a kind of device; None where it would."""
    if not is_fsdp_asked() or device_type in SHARDING_DEVICES:
        return None
    return (
        f"FSDP was asked for, but on a {device_type} device transformers runs plain data parallelism in its place. If "
        "that will do, start with python -m torch.distributed.run --nproc-per-node 2 run_kava.py; to shard, use GPUs."
    )
