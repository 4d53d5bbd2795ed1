"""Sums over tokens whose logits never exist all at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

CHUNK_BYTES = 2**26
"""Size of one float32 tensor of logits: 110 tokens of a vocabulary of 151,936."""


def sum_in_chunks(
    function: Callable[..., torch.Tensor],
    rows: tuple[torch.Tensor, ...],
    weights: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    vocabulary: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of `function` over chunks of rows, so that logits exist for one chunk at a time, forward and backward.

    The gradient of each chunk is computed as soon as its sums are, while its logits are there (the idea of fused
    linear losses, Hsu et al., Liger Kernel, arXiv 2410.10989), so nothing is kept or computed twice for the backward
    pass. Therefore only a sum with known weights can be differentiated.

    Args:
        function: maps a chunk of each of the rows to n sums over the chunk.
        rows: tensors [N, ...]; with N = 0 the function is called once, on nothing.
        weights: of the n sums in the total [n].
        parameters: what else `function` reads that a gradient is wanted of.
        vocabulary: logits of one row.
        chunk_bytes: a chunk has as many rows as make a float32 tensor of logits of this size; a divergence needs six
            to nine of those at once.

    Returns:
        The weighted total, which can be differentiated once, and the n sums, which cannot.
    """
    size = max(1, chunk_bytes // (4 * vocabulary))
    if torch.is_grad_enabled():
        return cast(Any, _ChunkedSum).apply(function, weights, size, len(rows), *rows, *parameters)
    sums = torch.stack([function(*chunk) for chunk in _chunks(rows, size)]).sum(dim=0)
    return (sums * weights).sum(), sums  # autocast would do a product of matrices in half precision


def _chunks(rows: Sequence[torch.Tensor], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(row.split(size) for row in rows), strict=True)


def _add_gradients(
    function: Callable[..., torch.Tensor],
    weights: torch.Tensor,
    chunk: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    into: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """The sums of one chunk. Their weighted gradient is added to `into`, where that of a tensor is wanted."""
    with torch.enable_grad():
        leaves = [row.detach().requires_grad_(own is not None) for row, own in zip(chunk, into, strict=False)]
        # Profilers that watch the gradients of a module's inputs cannot have leaves there while `grad` runs.
        sums = function(*(leaf.view_as(leaf) for leaf in leaves))
    wanted = [(tensor, own) for tensor, own in zip((*leaves, *parameters), into, strict=True) if own is not None]
    if wanted:
        found = torch.autograd.grad(sums, [tensor for tensor, _ in wanted], weights, allow_unused=True)
        for gradient, (_, own) in zip(found, wanted, strict=True):
            own.add_(0 if gradient is None else gradient)
    return sums.detach()


class _ChunkedSum(torch.autograd.Function):
    """Forward and gradient of `sum_in_chunks` in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., torch.Tensor],
        weights: torch.Tensor,
        size: int,
        count: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, parameters, wanted = tensors[:count], tensors[count:], ctx.needs_input_grad[4:]
        gradients = [torch.zeros_like(tensor) if want else None for tensor, want in zip(tensors, wanted, strict=True)]
        parts, start = [], 0
        for chunk in _chunks(rows, size):
            stop = start + len(chunk[0])
            into = [own if own is None or i >= count else own[start:stop] for i, own in enumerate(gradients)]
            parts.append(_add_gradients(function, weights, chunk, parameters, into))
            start = stop
        ctx.gradients = gradients
        sums = torch.stack(parts).sum(dim=0)
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Nothing but the engine may hold them afterwards: then it adds to a tied weight's gradient in place.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("The terms on logits can be differentiated only once; compute them again.")
        return None, None, None, None, *(own if own is None else own.mul_(total) for own in gradients)
