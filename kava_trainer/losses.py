"""The loss terms: pure functions of tensors and a mask that know no model.

All reductions are over unmasked tokens only and in float32. Every function takes `num_items`, the number of unmasked
tokens of the whole optimizer step (all micro-batches, all ranks); the sum over this batch is divided by it, so that
accumulated micro-batches add up to the mean over tokens. Without it the mean over this batch is taken. A batch
without any unmasked token gives 0 with zero gradients.
"""

import torch
import torch.nn.functional as F

MINIMUM_NORM = 1e-6

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
