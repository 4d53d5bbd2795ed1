"""The terms on logits of one micro-batch: next tokens and the teacher's distribution, at the answers alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch

from ..data.formats import IGNORED
from .chunked_loss import sum_in_chunks
from .losses import generalized_jsd_per_token, next_token_sum, smoothing_sum, token_sum

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps last hidden states [..., d] to logits [..., vocabulary]."""


class LogitsTerms:
    """Sums the terms over the answers of a batch; a model calls it within its forward pass, where its head is whole.

    Args:
        weights: of the terms to compute, `lm`, `smoothing` and `kd`, in the total.
        answers: positions [K] among the flattened tokens of the batch that a next token is learned at.
        targets: these next tokens [K], `IGNORED` where one carries no loss.
        vocabulary: number of the student's logits.
        temperature: of `kd`, see `generalized_jsd_per_token`.
        beta: of `kd`, likewise.
        teacher: for `kd`, the teacher's last states [B, T, d_t] and the head that makes logits of them without
            gradients.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        answers: torch.Tensor,
        targets: torch.Tensor,
        vocabulary: int,
        temperature: float = 1.0,
        beta: float = 0.0,
        teacher: tuple[torch.Tensor, Head] | None = None,
    ) -> None:
        self._weights, self._answers, self._targets, self._vocabulary = weights, answers, targets, vocabulary
        self._temperature, self._beta, self._teacher = temperature, beta, teacher

    def __call__(
        self, head: Head, parameters: Sequence[torch.Tensor], last_state: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted total, which can be differentiated once, and the sum of each term, which cannot.

        Args:
            head: makes the student's logits.
            parameters: what of it is trained.
            last_state: of the student [B, T, d_s].
        """
        states = [last_state, *([] if self._teacher is None else self._teacher[:1])]
        answers, *teacher = (state.flatten(0, 1)[self._answers] for state in states)
        weights = torch.tensor(list(self._weights.values()), dtype=torch.float32).to(
            last_state.device, non_blocking=True
        )
        rows = (answers, self._targets, *teacher)
        total, sums = sum_in_chunks(partial(self._chunk, head), rows, weights, parameters, self._vocabulary)
        return total, dict(zip(self._weights, sums, strict=True))

    def _chunk(self, head: Head, states: torch.Tensor, targets: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        """The sums [n] of the terms over some answers."""
        logits = head(states)
        return torch.stack([self._sum(name, logits, targets, *teacher) for name in self._weights])

    def _sum(self, name: str, logits: torch.Tensor, targets: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        if name == "kd":
            return token_sum(self._divergence(logits, *teacher), targets != IGNORED)
        return next_token_sum(logits, targets) if name == "lm" else smoothing_sum(logits, targets)

    def _divergence(self, logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Between both models' next tokens [n]; embeddings padded to a round number have a common first part."""
        reference = cast(tuple[torch.Tensor, Head], self._teacher)[1](states)
        size = min(logits.shape[-1], reference.shape[-1])
        return generalized_jsd_per_token(logits[:, :size], reference[:, :size], self._temperature, self._beta)
