"""What spreads a run over several processes, and which of it KAVA would really do as it was asked.

`accelerate launch` hands its configuration on in environment variables (names read in accelerate 1.15.0).
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import Problem
from ..utils.redaction import is_secret_name
from .optimizer_names import TORCHAO_OPTIMIZERS, optimizer_name
from .recipes import accelerate_config

if TYPE_CHECKING:
    from transformers import TrainingArguments

_PACKAGE = Path(__file__).resolve().parents[1]

SHARDING_DEVICES = {"cuda"}
"""Kinds of devices on which KAVA shards where it is asked to."""

FSDP_CONFIG = accelerate_config("fsdp2.yaml")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def is_fsdp_asked() -> bool:
    """Whether the launcher was told to shard with FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def may_shard(device_type: str) -> bool:
    """Whether KAVA shards on a kind of device where it is asked to."""
    return device_type in SHARDING_DEVICES


def mixed_precision(training: "TrainingArguments") -> str:
    """What autocast computes in, `bf16` or `fp16`, as the arguments say or else the launcher; `no` without it."""
    if training.bf16 or training.fp16:
        return "fp16" if training.fp16 else "bf16"
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def describe_engine(world_size: int) -> str:
    """How many processes there are, and what they share, in a few words."""
    if is_fsdp_asked():
        return f"{world_size}, student and projectors spread over them (FSDP2)"
    return "1" if world_size == 1 else f"{world_size}, each with the whole student (DDP)"


def engine_problems(fsdp: Any, deepspeed: Any) -> list[Problem]:
    """Each thing that the arguments `fsdp` and `deepspeed` ask for and that would not be done, or not as asked."""
    instead = f"accelerate launch --config_file {FSDP_CONFIG}"
    found = []
    if deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        remedy = f"shard with FSDP2 in its place: {instead} (its engine was never seen to keep KAVA's steps and files)."
        found.append(Problem("deepspeed", "deepspeed is not supported;", remedy))
    if fsdp and not is_fsdp_asked():
        found.append(Problem("fsdp", "fsdp is not read from the arguments;", f"start with {instead}."))
    return found


_UNWANTED = {
    "fsdp_cpu_ram_efficient_loading": "all processes but one would load the teacher without its weights",
    "fsdp_offload_params": "it was never tried",
    "fsdp_activation_checkpointing": "it hides the blocks whose states are read (use gradient_checkpointing)",
}

