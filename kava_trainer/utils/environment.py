"""The machine and the packages that a run stands on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

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
