"""Work that the ranks share out, in batches, under one progress bar."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from .signals import WATCH


def progress_bar(total: int | None, description: str, unit: str = "it", scaled: bool = False) -> tqdm:
    """A bar on the main process's terminal that is gone when it is full."""
    hidden = None if PartialState().is_main_process else True
    return tqdm(total=total, desc=description, unit=unit, unit_scale=scaled, leave=False, disable=hidden)


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
    with state.split_between_processes(items) as share, progress_bar(rounds, description) as bar:
        for start in range(0, rounds * size, size):
            WATCH.check()
            if start < len(share):
                yield share[start : start + size]
            bar.update()