_WANTED = {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def sharding_problems(training: "TrainingArguments") -> list[Problem]:
    """Each thing that FSDP2 was asked for with and that would go wrong."""
    return [*_launcher_problems(), *_argument_problems(training)] if is_fsdp_asked() else []


def teacher_sharding_problems(training: "TrainingArguments", asked: str) -> Iterator[Problem]:
    """Why a teacher that shall be sharded cannot be here, whatever it is; `asked` is `teacher_sharding`."""
    if asked != "fsdp":
        return
    if max(training.world_size, training.n_gpu) == 1:
        what = "teacher_sharding is fsdp, but there is one process, which has nobody to share the teacher with;"
        yield Problem("teacher_sharding", what, "write none, or start more: accelerate launch --num_processes 2.")
    elif not may_shard(training.device.type):
        what = f"teacher_sharding is fsdp on a {training.device.type} device; KAVA shards on CUDA devices alone;"
        yield Problem("teacher_sharding", what, "write none.")


def _launcher_problems() -> Iterator[Problem]:
    """What the accelerate config has that would go wrong."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        yield Problem(None, "FSDP1 is not supported;", "write fsdp_version: 2 in the accelerate config.")
    for name, reason in _UNWANTED.items():
        if _is_set(name.upper()):
            remedy = f"write {name}: false in the accelerate config."
            yield Problem(None, f"{name} is not supported, because {reason};", remedy)
    for name, wanted in _WANTED.items():
        if os.environ.get(name.upper(), wanted) != wanted:
            yield Problem(None, f"Write {name}: {wanted} in the accelerate config; nothing else is supported.")
    if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") not in ("", "None"):
        what = "fsdp_transformer_layer_cls_to_wrap is not supported;"
        yield Problem(None, what, "leave it out, the blocks are known.")


def _argument_problems(training: "TrainingArguments") -> Iterator[Problem]:
    """What the arguments have that would go wrong."""
    if (precision := mixed_precision(training)) not in ("no", "bf16"):
        what = f"Mixed precision in {precision} is not supported under FSDP2;"
        yield Problem(None, what, "write bf16 true (in the accelerate config mixed_precision: bf16), or leave it out.")
    optim = optimizer_name(training.optim)
    if optim not in TORCHAO_OPTIMIZERS and any(word in optim for word in ("8bit", "bnb", "paged")):
        what = f"optim {optim} cannot update sharded weights;"
        yield Problem("optim", what, "write adamw_torch_8bit or adamw_torch_fused.")
    if training.save_on_each_node:
        what = "save_on_each_node is not supported under FSDP2, whose checkpoints need a folder that all share."
        yield Problem("save_on_each_node", what)


def device_problem(device_type: str) -> Problem | None:
    """Why what was asked for would not be done on a kind of device; None where it would."""
    if not is_fsdp_asked() or may_shard(device_type):
        return None
    if device_type != "cpu":
        return Problem(None, f"FSDP was asked for on a {device_type} device; KAVA supports it on CUDA devices alone.")
    return Problem(
        None,
        "FSDP was asked for, but on a CPU transformers runs plain data parallelism in its place.",
        "If that will do, start with python -m torch.distributed.run --nproc-per-node 2 run_kava.py; to shard, use "
        "GPUs.",
    )


def _without_tokens(argv: list[str]) -> list[str]:
    """A command line with a placeholder, such as `<HUB_TOKEN>`, in place of each token."""
    shown: list[str] = []
    placeholder = None
    for word in argv:
        option, equals, _ = word.partition("=")
        if word.startswith("--"):
            placeholder = f"<{option[2:].replace('-', '_').upper()}>" if is_secret_name(option) else None
            shown.append(f"{option}={placeholder}" if placeholder and equals else word)
        else:
            shown.append(placeholder or word)
            placeholder = None
    return shown


def run_command(argv: list[str]) -> str:
    """The command that starts this run, in one line, with a placeholder in place of each token.

    Of a run that was resumed it is the command without the checkpoint: nobody else has that.
    """
    return _command(_words_of_run(argv))


def hide_tokens() -> None:
    """Put the placeholders into `sys.argv` itself: some trackers record it as it stands and send it away."""
    sys.argv[1:] = _without_tokens(sys.argv[1:])


def resume_command(argv: list[str], checkpoint: Path | None) -> str:
    """The command that goes on from a checkpoint, or starts again, in the way this process was started.

    It is printed and may end up in a log, so the user has to fill tokens in again.
    """
    return _command(_words_of_run(argv), ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else [])


def _words_of_run(argv: list[str]) -> list[str]:
    """A command line without tokens and without a checkpoint to resume."""
    kept, skip = [], False
    for word in _without_tokens(argv):
        name = word.split("=")[0].replace("-", "_")
        if skip and not word.startswith("--"):
            skip = False
        elif name == "__resume_from_checkpoint":
            skip = "=" not in word
        else:
            kept.append(word)
            skip = False
    return kept


def _command(words: list[str], more: Sequence[str] = ()) -> str:
    """How this process was started, with these words; the precision of `accelerate launch` is one of them."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked = [f"--{precision}", "true"] if precision in ("bf16", "fp16") and f"--{precision}" not in words else []
    return f"{_launcher()} {shlex.join([*started_as(), *words, *asked, *more])}"


def start_command(argv: list[str], processes: int = 1) -> str:
    """The command that starts a run with so many processes, where this process has not been started as one of them."""
    alone = "WORLD_SIZE" not in os.environ and processes > 1
    launcher = f"accelerate launch --num_processes {processes}" if alone else _launcher()
    return f"{launcher} {shlex.join(['-m', _PACKAGE.name, 'train', *_without_tokens(argv)])}"


def _launcher() -> str:
    """What starts as many processes as there are; of several machines the user has to fill in which is which."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    machines = world_size // local
    if is_fsdp_asked():
        command = f"accelerate launch --config_file {FSDP_CONFIG} --num_processes {world_size}"
        where = f" --num_machines {machines} --machine_rank <RANK> --main_process_ip <ADDRESS>"
        return command + (where if machines > 1 else "")
    if world_size == 1:
        return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    where = f" --nnodes {machines} --node-rank <RANK> --master-addr <ADDRESS>" if machines > 1 else ""
    return f"python -m torch.distributed.run --nproc-per-node {local}{where}"


def is_module(program: str) -> bool:
    """Whether a program, `sys.argv[0]`, is this package, started with `python -m`."""
    return Path(program).resolve() == _PACKAGE / "__main__.py"


def program() -> str:
    """What this process was started as, before KAVA's own arguments, in one line."""
    return f"python {shlex.join(started_as())}"


def started_as() -> list[str]:
    """The script and what follows it before KAVA's own arguments: `run_kava.py`, or `-m kava_trainer train`."""
    if is_module(sys.argv[0]):
        return ["-m", _PACKAGE.name, "train"]
    try:
        return [os.path.relpath(sys.argv[0])]
    except ValueError:  # on Windows, from another drive
        return [sys.argv[0]]
