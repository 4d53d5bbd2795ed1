"""Talking to the hub: in time, without harm to a run, and with a reason where it fails."""

import json
import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import DEFAULT_REVISION, HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import BadRequest, reason_of
from .signals import WATCH

ANSWER_SECONDS, CHECKPOINT_SECONDS = 60, 600
"""How long the hub may take: to answer a question, and to take the last checkpoints at the end of the training. Its
client waits for ever."""

_THREAD = "kava-hub"

_LOOK_SECONDS = 0.2
"""So often is looked whether a signal wants the process to end."""

# In the background its client does not log each of its attempts: the outcome is told in the end.
logging.getLogger("huggingface_hub.utils._http").addFilter(lambda record: record.threadName != _THREAD)

_STATUS_WORDS = {
    401: "the token is missing or not accepted",
    403: "the token may not write there",
    404: "there is no such repository or branch",
    409: "something else was changing there at the same time",
    412: "something else was changing there at the same time",
    413: "it is too large",
    429: "there were too many requests",
    507: "no space is left there",
}


def hub_reason(error: BaseException) -> str:
    """Why the hub did not do what it was asked, in one line without secrets."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # its client's, around what went wrong
        return hub_reason(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        unreadable = isinstance(error, json.JSONDecodeError)
        return "its answer was not what a hub answers" if unreadable else reason_of(error).rstrip(".")
    words = _STATUS_WORDS.get(status, "the hub itself failed" if status >= 500 else "the hub refused it")
    return f"{words}, HTTP {status}"


@dataclass(frozen=True)
class Place:
    """Where on the hub a student goes."""

    repo_id: str
    token: str | None = None
    """None for that of `HF_TOKEN` or `hf auth login`."""
    private: bool | None = None
    revision: str | None = None
    """A branch; the main one by default."""


def push_command(output_dir: str | Path, place: Place) -> str:
    """The command that sends the student of a finished run; the token has to come from the environment or a login."""
    words = ["python", "-m", "kava_trainer", "push", str(output_dir), place.repo_id]
    words += ["--private"] if place.private else []
    return shlex.join([*words, *(["--revision", place.revision] if place.revision else [])])


def make_branch(place: Place) -> None:
    """Make the branch that is asked for, from the main one, where it is missing; `refs/...` are never made."""
    if place.revision and place.revision != DEFAULT_REVISION and not place.revision.startswith("refs/"):
        HfApi(token=place.token).create_branch(place.repo_id, branch=place.revision, exist_ok=True)


def check_private(place: Place) -> None:
    """Raise `BadRequest` if a private repository is wanted and a public one was there already."""
    if place.private and HfApi(token=place.token).model_info(place.repo_id).private is False:
        raise BadRequest(
            f"{place.repo_id} is there already and public.", "Make it private in its settings, or choose another."
        )


def in_background(work: Callable[[], Any], after: Iterable[Future[Any]] = ()) -> Future[Any]:
    """Do work on a thread of its own, once other jobs are done.

    The thread does not keep the program from ending, as that of an executor would: the hub may never answer.
    """
    job: Future[Any] = Future()

    def run() -> None:
        wait(after)
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)

    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    return job


def in_time(work: Callable[[], Any], seconds: float) -> Any:
    """The result of work that asks the hub.

    Raises:
        TimeoutError: where it takes longer.
        InterruptedError: where a signal wants the process to end meanwhile.
        Exception: whatever `work` raises.
    """
    job, end = in_background(work), time.monotonic() + seconds
    while not wait([job], timeout=max(0.0, min(_LOOK_SECONDS, end - time.monotonic()))).done:
        if WATCH.pending is not None:
            raise InterruptedError("a signal ended it")
        if time.monotonic() >= end:
            raise TimeoutError(f"the hub has not answered within {seconds:g} seconds")
    return job.result()


def show_bars(shown: bool) -> bool:
    """Turn the bars of the hub's client on or off, where the environment leaves that open; whether they were on."""
    were_on = not are_progress_bars_disabled()
    if HF_HUB_DISABLE_PROGRESS_BARS is None and were_on != shown:
        (enable_progress_bars if shown else disable_progress_bars)()
    return were_on
