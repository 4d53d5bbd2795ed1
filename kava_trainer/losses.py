"""The loss terms: pure functions of tensors and a mask that know no model.

All reductions are over unmasked tokens only and in float32. Every function takes `num_items`, the number of unmasked
tokens of the whole optimizer step (all micro-batches, all ranks); the sum over this batch is divided by it, so that
accumulated micro-batches add up to the mean over tokens. Without it the mean over this batch is taken. A batch
without any unmasked token gives 0 with zero gradients.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MINIMUM_NORM = 1e-6

CHUNK_BYTES = 2**24
"""Size of one float32 tensor of logits in the divergence: 27 tokens of a vocabulary of 151,936."""

IGNORED = -100
"""Label of a token that carries no language-model loss."""


def token_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of `values` [B, T] over the tokens where the boolean `mask` [B, T] is true."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def _divisor(mask: torch.Tensor, num_items: torch.Tensor | float | None) -> torch.Tensor:
    """What a sum over tokens is divided by: `num_items`, by default the unmasked tokens here; never less than 1."""
    return (mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)).clamp(min=1)


def token_mean(values: torch.Tensor, mask: torch.Tensor, num_items: torch.Tensor | float | None = None) -> torch.Tensor:
    """Sum over unmasked tokens divided by `num_items`, by default the number of unmasked tokens here."""
    return token_sum(values, mask) / _divisor(mask, num_items)


def mercator_per_token(
    student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, alpha: float = 1.0, beta: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Mercator loss and the cosine, token by token.

    Args:
        student: student states [B, T, d], any floating type.
        target: projected teacher states [B, T, d].
        mask: boolean [B, T]; where it is false the states may hold anything, NaN included, and get no gradient.
        alpha: weight of the direction.
        beta: weight of the log-magnitude.

    Returns:
        Two float32 tensors [B, T]: alpha * (1 - cos(s, t)) + beta * (log|s| - log|t|)^2, and cos(s, t). Norms are
        clamped at 1e-6. Masked entries are those of two equal vectors.
    """
    keep = mask.unsqueeze(-1)
    filler = torch.ones((), dtype=torch.float32, device=student.device)
    student, target = torch.where(keep, student.float(), filler), torch.where(keep, target.float(), filler)
    student_norm = student.norm(dim=-1).clamp(min=MINIMUM_NORM)
    target_norm = target.norm(dim=-1).clamp(min=MINIMUM_NORM)
    cosine = (student * target).sum(dim=-1) / (student_norm * target_norm)
    magnitude = (student_norm.log() - target_norm.log()).square()
    return alpha * (1 - cosine) + beta * magnitude, cosine


def mercator_loss(
    student: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.01,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The Mercator loss: direction first, a little log-magnitude.

    L = mean_N[alpha * (1 - cos(s, t)) + beta * (log|s| - log|t|)^2], natural logarithm, norms clamped at 1e-6.

    Args:
        student: student states [B, T, d].
        target: projected teacher states [B, T, d].
        mask: boolean [B, T], true at real tokens.
        alpha: weight of the direction.
        beta: weight of the log-magnitude.
        num_items: unmasked tokens of the whole optimizer step; see the module's docstring.

    Returns:
        A float32 scalar.
    """
    per_token, _ = mercator_per_token(student, target, mask, alpha, beta)
    return token_mean(per_token, mask, num_items)


def mse_per_token(student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared difference of two vectors, averaged over their width: float32 [B, T], 0 where `mask` is false.

    Args:
        student: student states [B, T, d], any floating type.
        target: their targets [B, T, d].
        mask: boolean [B, T]; where it is false the states may hold anything, NaN included, and get no gradient.
    """
    difference = torch.where(mask.unsqueeze(-1), student.float() - target.float(), 0.0)
    return difference.square().mean(dim=-1)


def generalized_jsd_per_token(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 0.0
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of two next-token distributions, times the squared temperature.

    With teacher P, student Q and their mixture M = beta P + (1 - beta) Q it is beta KL(P|M) + (1 - beta) KL(Q|M)
    (GKD, arXiv 2306.13649, equation 1); the ends are the forward KL(P|Q) at 0 and the reverse KL(Q|P) at 1.

    Args:
        student_logits: [N, vocabulary].
        teacher_logits: [N, vocabulary].
        temperature: both logits are divided by it.
        beta: interpolation, from 0 to 1.

    Returns:
        Float32 [N], in nats times temperature squared, which keeps the gradient's size at any temperature.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    if beta == 0:
        divergence = _kl(teacher, student)
    elif beta == 1:
        divergence = _kl(student, teacher)
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        divergence = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return divergence * temperature**2


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL(left | right) of two tensors of log-probabilities, over the last dimension."""
    return F.kl_div(right, left, reduction="none", log_target=True).sum(dim=-1)


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
    temperature: float = 1.0,
    beta: float = 0.0,
    num_items: torch.Tensor | float | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Token mean of `generalized_jsd_per_token`, computed a chunk of tokens at a time, forward and backward.

    The teacher's logits and all float32 copies exist for one chunk only; the backward pass computes them again.
    Where the vocabularies differ in size, as embeddings padded to a round number do, the common first part counts.

    Args:
        student_logits: [B, K, vocabulary].
        teacher_states: the teacher's last hidden states [B, K, d_t] of the same positions.
        teacher_head: maps [n, d_t] to logits [n, vocabulary].
        mask: boolean [B, K], true where the divergence counts.
        temperature: see `generalized_jsd_per_token`.
        beta: see `generalized_jsd_per_token`.
        num_items: tokens of the whole optimizer step; see the module's docstring.
        chunk_size: tokens at a time; by default as many as make a float32 tensor of `CHUNK_BYTES`. The divergence
            needs six to nine of those at once.

    Returns:
        A float32 scalar.
    """
    chunk_size = chunk_size or max(1, CHUNK_BYTES // (4 * student_logits.shape[-1]))

    def chunk_sum(logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reference = teacher_head(states)
        size = min(logits.shape[-1], reference.shape[-1])
        return generalized_jsd_per_token(logits[..., :size], reference[..., :size], temperature, beta).sum()

    chunks = zip(student_logits[mask].split(chunk_size), teacher_states[mask].split(chunk_size), strict=True)
    sums = [checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum() / _divisor(mask, num_items)


def next_tokens(labels: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """The label that follows each position: `labels` [B, T] moved left by one, -100 at the end.

    Args:
        labels: [B, T], -100 where a token carries no loss.
        columns: positions [K] to keep; all of them by default.

    Returns:
        [B, T], or [B, K] with `columns`.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return following if columns is None else following[:, columns]


def next_token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in nats of the next token, over the positions that have a target.

    Args:
        logits: [B, K, vocabulary] at K positions.
        targets: [B, K] the token that follows each position, -100 where it carries no loss.
        num_items: number of targets of the whole optimizer step; see the module's docstring.
        label_smoothing: share of the probability spread evenly over the vocabulary.

    Returns:
        A float32 scalar.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / _divisor(targets != IGNORED, num_items)
