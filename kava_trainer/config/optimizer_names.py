"""The names of optimizers that need a package of their own, and what they take."""

from pathlib import Path
from typing import Any

from transformers.utils import is_torchao_available

from ..utils.errors import Problem

TORCHAO_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optim` that Trainer takes from torchao."""


def optimizer_name(optim: Any) -> str:
    """The name of an optimizer as it is written in the arguments; `TrainingArguments` makes it an enum."""
    return str(getattr(optim, "value", optim))


def parse_optim_args(optim_args: str | None) -> dict[str, str]:
    """The words of `optim_args`; what Trainer will refuse is left out."""
    words = (optim_args or "").replace(" ", "").split(",")
    return dict(word.split("=", 1) for word in words if "=" in word)


def missing_package(optim: Any) -> Problem | None:
    """What is wrong with an `optim` whose package is not installed; None where there is nothing to say."""
    if optimizer_name(optim) not in TORCHAO_OPTIMIZERS or is_torchao_available():
        return None
    checkout = Path(__file__).parents[2]  # its constraints name the version that was tried
    pinned = (checkout / "constraints.txt").is_file()
    command = 'pip install -c constraints.txt -e ".[bf16]"' if pinned else "pip install torchao"
    what = f"optim is {optimizer_name(optim)}, which needs torchao;"
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
