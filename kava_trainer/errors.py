"""The two ways a run ends badly, each with its exit code."""


def reason_of(error: BaseException) -> str:
    """An error in one line for a message: its first line that says something, or its kind where it is silent."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class BadRequest(Exception):
    """What was asked for cannot be done: a wrong argument, a missing path, data or models that do not fit.

    The message is one or more plain sentences for the user: what is wrong, where, and what to write instead.
    """

    exit_code = 2


class RunFailed(Exception):
    """The request was fine and the run went wrong. The message says what happened and what is left on disk."""

    exit_code = 1
