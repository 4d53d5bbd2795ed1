"""What the user sees: one place that prints, on the main process alone, with or without emoji."""

import io
import os
import sys
from typing import Any

from tqdm.auto import tqdm

from .redaction import without_secrets

_SYMBOLS = {"Adapting": "🔄", "Learning": "⚠️", "Good": "👍", "Great": "✅", "Excellent": "🎯", "Collapsed": "❌"}


def can_show_emoji(plain: bool) -> bool:
    """Whether emoji may be used: not asked for plain text, a terminal, and an encoding that has them."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return not plain and sys.stdout.isatty() and encoding.startswith("utf")


def status_text(status: str, emoji: bool) -> str:
    """A status as it stands at the end of a status line."""
    return f"{_SYMBOLS[status]} {status}" if emoji else status


def size_text(count: int) -> str:
    """A number of bytes for people, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


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

    def write(self, content: Any) -> int | None:
        try:
            return super().write(content)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(content).nbytes


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
