"""Ctrl-C, SIGTERM and SIGUSR1: where nothing can be lost they end the process, elsewhere they set a flag.

SIGTERM comes from SLURM, Kubernetes and reclaimed spot machines, SIGUSR1 is SLURM's early warning
(`sbatch --signal=USR1@120`). A process has one way to take a signal, so there is one `WATCH`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .distributed import largest_over_ranks
from .errors import Interrupted, exit_code

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_LAUNCHER_VARIABLES = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Set by `accelerate launch` and `torch.distributed.run`, which do not pass a SIGTERM of their own on."""


class SignalWatch:
    """Takes the signals between `__enter__` and the last `__exit__`, then gives the old handlers back.

    A signal raises `Interrupted` where it comes, or within `deferred` only sets the flag that `check` and `agree`
    read. A second signal to this process leaves at once; only the SIGTERM with which a launcher or a scheduler follows
    up its first signal is taken as the same request. What `agree` has learned from another rank counts as none:
    launchers signal one rank after the other.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._own: int | None = None
        self._entered = self._deferring = 0
        self._followed_up = False
        self._launcher: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalWatch":
        self._entered += 1
        if self._entered == 1:
            self.received, self._own, self._followed_up = None, None, False
            self._launcher = os.getppid() if _LAUNCHER_VARIABLES & os.environ.keys() else None
            if threading.current_thread() is threading.main_thread():  # Python takes signals in no other
                self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the `with` block a signal only sets the flag."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        launched = self._launcher is not None
        if self._own is None:
            self._own, self.received = number, self.received or number
            if not self._deferring:
                raise Interrupted(number)
        elif number == signal.SIGTERM and (launched or self._own != number) and not self._followed_up:
            self._followed_up = True
        else:
            os._exit(exit_code(number))

    @property
    def pending(self) -> int | None:
        """The signal that this process has got and not yet ended for, or None."""
        return self.received if self._entered else None

    def agree(self) -> int | None:
        """The signal that any rank has got, or None. Every rank must call it; a launcher that is gone is a SIGTERM."""
        if self._entered == 0:
            return None
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received = self.received or int(signal.SIGTERM)
        self.received = largest_over_ranks(self.received or 0) or None
        return self.received

    def check(self) -> None:
        """Raise `Interrupted` on every rank if any has got a signal. Every rank must call it."""
        if (number := self.agree()) is not None:
            raise Interrupted(number)


WATCH = SignalWatch()
"""The one of this process."""


def spare_worker(initialise: Any, worker: int) -> None:
    """Set up a data worker that a signal to the whole process group does not end before its trainer has saved.

    What else it starts with, given its number, is `initialise`, or None.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)  # the loader's last resort is a SIGTERM of its own
    if initialise is not None:
        initialise(worker)


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
