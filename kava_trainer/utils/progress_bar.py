"""What is being done, at every moment: bars whose clocks tick, lines where no bars are shown, and work that the ranks
share out in batches under one of them.

A thread beats once a second while there is such work. A bar that does not move for a while still shows that time
passes; what has no bar is told of in a line once it takes long, and from then on now and then.
"""

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm

from .console import Console
from .signals import WATCH

T = TypeVar("T")

BEAT = 1.0
"""Seconds from one beat to the next."""

PATIENCE = 2.0
"""Work without a bar is told of once it has taken so many seconds."""

LINE_EVERY, LINE_SHARE = 60.0, 0.1
"""Work without a bar is told of again after so many seconds, or after this share of the time it has taken."""

NO_TOTAL = "{desc} [{elapsed}]"
STEPS = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
"""How bars look that count no tokens or examples: of work in one piece, and of a few passes."""

_switch = {"shown": True}
_told: set[str] = set()
_under = {"lines": 0}


class Progress(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar of `progress_bar`. One that is hidden counts too, and lines tell of it."""

    _pulse: "_Pulse | None" = None

    def begin(self, pulse: "_Pulse", description: str, unit: str, told: bool) -> None:
        """Have a pulse look after it; `told` where a line has said already that it begins."""
        self._description, self._began = description, time.monotonic()  # tqdm keeps nothing of a bar that is hidden
        self._units = f"{unit}es" if unit.endswith(("s", "ch")) else f"{unit}s"
        self._line_at = self._began if told else None
        self._pulse = pulse
        pulse.add(self)

    def update(self, n: float | None = 1) -> bool | None:
        """Count, on the screen or not."""
        if self.disable:
            self.n += n or 0
            return None
        return super().update(n)

    def note(self, text: str) -> None:
        """What stands behind the bar from its next move or beat on."""
        self.set_postfix_str(text, refresh=False)

    def lines_begin_anew(self) -> None:
        """Something else has just told how far it is."""
        self._line_at = time.monotonic()

    def close(self) -> None:
        """Take it off the screen, and out of the beat."""
        if self._pulse is not None:
            self._pulse.forget(self)
            self._pulse = None
        super().close()

    def beat(self, now: float) -> None:
        """Let the clock of a bar go on, or tell of what has none, at a time of `time.monotonic`."""
        if not self.disable:
            with self.get_lock():
                if not self.disable:  # else it was closed a moment ago, and would stay on the screen
                    self.refresh(nolock=True)
        elif self._pulse is not None and (line := self._line(now)) is not None:
            self._line_at = now
            Console().print(line)

    def _line(self, now: float) -> str | None:
        """The line that is due, if one is."""
        taken = now - self._began
        if self._line_at is None:
            return f"{self._description} ..." if taken >= PATIENCE else None
        if now - self._line_at < max(LINE_EVERY, LINE_SHARE * taken):
            return None
        if self.total is None:
            count = f"{self.n} {self._units}, " if self.n else ""
        else:
            count = f"{self.n} of {self.total} {self._units}, "
        return f"{self._description}: {count}{tqdm.format_interval(taken)} so far"


class _Pulse:
    """The thread that beats: it begins with the first bar, and ends at once when the last one is gone."""

    def __init__(self) -> None:
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._bars: weakref.WeakSet[Progress] = weakref.WeakSet()
        self._running = False

    def add(self, bar: Progress) -> None:
        with self._lock:
            self._bars.add(bar)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="progress", daemon=True).start()

    def forget(self, bar: Progress) -> None:
        with self._lock:
            self._bars.discard(bar)
            if not self._bars:
                self._wake.set()

    def beat(self, now: float) -> bool:
        """One beat; whether there will be another."""
        with self._lock:
            bars = list(self._bars)
            self._running = bool(bars)
            self._wake.clear()
        for bar in bars:
            bar.beat(now)
        return bool(bars)

    def _run(self) -> None:
        going = True
        while going:
            self._wake.wait(BEAT)
            going = self.beat(time.monotonic())


def _new_pulse() -> None:
    """A process that was forked has no such thread, and may have taken over a lock that is never released."""
    global _PULSE
    _PULSE = _Pulse()


_PULSE = _Pulse()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_pulse)


def show_progress_bars(shown: bool) -> None:
    """Whether bars are shown from now on, where standard error is a terminal or a notebook; else lines are."""
    _switch["shown"] = shown
    _told.clear()


def _are_shown() -> bool:
    """Whether this process may show bars, and standard error can."""
    if not _switch["shown"]:
        return False
    with tqdm(disable=None, delay=math.inf) as never_seen:
        return not never_seen.disable


def progress_bar(
    total: int | None,
    description: str,
    unit: str = "it",
    scaled: bool = False,
    initial: int = 0,
    leave: bool = False,
    form: str | None = None,
    told: bool = False,
) -> Progress:
    """A bar on the main process's terminal; where none is shown, lines tell of what takes long.

    Args:
        total: how much there is to do on this rank; None where nobody knows.
        description: what is done.
        unit: what is counted.
        scaled: count in thousands and millions.
        initial: how much of it is done already.
        leave: keep the full bar on the screen.
        form: how it looks, as `bar_format` of tqdm.
        told: whether a line has just said that it begins.
    """
    main = total != 0 and PartialState().is_main_process
    bar = Progress(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        leave=leave,
        disable=None if main and _switch["shown"] else True,  # None: hidden but on a terminal and in a notebook
        dynamic_ncols=True,
        bar_format=form,
    )
    if main:
        bar.begin(_PULSE, description, unit, told or _under["lines"] > 0)
    return bar


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that the `with` block is at work, which is of one piece."""
    with progress_bar(None, description, form=NO_TOTAL):
        yield


@contextmanager
def told(line: str, once: bool = False) -> Iterator[None]:
    """Where no bars are shown, say that the `with` block begins; its own bars are then told of only if they take long.

    Args:
        line: what is done.
        once: say it only the first time.
    """
    if _are_shown() or (once and line in _told):
        yield
        return
    Console().print(f"{line} ...")
    _told.add(line)
    _under["lines"] += 1
    try:
        yield
    finally:
        _under["lines"] -= 1


def with_progress(items: Sequence[T], description: str, unit: str, form: str | None = None) -> Iterator[T]:
    """The items, each counted on a `progress_bar` once it is done with."""
    with progress_bar(len(items), description, unit, form=form) as bar:
        for item in items:
            yield item
            bar.update()


class SharedBatches:
    """This rank's batches of `own_batches`, under a bar."""

    def __init__(
        self, items: Sequence[Any], size: int, description: str, in_step: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._items, self._size, self._description, self._in_step = items, size, description, in_step
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        """What stands behind the bar: how far the batch is that is being worked on."""
        if self._bar is not None:
            self._bar.note(text)

    def __iter__(self) -> Iterator[Any]:
        state, size = PartialState(), self._size
        rounds = math.ceil(math.ceil(len(self._items) / state.num_processes) / size)
        bar = progress_bar(rounds, self._description, "batch")
        with state.split_between_processes(self._items) as share, bar as self._bar:
            for start in range(0, rounds * size, size):
                WATCH.check()
                with self._in_step():
                    if start < len(share):
                        yield share[start : start + size]
                bar.update()


def own_batches(
    items: Sequence[Any],
    size: int,
    description: str,
    in_step: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> SharedBatches:
    """This rank's share of the items, batch by batch.

    Args:
        items: the same on every rank.
        size: items of one batch.
        description: of the progress bar.
        in_step: makes the context that each batch is worked on in, and a rank that has none waits in: of
            `distributed.in_step` where a sharded model reads them.

    Raises:
        Interrupted: on all ranks after the same number of batches, if any has got a signal.
    """
    return SharedBatches(items, size, description, in_step)
