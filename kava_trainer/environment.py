"""The machine a run stands on: what it is, how it is used, and how the run was started."""

import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from transformers import PreTrainedModel

from . import __version__
from .arguments import KavaArguments, KavaTrainingArguments
from .engines import FSDP_CONFIG, is_fsdp_asked
from .invocation import started_as
from .redaction import is_secret_name

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "torchao", "safetensors")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' if threads != 1 else ''})"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Python, operating system, device, and the versions of the packages that decide results."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "kava_trainer": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "torch": str(torch.__version__),  # with the build, which its metadata may lack
    }


def describe_memory(device: torch.device) -> str:
    """Free and total memory of an accelerator, or the machine's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return "unknown"


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use at once: on the accelerator, or of this process; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def shows_bars(training: KavaTrainingArguments) -> bool:
    """Whether this process may show progress bars: the main one, on a terminal, where nobody has asked for none."""
    wanted = not training.plain_output and not training.disable_tqdm
    return wanted and training.process_index == 0 and sys.stderr.isatty()


def quieten(bars: bool) -> None:
    """Leave the screen to KAVA's own stages; warnings of the libraries still come through.

    Args:
        bars: whether the bars for reading, tokenising and downloading stay.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights, and of the hub as well
    if not bars:
        datasets.disable_progress_bars()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variable of the environment that wants none, and is obeyed
        datasets.enable_progress_bars()
        huggingface_hub.utils.enable_progress_bars()


def use_all_cores(training: KavaTrainingArguments) -> None:
    """Undo the single thread that `accelerate launch` gives a lone process on a CPU (read in accelerate 1.15.0).

    It stays where `OMP_THREAD_LIMIT` is set: only that tells that somebody wants few threads.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and "OMP_THREAD_LIMIT" not in os.environ and training.world_size == 1 and training.device.type == "cpu":
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(available or 1)


def slow_half_precision(arguments: KavaArguments, teacher: PreTrainedModel, student: PreTrainedModel) -> str | None:
    """What to write where models compute in bfloat16 or float16 and PyTorch has no fast way for it; None elsewhere.

    Without AVX-512 products of bfloat16 matrices take from 3 to 100 times as long as those of float32 (measured with
    PyTorch 2.13.0 at Qwen2.5's shapes; PyTorch's issue 146508 has up to 500 times, for float16 as well).
    """
    training, model = arguments.training, arguments.model
    if training.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    remedies = {
        "bf16 false": training.bf16,
        "fp16 false": training.fp16,
        "--mixed_precision no for accelerate launch": os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no",
        "teacher_quantization none": model.teacher_quantization == "4bit",
        "teacher_dtype float32": teacher.dtype != torch.float32,
        "student_quantization none": model.student_quantization == "4bit",
        "student_dtype float32": student.dtype != torch.float32,
    }
    if not (needed := [remedy for remedy, needs in remedies.items() if needs]):
        return None
    return (
        "PyTorch uses no AVX-512 on this processor, and without it multiplies in half precision up to a hundred times "
        f"slower than in float32. Write {', '.join(needed)}, where the memory suffices, or train on a GPU."
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

    Args:
        argv: the command line without the program.
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
    """The command that starts a run with so many processes, where this process has not been started as one of them.

    Args:
        argv: KAVA's own arguments.
        processes: more than one where this process sees as many GPUs.
    """
    alone = "WORLD_SIZE" not in os.environ and processes > 1
    launcher = f"accelerate launch --num_processes {processes}" if alone else _launcher()
    return f"{launcher} {shlex.join(['-m', __package__, 'train', *_without_tokens(argv)])}"


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
