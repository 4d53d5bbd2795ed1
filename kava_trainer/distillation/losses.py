"""The loss terms: pure functions of tensors and a mask that know no model.

All reductions are over unmasked tokens only and in float32. Every function takes `num_items`, the number of unmasked
tokens of the whole optimizer step (all micro-batches, all ranks); the sum over this batch is divided by it, so that
accumulated micro-batches add up to the mean over tokens. Without it the mean over this batch is taken. A batch
without any unmasked token gives 0 with zero gradients.
"""

import math

import torch
import torch.nn.functional as F

from ..data.formats import IGNORED

MINIMUM_NORM = 1e-6


def token_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of `values` [B, T] over the tokens where the boolean `mask` [B, T] is true."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def token_mean(values: torch.Tensor, mask: torch.Tensor, num_items: torch.Tensor | float | None = None) -> torch.Tensor:
    """Sum over unmasked tokens divided by `num_items`, by default the number of unmasked tokens here."""
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
    return token_sum(values, mask) / count.clamp(min=1)


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


def relative_mse_per_token(student: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared length of the difference of two vectors, as a share of the target's: float32 [B, T], 0 where masked.

    That is |s - t|^2 / |t|^2, with |t| clamped at 1e-6.

    Args:
        student: student states [B, T, d], any floating type.
        target: their targets [B, T, d].
        mask: boolean [B, T]; where it is false the states may hold anything, NaN included, and get no gradient.
    """
    keep = mask.unsqueeze(-1)
    difference = torch.where(keep, student.float() - target.float(), 0.0)
    size = torch.where(keep, target.float(), 0.0).square().sum(dim=-1).clamp(min=MINIMUM_NORM**2)
    return difference.square().sum(dim=-1) / size


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
    teacher_logits: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
    beta: float = 0.0,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Token mean of `generalized_jsd_per_token`.

    Args:
        student_logits: [B, T, vocabulary].
        teacher_logits: [B, T, vocabulary].
        mask: boolean [B, T], true where the divergence counts.
        temperature: see `generalized_jsd_per_token`.
        beta: see `generalized_jsd_per_token`.
        num_items: tokens of the whole optimizer step; see the module's docstring.

    Returns:
        A float32 scalar.
    """
    return token_mean(generalized_jsd_per_token(student_logits, teacher_logits, temperature, beta), mask, num_items)


def next_token_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies in nats of the next tokens, as a float32 scalar.

    Args:
        logits: [N, vocabulary].
        targets: the token that follows [N], `IGNORED` where it carries no loss.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def smoothing_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What label smoothing adds to `next_token_sum` for a share of 1: the cross-entropy against all tokens alike in
    place of that of the next one (Szegedy et al., arXiv 1512.00567, section 7), as a float32 scalar.

    Args:
        logits: [N, vocabulary].
        targets: the token that follows [N], `IGNORED` where it carries no loss.
    """
    logits = logits.float()
    own = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets != IGNORED, own - logits.mean(dim=-1), 0.0).sum()
