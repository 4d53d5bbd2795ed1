"""Rows of n numbers for each of n tokens, which exist for some tokens of one example at a time."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**26
"""Size of one float32 tensor of such rows; a computation needs some six of those at once."""

LEAST_SPREAD = 1e-4
"""Numbers around 1 whose standard deviation is below it are all one: rounding leaves as much."""


def example_parts(mask: torch.Tensor, packed_lengths: Sequence[int] | None) -> list[tuple[int, slice]]:
    """Where the examples of a batch are: the row and the positions of each.

    Args:
        mask: [B, T].
        packed_lengths: tokens of each example of a packed row [1, T]; else an example is a row.
    """
    if packed_lengths is None:
        return [(row, slice(0, mask.shape[1])) for row in range(len(mask))]
    ends = list(accumulate(packed_lengths))
    return [(0, slice(end - length, end)) for length, end in zip(packed_lengths, ends, strict=True)]


def recomputed(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], student: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function gives of the student's side and others; in the backward pass its rows are computed again."""
    if torch.is_grad_enabled() and student.requires_grad:
        return checkpoint(function, student, *others, use_reentrant=False, preserve_rng_state=False)
    return function(student, *others)


def centred_rows(rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rows [c, n] less their means over where `keep` [c, n] is true, 0 elsewhere and where they are constant.

    Args:
        rows: finite numbers.
        keep: boolean.
    """
    count = keep.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = torch.where(keep, rows - (rows * keep).sum(dim=-1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return torch.where(spread > LEAST_SPREAD, centred, 0.0)


def row_correlations(own: torch.Tensor, due: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two rows [c, n] over where `keep` [c, n] is true: [c], 0 where one is constant."""
    return F.cosine_similarity(centred_rows(own, keep), centred_rows(due, keep), dim=-1)
