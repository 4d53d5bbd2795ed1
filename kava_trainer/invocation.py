"""How this process was started, in words that start another one in the same way."""

import os
import sys
from pathlib import Path


def is_module(program: str) -> bool:
    """Whether a program, `sys.argv[0]`, is this package, started with `python -m`."""
    return Path(program).resolve() == Path(__file__).resolve().with_name("__main__.py")


def started_as() -> list[str]:
    """The script and what follows it before KAVA's own arguments: `run_kava.py`, or `-m kava_trainer train`."""
    if is_module(sys.argv[0]):
        return ["-m", __package__, "train"]
    try:
        return [os.path.relpath(sys.argv[0])]
    except ValueError:  # on Windows, from another drive
        return [sys.argv[0]]
