"""What checks find, a line each, and what to change for it in the end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from ...utils.console import Console
from ...utils.errors import BadRequest, Problem, RunFailed

T = TypeVar("T")

OK, WARNING, PROBLEM, NOT_CHECKED = "OK", "Warning", "Problem", "Not checked"

_SYMBOLS = {OK: "✅", WARNING: "⚠️", PROBLEM: "❌", NOT_CHECKED: "➖"}

NAMED_ABOVE = "what is named above."
"""What to change where a message does not say it apart from what is wrong: nothing is told twice."""


def what_and_change(problem: Problem) -> tuple[str, str]:
    """What is wrong, and what to change, each as a sentence of its own."""
    if problem.remedy is None:
        return problem.what, NAMED_ABOVE
    change = problem.remedy.removeprefix("Or ")
    return f"{problem.what.rstrip('.;')}.", change[0].upper() + change[1:]


@dataclass(frozen=True)
class Change:
    """One thing to change."""

    check: str
    text: str
    needed: bool
    """Whether nothing can be trained without it."""


def _without_repetitions(changes: Iterable[Change]) -> list[Change]:
    """The changes, what is needed first; one that several checks ask for stands there once, with all their names."""
    found: dict[str, Change] = {}
    for change in sorted(changes, key=lambda change: not change.needed):
        key = f"{change.check}: {change.text}" if change.text == NAMED_ABOVE else change.text
        first = found.setdefault(key, change)
        if change.check not in first.check.split(", "):
            found[key] = replace(first, check=f"{first.check}, {change.check}")
    return list(found.values())


class Checkup:
    """Runs checks one after the other, prints a line for what each finds, and remembers what to change.

    Args:
        console: prints.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._told: set[Problem] = set()
        self.changes: list[Change] = []

    @property
    def passed(self) -> bool:
        """Whether nothing was found that a run would refuse."""
        return not any(change.needed for change in self.changes)

    def ok(self, text: str) -> None:
        """What is as it should be."""
        self._line(OK, text)

    def show(self, lines: Iterable[str]) -> None:
        """Text that belongs to the line before it."""
        for line in lines:
            self._console.print(f"    {line}")

    def warn(self, what: str, change: str) -> None:
        """What does not keep a run from training.

        Args:
            what: is wrong.
            change: what to write instead.
        """
        self.warn_of(Problem(None, what, change))

    def warn_of(self, problem: Problem) -> None:
        """A problem that does not keep a run from training."""
        self._tell(WARNING, problem)

    def refuse(self, problems: Iterable[Problem]) -> None:
        """What a run would refuse: a line a problem, with what to write instead. What was said is not repeated."""
        new = [problem for problem in problems if problem.what.strip() and problem not in self._told]
        for problem in new:
            self._tell(PROBLEM, problem)
        if not new:
            self._line(NOT_CHECKED, "it needs what is named above.")
        self._told.update(new)

    def check(self, name: str, work: Callable[..., T], *needs: object) -> T | None:
        """Do one check; a request that a run would refuse becomes a line.

        Args:
            name: of what is checked.
            work: tells what it finds with `ok`, `warn` and `refuse`, or raises.
            needs: what other checks gave and this one takes; where one of them gave None it is left out.

        Returns:
            What `work` returns; None where it was left out or refused.
        """
        self._name = name
        if any(need is None for need in needs):
            self._line(NOT_CHECKED, "it needs what is named above.")
            return None
        try:
            return work(*needs)
        except (BadRequest, RunFailed) as error:
            self.refuse(error.problems)
            return None

    def conclude(self, command: str) -> None:
        """Print what to change, or the command that starts the run.

        Args:
            command: of the run.
        """
        self._console.stage("What to change")
        changes = _without_repetitions(self.changes)
        for number, change in enumerate(changes, start=1):
            optional = "" if change.needed else " (not needed to train)"
            self._console.print(f"{number}. {change.check}{optional}: {change.text}")
        if not changes:
            self._console.print("Nothing to change.")
        if self.passed:
            self._console.print(f"Start with: {command}")

    def _tell(self, level: str, problem: Problem) -> None:
        what, change = what_and_change(problem)
        self._line(level, what)
        self.changes.append(Change(self._name, change, needed=level == PROBLEM))

    def _line(self, level: str, text: str) -> None:
        symbol = f"{_SYMBOLS[level]} " if self._console.emoji else ""
        self._console.print(f"{symbol}{level:<11} {self._name}: {text}")
