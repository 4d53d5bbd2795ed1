"""What the user sees: one place that prints, on the main process alone, with or without emoji."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from .redaction import without_secrets

_SYMBOLS = {"Adapting": "🔄", "Learning": "📈", "Good": "👍", "Great": "✅", "Excellent": "🎯", "Collapsed": "❌"}


def can_show_emoji(plain: bool) -> bool:
    """Whether emoji may be used: not asked for plain text, a terminal, and an encoding that has them."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return not plain and sys.stdout.isatty() and encoding.startswith("utf")


def status_text(status: str, emoji: bool) -> str:
    """A status as it stands at the end of a status line."""
    return f"{_SYMBOLS[status]} {status}" if emoji else status


def size_text(count: float, decimals: int = 2) -> str:
    """A number of bytes for people, in MB or GB; those in GB with so many decimals, and one less in MB."""
    return f"{count / 1e9:.{decimals}f} GB" if count >= 1e8 else f"{count / 1e6:.{decimals - 1}f} MB"


def significant(value: float, digits: int) -> str:
    """A number with so many significant digits at most."""
    return f"{value:.{digits}g}"


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals."""
    return f"{value:.{decimals}f}"


_MOST_DIGITS = 17
"""Of a float; with so many any two that differ differ as text, but for tiny ones with fixed decimals."""


def apart(first: float, second: float, digits: int, text: Callable[[float, int], str] = significant) -> tuple[str, str]:
    """Two numbers that a sentence compares, as text: where they differ, so do their texts.

    Args:
        first: a number.
        second: another.
        digits: how many are shown where that tells the two apart.
        text: writes a number with so many digits, such as `significant`, `fixed` or `size_text`.
    """
    for count in range(digits, _MOST_DIGITS + 1):
        shown = text(first, count), text(second, count)
        if shown[0] != shown[1] or first == second or first != first or second != second:  # NaN is like nothing
            return shown
    return significant(first, _MOST_DIGITS), significant(second, _MOST_DIGITS)


class Console:
    """Prints lines from the main process, above any progress bar; never emoji where `plain` is set."""

    def __init__(self, plain: bool = False) -> None:
        self.emoji = can_show_emoji(plain)

    def print(self, text: str = "") -> None:
        """Print one line, without secrets."""
        from accelerate import PartialState  # takes seconds, and not every command prints so

        if PartialState().is_main_process:
            tqdm.write(without_secrets(text))
            sys.stdout.flush()

    def stage(self, title: str) -> None:
        """Print the heading of a stage."""
        self.print(f"\n== {title}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.print(f"{'⚠️ ' if self.emoji else 'Warning:'} {text}")


class _Output(io.FileIO):
    """A descriptor that is written to until nobody reads it any more; then it is the null device."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(content).nbytes


def tell_loading() -> None:
    """Say on a terminal that the libraries are being imported, where they are not yet: it takes seconds."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        print("Loading PyTorch and Transformers ...", file=sys.stderr, flush=True)


def outlive_readers() -> None:
    """Let what is printed go nowhere once its reader has left, as `head` does: no run ends for that, nor with a
    traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not what a test or a notebook has put there
            stream.flush()
            raw: Any = _Output(stream.fileno(), "w", closefd=False)
            kept = {kind: getattr(stream, kind) for kind in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(raw if stream.write_through else io.BufferedWriter(raw), **kept))
