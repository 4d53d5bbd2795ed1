"""Which of several teachers a token learns from: all by fixed weights, or rather those that the student is close to.

The router has nothing to train: its shares are a softmax over how far the student agrees with each teacher already, as
a mixture of experts weighs its experts (Shazeer et al., arXiv 1701.06538), and they have no gradient.
"""

from collections.abc import Sequence

import torch


def shares_of_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The shares of so many teachers by their weights, which sum to 1; equal ones by default.

    Raises:
        ValueError: if there are no teachers, or not as many weights above 0.
    """
    given = [1.0] * count if weights is None else list(weights)
    if not given or len(given) != count or min(given) <= 0:
        raise ValueError(f"There are {count} teachers; give each a weight above 0, not {given}.")
    return [weight / sum(given) for weight in given]


def teacher_shares(
    weights: Sequence[float],
    agreements: Sequence[torch.Tensor] | None,
    temperature: float,
    masks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The share of each teacher in what each token learns: softmax(log weight + agreement / temperature).

    Args:
        weights: of the teachers [K], above 0.
        agreements: how far the student agrees with each teacher [K][...], from -1 to 1; None for the weights alone.
        temperature: the smaller, the more of a token goes to the teacher that it agrees with most.
        masks: where each teacher has something to teach, boolean [K][...]; everywhere by default.

    Returns:
        Float32 [K, ...] without a gradient, whose sum over the teachers is 1, or 0 where none has anything to teach.

    Raises:
        ValueError: if there is neither an agreement nor a mask, of which the shares would have their shape.
    """
    given = agreements if agreements is not None else masks
    if given is None:
        raise ValueError("Give the agreements, the masks, or both.")
    like = torch.stack([own.detach().float() for own in given])
    scores = torch.tensor(weights, device=like.device).log().view(-1, *[1] * (like.ndim - 1)).expand_as(like)
    if agreements is not None:
        scores = scores + like / temperature
    if masks is None:
        return scores.softmax(dim=0)
    known = torch.stack(list(masks))
    return torch.where(known, scores.masked_fill(~known, -torch.inf).softmax(dim=0), 0.0)


def routing_entropy(shares: torch.Tensor) -> torch.Tensor:
    """The entropy in nats of the teachers' shares [K, ...] at each token; from 0, one teacher, to log K, all alike."""
    return torch.special.entr(shares).sum(dim=0)
