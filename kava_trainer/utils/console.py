"""What the user sees: one place that prints, on the main process alone, with or without emoji."""

import sys

from accelerate import PartialState
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
        if PartialState().is_main_process:
            tqdm.write(without_secrets(text))
            sys.stdout.flush()

    def stage(self, title: str) -> None:
        """Print the heading of a stage."""
        self.print(f"\n== {title}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.print(f"{'⚠️ ' if self.emoji else 'Warning:'} {text}")
