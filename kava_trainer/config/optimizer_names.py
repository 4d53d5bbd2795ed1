"""The names of optimizers that need a package of their own, and what they take; what else needs one."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import is_torchao_available

from ..utils.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainingArguments

TORCHAO_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optim` that Trainer takes from torchao."""


def optimizer_name(optim: Any) -> str:
    """The name of an optimizer as it is written in the arguments; `TrainingArguments` makes it an enum."""
    return str(getattr(optim, "value", optim))


def parse_optim_args(optim_args: str | None) -> dict[str, str]:
    """The words of `optim_args`; what Trainer will refuse is left out."""
    words = (optim_args or "").replace(" ", "").split(",")
    return dict(word.split("=", 1) for word in words if "=" in word)


_BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip

_MODULES = {
    **dict.fromkeys(_BITSANDBYTES, ("bitsandbytes", "bitsandbytes")),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
}
"""The module that a value of `optim` is imported from (read in transformers 5.23.0), and what pip calls it."""

_FAMILIES = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "schedule_free_": ("schedulefree", "schedulefree"),
}
"""The same by what the names begin with."""


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def _source_of(name: str) -> tuple[str, str] | None:
    """Module and package of an optimizer; None for one of torch or transformers."""
    family = next((source for start, source in _FAMILIES.items() if name.startswith(start)), None)
    return _MODULES.get(name, family)


def missing_package(optim: Any) -> Problem | None:
    """What is wrong with an `optim` whose package is not installed; None where there is nothing to say."""
    name = optimizer_name(optim)
    if name in TORCHAO_OPTIMIZERS and not is_torchao_available():
        checkout = Path(__file__).parents[2]  # its constraints name the version that was tried
        pinned = (checkout / "constraints.txt").is_file()
        package, command = "torchao", 'pip install -c constraints.txt -e ".[bf16]"' if pinned else "pip install torchao"
    elif (source := _source_of(name)) is not None and not _is_installed(source[0]):
        package = source[0] if source[1].startswith("git+") else source[1]
        command = f"pip install {source[1]}"
    else:
        return None
    what = f"optim is {name}, which needs {package};"
    return Problem("optim", what, f"run {command}, or write another optim, such as adamw_torch_fused.")


def steps_in_backward(optim: Any) -> Problem | None:
    """What is wrong with an `optim` that takes its steps within the backward pass; None for any other.

    A step that is no finite number could not be skipped, and the projectors would have no rate of their own.
    """
    name = optimizer_name(optim)
    if not name.endswith("_layerwise") and name not in ("lomo", "adalomo"):
        return None
    what = f"optim is {name}, which takes its steps within the backward pass, where KAVA can skip none;"
    return Problem("optim", what, "write another, such as adamw_torch_fused.")


def other_missing_packages(training: "TrainingArguments") -> Iterator[Problem]:
    """What else needs something that is not installed."""
    if training.use_liger_kernel and not _is_installed("liger_kernel"):
        what = "use_liger_kernel is true, which needs liger-kernel;"
        yield Problem("use_liger_kernel", what, "run pip install liger-kernel, or write false.")
    if training.torch_compile or training.torch_compile_backend or training.torch_compile_mode:
        yield from _compiler_problems(training)


def _compiler_problems(training: "TrainingArguments") -> Iterator[Problem]:
    from torch import compiler, cuda  # here, where it is asked for: it takes seconds

    backend = training.torch_compile_backend or "inductor"
    if backend not in compiler.list_backends(exclude_tags=()):
        remedy = f"write one of {', '.join(compiler.list_backends())}."
        yield Problem.of_value("torch_compile_backend", backend, remedy)
    elif backend == "inductor" and cuda.is_available() and not training.use_cpu:
        if not _is_installed("triton"):
            yield Problem(
                "torch_compile", "torch_compile needs triton on a GPU;", "run pip install triton, or write false."
            )
    elif backend == "inductor" and not _cpp_compiler():
        what = "torch_compile needs a C++ compiler on a CPU, and there is none;"
        yield Problem("torch_compile", what, "install g++ or name one in CXX, or write false.")


def _cpp_compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cl"))), None)
