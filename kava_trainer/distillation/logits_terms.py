"""The terms on logits of one micro-batch: next tokens and the teacher's distribution, at some tokens alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch

from ..data.formats import IGNORED
from .chunked_loss import sum_in_chunks
from .losses import generalized_jsd_per_token, next_token_sum, smoothing_sum, token_sum

AGREEMENT = "agreement"
"""No term of a loss, but a figure that the logits of a divergence give beside it."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps last hidden states [..., d] to logits [..., vocabulary]."""


class LogitsTerms:
    """Sums the terms over some tokens of a batch; a model calls it within its forward pass, where its head is whole.

    Args:
        weights: of the terms to compute, `lm`, `smoothing`, `kd` and `answer`, in the total; numbers, or scalars on the
            device. Beside `kd` there may be `agreement`, how often both models have the same token at the top, whose
            weight is 0.
        positions: [K] among the flattened tokens of the batch, at which logits are needed.
        targets: the tokens that follow them [K], `IGNORED` where one carries no loss; those of all terms, or by term.
        vocabulary: number of the student's logits.
        temperature: of `kd`, see `generalized_jsd_per_token`.
        beta: of `kd`, likewise.
        teacher: for `kd`, the teacher's last states [B, T, d_t] and the head that makes logits of them without
            gradients.
    """

    def __init__(
        self,
        weights: Mapping[str, float | torch.Tensor],
        positions: torch.Tensor,
        targets: torch.Tensor | Mapping[str, torch.Tensor],
        vocabulary: int,
        temperature: float = 1.0,
        beta: float = 0.0,
        teacher: tuple[torch.Tensor, Head] | None = None,
    ) -> None:
        self._weights, self._positions, self._vocabulary = weights, positions, vocabulary
        by_term = dict.fromkeys(weights, targets) if isinstance(targets, torch.Tensor) else targets
        self._targets = torch.stack([by_term[name] for name in weights], dim=1)
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
        student, *teacher = (state.flatten(0, 1)[self._positions] for state in states)
        weights = _vector(list(self._weights.values()), last_state.device)
        rows = (student, self._targets, *teacher)
        total, sums = sum_in_chunks(partial(self._chunk, head), rows, weights, parameters, self._vocabulary)
        return total, dict(zip(self._weights, sums, strict=True))

    def _chunk(self, head: Head, states: torch.Tensor, targets: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        """The sums [n] of the terms over some tokens, whose `targets` are [K, n]."""
        logits = head(states)
        reference = [cast(tuple[torch.Tensor, Head], self._teacher)[1](own) for own in teacher]
        sums = zip(self._weights, targets.unbind(dim=1), strict=True)
        return torch.stack([self._sum(name, logits, own, *reference) for name, own in sums])

    def _sum(self, name: str, logits: torch.Tensor, targets: torch.Tensor, *reference: torch.Tensor) -> torch.Tensor:
        if name in ("kd", AGREEMENT):  # embeddings padded to a round number have a common first part
            size = min(logits.shape[-1], reference[0].shape[-1])
            both = logits[:, :size], reference[0][:, :size]
            compare = self._divergence if name == "kd" else _agreement
            return token_sum(compare(*both), targets != IGNORED)
        return smoothing_sum(logits, targets) if name == "smoothing" else next_token_sum(logits, targets)

    def _divergence(self, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Between both models' next tokens [n]."""
        return generalized_jsd_per_token(logits, reference, self._temperature, self._beta)


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
