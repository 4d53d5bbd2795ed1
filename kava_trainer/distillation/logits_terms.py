"""The terms on logits of one micro-batch: next tokens and the teacher's distribution, at some tokens alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial, reduce
from typing import Any, NamedTuple, cast

import torch

from ..data.formats import IGNORED
from .chunked_loss import sum_in_chunks
from .losses import generalized_jsd_per_token, next_token_sum, smoothing_sum, token_sum
from .teachers.routing import routing_entropy, teacher_shares

AGREEMENT, KD_ROUTING = FIGURES = ("agreement", "kd_routing_entropy")
"""No terms of a loss, but figures that the logits of a divergence give beside it."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps last hidden states [..., d] to logits [..., vocabulary]."""


class TeacherLogits(NamedTuple):
    """What a teacher's logits are made of."""

    states: torch.Tensor
    """Its last states [B, T, d_t]."""
    head: Head
    """Makes logits of them, without gradients."""
    share: float = 1.0
    """Of the teacher in the divergence."""
    whole_head: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the context in which the ranks may call `head` different numbers of times."""


class LogitsTerms:
    """Sums the terms over some tokens of a batch; a model calls it within its forward pass, where its head is whole.

    Args:
        weights: of the terms to compute, `lm`, `smoothing`, `kd` and `answer`, in the total; numbers, or scalars on the
            device. Beside `kd` there may be those of `FIGURES`, whose weight is 0: `agreement`, how often both models
            have the same token at the top, and `kd_routing_entropy`, how evenly several teachers share a token.
        positions: [K] among the flattened tokens of the batch, at which logits are needed.
        targets: the tokens that follow them [K], `IGNORED` where one carries no loss; those of all terms, or by term.
        vocabulary: number of the student's logits.
        temperature: of `kd`, see `generalized_jsd_per_token`.
        beta: of `kd`, likewise.
        teachers: for `kd`; the divergence is the sum of those from each of them, times its share.
        routing: the temperature of `teacher_shares`, where these and not the shares alone weigh the teachers at each
            token; a student agrees with a teacher by how far their distributions overlap, from 0 to 1.
    """

    def __init__(
        self,
        weights: Mapping[str, float | torch.Tensor],
        positions: torch.Tensor,
        targets: torch.Tensor | Mapping[str, torch.Tensor],
        vocabulary: int,
        temperature: float = 1.0,
        beta: float = 0.0,
        teachers: Sequence[TeacherLogits] = (),
        routing: float | None = None,
    ) -> None:
        self._weights, self._positions, self._vocabulary = weights, positions, vocabulary
        by_term = dict.fromkeys(weights, targets) if isinstance(targets, torch.Tensor) else targets
        self._targets = torch.stack([by_term[name] for name in weights], dim=1)
        self._temperature, self._beta, self._teachers, self._routing = temperature, beta, list(teachers), routing

    def __call__(
        self, head: Head, parameters: Sequence[torch.Tensor], last_state: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted total, which can be differentiated once, and the sum of each term, which cannot.

        Args:
            head: makes the student's logits.
            parameters: what of it is trained.
            last_state: of the student [B, T, d_s].
        """
        states = [last_state, *(teacher.states for teacher in self._teachers)]
        student, *teacher = (state.flatten(0, 1)[self._positions] for state in states)
        weights = _vector(list(self._weights.values()), last_state.device)
        rows = (student, self._targets, *teacher)
        size = self._vocabulary * max(1, len(self._teachers))
        with ExitStack() as whole:
            for own in self._teachers:
                whole.enter_context(own.whole_head())
            total, sums = sum_in_chunks(partial(self._chunk, head), rows, weights, parameters, size)
        return total, dict(zip(self._weights, sums, strict=True))

    def _chunk(self, head: Head, states: torch.Tensor, targets: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        """The sums [n] of the terms over some tokens, whose `targets` are [K, n]."""
        logits = head(states)
        references = [own.head(given) for own, given in zip(self._teachers, teacher, strict=True)]
        shares = self._shares(logits, references)
        sums = zip(self._weights, targets.unbind(dim=1), strict=True)
        return torch.stack([self._sum(name, logits, own, references, shares) for name, own in sums])

    def _shares(self, logits: torch.Tensor, references: list[torch.Tensor]) -> Sequence[float] | torch.Tensor:
        """The share of each teacher, at every token or at each [K, n]."""
        weights = [teacher.share for teacher in self._teachers]
        if self._routing is None or not references:
            return weights
        with torch.no_grad():
            agreements = [_overlap(*_common(logits, reference), self._temperature) for reference in references]
        return teacher_shares(weights, agreements, self._routing)

    def _sum(
        self,
        name: str,
        logits: torch.Tensor,
        targets: torch.Tensor,
        references: list[torch.Tensor],
        shares: Sequence[float] | torch.Tensor,
    ) -> torch.Tensor:
        if name == KD_ROUTING:
            return token_sum(routing_entropy(cast(torch.Tensor, shares)), targets != IGNORED)
        if name in ("kd", AGREEMENT):
            compare = self._divergence if name == "kd" else _agreement
            found = (share * compare(*_common(logits, own)) for share, own in zip(shares, references, strict=True))
            return token_sum(reduce(torch.add, found), targets != IGNORED)
        return smoothing_sum(logits, targets) if name == "smoothing" else next_token_sum(logits, targets)

    def _divergence(self, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Between both models' next tokens [n]."""
        return generalized_jsd_per_token(logits, reference, self._temperature, self._beta)


def _common(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the tokens that both have: embeddings padded to a round number have a common first part."""
    size = min(logits.shape[-1], reference.shape[-1])
    return logits[:, :size], reference[:, :size]


def _overlap(logits: torch.Tensor, reference: torch.Tensor, temperature: float) -> torch.Tensor:
    """What both distributions have in common [n]: 1 less the total variation between them."""
    own, other = ((given.float() / temperature).softmax(dim=-1) for given in (logits, reference))
    return torch.minimum(own, other).sum(dim=-1)


def _agreement(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """1 where both models have the same token at the top [n], else 0."""
    return (logits.argmax(dim=-1) == reference.argmax(dim=-1)).float()


def _vector(numbers: list[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Numbers, some of which may be scalars on the device already, as one float32 tensor there, without waiting."""
    if not any(isinstance(number, torch.Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
    return torch.stack(
        [torch.as_tensor(number, dtype=torch.float32).to(device, non_blocking=True) for number in numbers]
    )
