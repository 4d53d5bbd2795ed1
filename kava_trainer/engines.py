"""What spreads a run over several processes, and which of it KAVA would really do as it was asked.

`accelerate launch` hands its configuration on in environment variables (names read in accelerate 1.15.0).
"""

import os
from typing import Any

from .optimizers import TORCHAO_OPTIMIZERS, optimizer_name
from .recipes import accelerate_config

SHARDING_DEVICES = {"cuda"}
"""Kinds of devices on which KAVA shards where it is asked to."""

FSDP_CONFIG = accelerate_config("fsdp2.yaml")


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
    return found


_UNWANTED = {
    "fsdp_cpu_ram_efficient_loading": "all processes but one would load the teacher without its weights",
    "fsdp_offload_params": "it was never tried",
    "fsdp_activation_checkpointing": "it hides the blocks whose states are read (use gradient_checkpointing)",
}
_WANTED = {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def sharding_problems(training: Any) -> list[str]:
    """One sentence for each thing that FSDP2 was asked for with and that would go wrong; empty if there is none.

    Args:
        training: `KavaTrainingArguments`.
    """
    return [*_launcher_problems(), *_argument_problems(training)] if is_fsdp_asked() else []


def _launcher_problems() -> list[str]:
    """What the accelerate config has that would go wrong."""
    found = []
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append("FSDP1 is not supported; write fsdp_version: 2 in the accelerate config.")
    for name, reason in _UNWANTED.items():
        if _is_set(name.upper()):
            found.append(f"{name} is not supported, because {reason}; write {name}: false in the accelerate config.")
    for name, wanted in _WANTED.items():
        if os.environ.get(name.upper(), wanted) != wanted:
            found.append(f"Write {name}: {wanted} in the accelerate config; nothing else is supported.")
    if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") not in ("", "None"):
        found.append("fsdp_transformer_layer_cls_to_wrap is not supported; leave it out, the blocks are known.")
    return found


def _argument_problems(training: Any) -> list[str]:
    """What the arguments have that would go wrong."""
    found = []
    if training.bf16 or training.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        found.append(
            "bf16, fp16 and mixed_precision are not supported under FSDP2, where the projectors would be rounded too; "
            "leave them out, or write student_dtype bfloat16 with optim adamw_torch_8bit."
        )
    optim = optimizer_name(training.optim)
    if optim not in TORCHAO_OPTIMIZERS and any(word in optim for word in ("8bit", "bnb", "paged")):
        found.append(f"optim {optim} cannot update sharded weights; write adamw_torch_8bit or adamw_torch_fused.")
    if training.save_on_each_node:
        found.append("save_on_each_node is not supported under FSDP2, whose checkpoints need a folder that all share.")
    return found


def device_problem(device_type: str) -> str | None:
    """Why what was asked for would not be done on a kind of device; None where it would."""
    if not is_fsdp_asked() or device_type in SHARDING_DEVICES:
        return None
    if device_type != "cpu":
        return f"FSDP was asked for on a {device_type} device; KAVA supports it on CUDA devices alone."
    return (
        "FSDP was asked for, but on a CPU transformers runs plain data parallelism in its place. If that will do, "
        "start with python -m torch.distributed.run --nproc-per-node 2 run_kava.py; to shard, use GPUs."
    )
