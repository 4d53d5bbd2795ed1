"""What can be wrong with a request, and the ways a run ends badly, each with its exit code."""

import signal
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TypeVar

from .redaction import without_secrets


def reason_of(error: BaseException) -> str:
    """An error in one line for a message, without secrets.

    That is its first line that says something; its kind where it is silent, and beside a text that is no sentence.
    """
    if isinstance(error, UnpicklingError):  # torch advises to load it all the same
        return "it does not hold tensors and plain values alone, and anything else could be code, which is never run"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (LookupError, TypeError, AttributeError)) or not line:
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return without_secrets(line)


def exit_code(number: int) -> int:
    """The exit code a shell expects of a program that a signal ended: 130, 143, 138 for SIGINT, SIGTERM, SIGUSR1."""
    return 128 + number


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it. As text it is both, in plain sentences."""

    argument: str | None
    """The name of the argument that is wrong; None where no single one is."""
    what: str
    """What is wrong and where, with the full stop or the semicolon that stands before the remedy."""
    remedy: str | None = None
    """What to write or do instead; None where `what` says all there is to say."""

    @classmethod
    def of_value(cls, argument: str, value: object, remedy: str) -> "Problem":
        """An argument whose value cannot be."""
        return cls(argument, f"{argument} is {value};", remedy)

    def __str__(self) -> str:
        return self.what if self.remedy is None else f"{self.what} {self.remedy}"


_E = TypeVar("_E", bound="WithProblems")


class WithProblems(Exception):
    """An exception that tells the user of one `Problem`, or `of` several, each on a line of its text."""

    def __init__(self, what: str, remedy: str | None = None, argument: str | None = None) -> None:
        self.problems = [Problem(argument, what, remedy)]
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls: type[_E], *problems: Problem) -> _E:
        """The exception that tells of all of these."""
        error = cls("\n".join(map(str, problems)))
        error.problems = [*problems]
        return error


class BadRequest(WithProblems):
    """What was asked for cannot be done: a wrong argument, a missing path, data or models that do not fit.

    The message is one or more plain sentences for the user: what is wrong, where, and what to write instead.
    """

    exit_code = 2


class RunFailed(WithProblems):
    """The request was fine and the run went wrong. The message says what happened and what is left on disk."""

    exit_code = 1


class WrongArguments(WithProblems, ValueError):
    """Arguments that a run could not have been given; `BadRequest` on the command line."""


def problems_of(error: BaseException) -> list[Problem]:
    """The problems that an exception tells of; of any other kind of exception each line of its text is one."""
    if isinstance(error, WithProblems):
        return error.problems
    return [Problem(None, line) for line in str(error).splitlines()]


class Interrupted(BaseException):
    """The signal `number` has ended what was going on. No `except Exception` holds it up, like `KeyboardInterrupt`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
