"""The ways a run ends badly, each with its exit code."""

import signal
from pickle import UnpicklingError

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


class BadRequest(Exception):
    """What was asked for cannot be done: a wrong argument, a missing path, data or models that do not fit.

    The message is one or more plain sentences for the user: what is wrong, where, and what to write instead.
    """

    exit_code = 2


class RunFailed(Exception):
    """The request was fine and the run went wrong. The message says what happened and what is left on disk."""

    exit_code = 1


class Interrupted(BaseException):
    """A signal has ended what was going on. No `except Exception` holds it up, as with `KeyboardInterrupt`.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
