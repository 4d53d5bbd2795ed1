"""`alignment_target` attention: to which tokens of its example each token attends, in mapped layers of both models.

The distributions are computed again from queries and keys, for some tokens of one example at a time, forward and
backward, so that no [T, T] of a whole layer is kept (the family of MiniLM, Wang et al., arXiv 2002.10957).
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ...models.attention.capture import AttentionPart, Feature
from .base import AlignedStates, Alignment, AlignmentTarget, Sides
from .rows import CHUNK_BYTES, centred_rows, example_parts, recomputed, row_correlations

PARTS = ("query", "key")

NOWHERE = -1e30
"""Logarithm of a probability that is none; an infinite one would have no gradient."""


class Heads(NamedTuple):
    """How one side attends in one layer."""

    queries: int
    """Heads of queries."""
    keys: int
    """Heads of keys, each of which as many queries share."""
    window: int | None = None
    """How many tokens back, itself included, a token attends; None for all."""


def log_attention(parts: torch.Tensor, heads: Heads, start: int, stop: int, merged: bool) -> torch.Tensor:
    """Logarithms of how the tokens `start` to `stop` of an example attend to the first `stop` tokens.

    Args:
        parts: scaled queries and keys [n, queries + keys, d], one below the other.
        heads: how many of each, and the window.
        start: first token.
        stop: first token after them.
        merged: give the mean distribution over all heads.

    Returns:
        Float32 [heads, c, stop], or [1, c, stop]; about `NOWHERE` where a token does not attend.
    """
    query, key = parts.float().transpose(0, 1).split([heads.queries, heads.keys])
    key = key[:, :stop].repeat_interleave(heads.queries // heads.keys, dim=0)
    scores = query[:, start:stop] @ key.transpose(1, 2)
    logs = scores.masked_fill(~_seen(start, stop, heads.window, parts.device), NOWHERE).log_softmax(dim=-1)
    return logs.logsumexp(dim=0, keepdim=True) - math.log(heads.queries) if merged else logs


def _seen(start: int, stop: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of the first `stop` tokens [c, stop] the tokens from `start` on attend to."""
    back = torch.arange(start, stop, device=device).unsqueeze(1) - torch.arange(stop, device=device)
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def attention_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    heads: tuple[Heads, Heads],
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher | student) of how each token of one example attends, in nats.

    Heads are compared one by one where both models have equally many, and a token counts as their mean; else the mean
    distributions over all heads are compared.

    Where a student's window is narrower than its teacher's, what lies beyond it is left out of the sum, so it is no
    whole KL and may fall below 0.

    Args:
        student: see `log_attention`.
        teacher: see `log_attention`.
        heads: of both.
        chunk_bytes: size of one tensor of distributions.

    Returns:
        The divergences, and Pearson's correlation of both distributions over all tokens but the first of the example,
        which takes what a head has no other use for; the latter without gradient. Float32 [n] each. The correlation is
        0 where a side attends to all tokens alike.
    """
    count = len(student)
    size = max(1, chunk_bytes // (4 * count * max(own.queries for own in heads)))
    with torch.autocast(student.device.type, enabled=False):  # else products of matrices would be in half precision
        ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
        parts = [recomputed(_divergence, student, teacher, heads, *at) for at in ranges]
    divergence, agreement = zip(*parts, strict=True)
    return torch.cat(divergence), torch.cat(agreement)


def _logs(
    student: torch.Tensor, teacher: torch.Tensor, heads: tuple[Heads, Heads], start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    merged = heads[0].queries != heads[1].queries
    return (
        log_attention(student, heads[0], start, stop, merged),
        log_attention(teacher, heads[1], start, stop, merged),
    )


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, heads: tuple[Heads, Heads], start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    own, due = _logs(student, teacher, heads, start, stop)
    # A student with a narrower window gives no probability to what lies beyond, which no training could change.
    seen = own > NOWHERE / 2
    divergence = (due.exp() * torch.where(seen, due - own, 0.0)).sum(dim=-1).mean(dim=0)
    return divergence, _correlations(own.detach().exp(), due.detach().exp(), start).mean(dim=0)


def _correlations(own: torch.Tensor, due: torch.Tensor, start: int) -> torch.Tensor:
    """Correlations [heads, c] of distributions [heads, c, stop], see `attention_divergence`."""
    keep = _seen(start, own.shape[-1], None, own.device).clone()
    keep[:, 0] = False
    scale = keep.sum(dim=-1, keepdim=True)  # to numbers around 1
    return row_correlations(own * scale, due * scale, keep.expand_as(own))


class AttentionTarget(AlignmentTarget):
    """Aligns to which tokens each token attends in mapped layers; there is nothing to train but the student.

    Layer k is the attention of block k. Its `cosine` is Pearson's correlation of both distributions over all tokens but
    the first, so a head that attends to everything alike, or to the first token alone, counts for nothing.

    Args:
        pairs: (student layer, teacher layer) pairs.
        heads: of each pair how student and teacher attend.
        weights: weight of each pair; equal by default. Only their proportions count.
    """

    name = "attention"
    terms = ("attention",)
    within_examples = True

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        heads: Sequence[tuple[Heads, Heads]],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(pairs, weights)
        self.heads = list(heads)

    @property
    def widths(self) -> str:
        """What both sides are, for people."""
        matched = all(own.queries == other.queries for own, other in self.heads)
        return f"attention {'head by head' if matched else 'as the mean of all heads'}"

    @property
    def student_features(self) -> list[Feature]:
        """Queries and keys of the student's layers."""
        return [AttentionPart(layer, part) for layer in self.student_layers for part in PARTS]

    @property
    def teacher_features(self) -> list[Feature]:
        """Queries and keys of the teacher's layers."""
        return [AttentionPart(layer, part) for layer in self.teacher_layers for part in PARTS]

    def most_dimensions(self, index: int) -> int:
        """One: the targets are the teacher's own, whose rank no projector can lower."""
        return 1

    def forward(
        self, student_states: Mapping[Feature, torch.Tensor], teacher_states: Mapping[Feature, torch.Tensor]
    ) -> list[AlignedStates]:
        """Queries and keys of each pair [B, T, queries + keys, d], one below the other."""
        return [
            AlignedStates(_below(student_states, student), _below(teacher_states, teacher))
            for student, teacher in self.pairs
        ]

    def align(
        self,
        pairs: list[AlignedStates],
        mask: torch.Tensor,
        names: Container[str],
        packed_lengths: Sequence[int] | None = None,
    ) -> list[Alignment]:
        """`attention_divergence` of each example, pair by pair of layers; its term is called `attention`.

        A token of `mask` may attend to any token of its example before it, whether that is of `mask` or not.
        """
        parts = example_parts(mask, packed_lengths)
        return [self._compare(pair, heads, mask, names, parts) for pair, heads in zip(pairs, self.heads, strict=True)]

    def _compare(
        self,
        pair: AlignedStates,
        heads: tuple[Heads, Heads],
        mask: torch.Tensor,
        names: Container[str],
        parts: list[tuple[int, slice]],
    ) -> Alignment:
        found = [attention_divergence(pair.student[at], pair.target[at], heads) for at in parts]
        values = (torch.cat(own).view(mask.shape) for own in zip(*found, strict=True))
        divergence, agreement = (torch.where(mask, own, 0.0) for own in values)
        return Alignment({"attention": divergence} if "attention" in names else {}, agreement)

    def sides(
        self,
        index: int,
        pair: AlignedStates,
        student_states: Mapping[Feature, torch.Tensor],
        teacher_states: Mapping[Feature, torch.Tensor],
        mask: torch.Tensor,
    ) -> Sides:
        """What the probe measures: the centred distributions [n, n] of each example and head, and the queries."""
        heads = self.heads[index]
        tensors = zip((pair.student, pair.target), heads, strict=True)
        student, teacher = (side[mask][:, : own.queries].float().flatten(1) for side, own in tensors)
        return Sides(self._distributions(pair, heads, mask), student, teacher, teacher)

    def _distributions(
        self, pair: AlignedStates, heads: tuple[Heads, Heads], mask: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row, real in enumerate(mask):
            student, teacher = pair.student[row, real], pair.target[row, real]
            sides = (logs.exp() for logs in _logs(student, teacher, heads, 0, len(student)))
            keep = _seen(0, len(student), None, mask.device).clone()
            keep[:, 0] = False
            scale = keep.sum(dim=-1, keepdim=True)
            own, due = (centred_rows(side * scale, keep.expand_as(side)) for side in sides)
            yield from zip(own, due, strict=True)


def _below(states: Mapping[Feature, torch.Tensor], layer: int) -> torch.Tensor:
    return torch.cat([states[AttentionPart(layer, part)] for part in PARTS], dim=2)
