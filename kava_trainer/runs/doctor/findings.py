"""What checks find, a line each, and what to change for it in the end."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ...utils.console import Console
from ...utils.errors import BadRequest, RunFailed

T = TypeVar("T")

OK, WARNING, PROBLEM, NOT_CHECKED = "OK", "Warning", "Problem", "Not checked"

_SYMBOLS = {OK: "✅", WARNING: "⚠️", PROBLEM: "❌", NOT_CHECKED: "➖"}

_ADVICE = re.compile(
    r"(?:; |\. )(?:or )?((?:write|set|name|choose|lower|raise|rename|run|install|start|delete|leave|keep|make|add|use"
    r"|look|mend|log in|resume|give|divide|shard|let|map|move|download|copy|do one|did you mean)\b.*)$",
    re.IGNORECASE | re.DOTALL,
)
"""Where a message to the user goes over from what is wrong to what to write instead."""

NAMED_ABOVE = "what is named above."
"""What to change where a message does not say it apart from what is wrong: nothing is told twice."""


def split_advice(message: str) -> tuple[str, str]:
    """What is wrong, and what to change."""
    found = _ADVICE.search(message)
    if found is None:
        return message, NAMED_ABOVE
    advice = found[1]
    return f"{message[: found.start()].rstrip('.')}.", advice[0].upper() + advice[1:]


@dataclass(frozen=True)
class Change:
    """One thing to change."""

    check: str
    text: str
    needed: bool
    """Whether nothing can be trained without it."""


class Checkup:
    """Runs checks one after the other, prints a line for what each finds, and remembers what to change.

    Args:
        console: prints.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._told: set[str] = set()
        self.changes: list[Change] = []

    @property
    def passed(self) -> bool:
        """Whether nothing was found that a run would refuse."""
        return not any(change.needed for change in self.changes)

    def ok(self, text: str) -> None:
        """What is as it should be."""
        self._line(OK, text)

    def warn(self, message: str, change: str | None = None) -> None:
        """What does not keep a run from training.

        Args:
            message: what is wrong, and what to write instead if `change` does not say so.
            change: what to write instead.
        """
        what, advice = (message, change) if change else split_advice(message)
        self._line(WARNING, what)
        self.changes.append(Change(self._name, advice, needed=False))

    def refuse(self, message: str) -> None:
        """What a run would refuse: a line a sentence, with what to write instead. What was said is not repeated."""
        lines = [line for line in message.splitlines() if line.strip()]
        new = [line for line in lines if line not in self._told]
        for line in new:
            what, advice = split_advice(line)
            self._line(PROBLEM, what)
            self.changes.append(Change(self._name, advice, needed=True))
        if not new:
            self._line(NOT_CHECKED, "it needs what is named above.")
        self._told.update(new)

    def check(self, name: str, work: Callable[[], T], needs: bool = True) -> T | None:
        """Do one check; a request that a run would refuse becomes a line.

        Args:
            name: of what is checked.
            work: tells what it finds with `ok`, `warn` and `refuse`, or raises.
            needs: whether all that it needs has passed; else it is left out.

        Returns:
            What `work` returns; None where it was left out or refused.
        """
        self._name = name
        if not needs:
            self._line(NOT_CHECKED, "it needs what is named above.")
            return None
        try:
            return work()
        except (BadRequest, RunFailed) as error:
            self.refuse(str(error))
            return None

    def conclude(self, command: str) -> None:
        """Print what to change, or the command that starts the run.

        Args:
            command: of the run.
        """
        self._console.stage("What to change")
        changes = sorted(self.changes, key=lambda change: not change.needed)
        for number, change in enumerate(changes, start=1):
            optional = "" if change.needed else " (not needed to train)"
            self._console.print(f"{number}. {change.check}{optional}: {change.text}")
        if not changes:
            self._console.print("Nothing to change.")
        if self.passed:
            self._console.print(f"Start with: {command}")

    def _line(self, level: str, text: str) -> None:
        symbol = f"{_SYMBOLS[level]} " if self._console.emoji else ""
        self._console.print(f"{symbol}{level:<11} {self._name}: {text}")
