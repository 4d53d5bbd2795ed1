"""Progress bars, and work that the ranks share out in batches under one of them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm

from .signals import WATCH

T = TypeVar("T")

_switch = {"shown": True}


def show_progress_bars(shown: bool) -> None:
    """Whether bars are shown from now on, where standard error is a terminal or a notebook."""
    _switch["shown"] = shown


def progress_bar(
    total: int | None, description: str, unit: str = "it", scaled: bool = False, initial: int = 0, leave: bool = False
) -> tqdm:
    """A bar on the main process's terminal.

    Args:
        total: how much there is to do on this rank; None where nobody knows.
        description: what is done.
        unit: what is counted.
        scaled: count in thousands and millions.
        initial: how much of it is done already.
        leave: keep the full bar on the screen.
    """
    wanted = _switch["shown"] and total != 0 and PartialState().is_main_process
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        leave=leave,
        disable=None if wanted else True,  # None: hidden but on a terminal and in a notebook
        dynamic_ncols=True,
    )


def with_progress(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    """The items, each counted on a `progress_bar` once it is done with."""
    with progress_bar(len(items), description, unit) as bar:
        for item in items:
            yield item
            bar.update()


def own_batches(items: Sequence[Any], size: int, description: str) -> Iterator[Any]:
    """This rank's share of the items, batch by batch.

    Args:
        items: the same on every rank.
        size: items of one batch.
        description: of the progress bar.

    Raises:
        Interrupted: on all ranks after the same number of batches, if any has got a signal.
    """
    state = PartialState()
    rounds = math.ceil(math.ceil(len(items) / state.num_processes) / size)
    with state.split_between_processes(items) as share, progress_bar(rounds, description, "batch") as bar:
        for start in range(0, rounds * size, size):
            WATCH.check()
            if start < len(share):
                yield share[start : start + size]
            bar.update()
