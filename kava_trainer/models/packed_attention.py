"""Attention over several examples that stand in one row without padding: it stays within each.

A packed row [1, T] holds examples one after another, with position ids that start again at each. Attention over the
whole row under a dense mask would grow with the square of T; here it runs example by example, so its cost is that of
the examples alone.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "kava_packed_sdpa"
"""Name of the attention that reads `packed_lengths`; without them it is `sdpa`."""

TOLERANCE, LOW_TOLERANCE = 1e-3, 0.05
"""Largest relative difference that counts as none; the second one is for fewer bits."""


def restarting_positions(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Position ids [1, T] of a packed row: 0, 1, 2, ... anew for each example."""
    return torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a packed row; `sdpa` itself where the row is not packed.

    Args:
        module: the attention layer.
        query: [1, heads, T, d].
        key: [1, key heads, T, d].
        value: [1, key heads, T, d].
        attention_mask: read only where nothing is packed.
        packed_lengths: tokens of each example; they sum to T.
        kwargs: as for every attention function of transformers: `scaling`, `dropout`, `sliding_window`, ...

    Returns:
        [1, T, heads, d], and None in place of attention weights.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    split = (states.split(list(packed_lengths), dim=2) for states in (query, key, value))
    parts: Iterable[tuple[torch.Tensor, ...]] = zip(*split, strict=True)
    window = kwargs.get("sliding_window")
    outputs = [
        sdpa_attention_forward(module, q, k, v, _band(q, window), is_causal=True, **kwargs)[0] for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def _band(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The mask [1, 1, T, T] of a sliding window; None where the example is no longer than the window."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return (causal & ~causal.tril(-window))[None, None]


AttentionInterface.register(PACKED_SDPA, packed_attention)

AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def enable_packing(model: PreTrainedModel) -> None:
    """Let a model that uses `sdpa` attend example by example. Other implementations separate examples themselves."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED_SDPA)


def disable_packing(model: PreTrainedModel) -> None:
    """Undo `enable_packing`."""
    if model.config._attn_implementation == PACKED_SDPA:
        model.set_attn_implementation("sdpa")


def packed_arguments(model: PreTrainedModel, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a decoder has to be called with, beside the tokens, to keep the examples of a row apart.

    Args:
        model: its attention implementation decides: ours reads `packed_lengths`, flash attention the cumulative
            lengths that transformers names so, and eager and flex attention the restarting position ids.
        lengths: tokens of each example.
        device: where the tokens are.
    """
    arguments: dict[str, Any] = {"position_ids": restarting_positions(lengths, device), "use_cache": False}
    implementation = model.config._attn_implementation
    if implementation == PACKED_SDPA:
        # A mask of four dimensions is passed on as it is, so none of T x T is built; `packed_attention` reads none.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return arguments | {"attention_mask": nothing, "packed_lengths": tuple(lengths)}
    if "flash" in implementation:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        arguments |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return arguments


@torch.no_grad()
def packing_problem(model: PreTrainedModel) -> str | None:
    """Why a model cannot read packed rows, tried out on two short examples; None where it can.

    An example must have the states it has alone, and must not notice which example stands before it.

    Args:
        model: it is left in the mode it came in. `enable_packing` comes first.
    """
    training, decoder = model.training, model.get_decoder()
    model.eval()
    size, device = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0], model.device
    first, other, second = (torch.arange(start, start + count) % size for start, count in ((2, 9), (31, 9), (57, 12)))

    def states(*examples: torch.Tensor) -> torch.Tensor:
        arguments = packed_arguments(model, [len(example) for example in examples], device)
        row = torch.cat(examples).unsqueeze(0).to(device)
        return decoder(input_ids=row, **arguments)[0][0, -len(second) :].float()

    problem: str | None = "its forward pass does not take what keeps packed examples apart"
    with suppress(TypeError):
        packed, beside_other = states(first, second), states(other, second)
        alone = decoder(input_ids=second.unsqueeze(0).to(device), use_cache=False)[0][0].float()
        # 8 bit picks its outliers over the whole row; else rows of equal shape are rounded equally, in any data type.
        in_8bit = getattr(model, "is_loaded_in_8bit", False)
        rounding = LOW_TOLERANCE if in_8bit or model.dtype != torch.float32 else TOLERANCE
        noticing = LOW_TOLERANCE if in_8bit else TOLERANCE
        apart = _difference(packed, alone) <= rounding and _difference(packed, beside_other) <= noticing
        problem = None if apart else "packed examples would see each other"
    model.train(training)
    return problem


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm().clamp(min=1e-12)).item()
