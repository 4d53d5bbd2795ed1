"""Attention over several examples that stand in one row without padding: it stays within each.

A packed row [1, T] holds examples one after another, with position ids that start again at each. Attention over the
whole row under a dense mask would grow with the square of T; here it runs example by example, so its cost is that of
the examples alone.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..utils.errors import reason_of
from .attention.recorders import is_recorded, recorders_of
from .layers import context_length, decoder_pass, evaluating, find_decoder, made_up_tokens, number_of_layers, truncated

PACKED_SDPA = "kava_packed_sdpa"
"""Name of the attention that reads `packed_lengths`; without them it is `sdpa`."""

TOLERANCE, LOW_TOLERANCE = 1e-3, 0.05
"""Largest relative difference from an example alone that counts as none; the second one is for fewer bits."""

NOTICED, LOW_NOTICED = 1e-5, 1e-4
"""The same between two rows of equal shape, in which nothing is rounded otherwise: a small state space tells little."""

LENGTH, LONGEST_WINDOW = 12, 4096
"""Tokens that are compared; the widest window whose end is tried out, since attention takes its square."""

MOST_PRODUCTS = 2.5e11
"""As many a CPU is asked for to try out the end of a window; two passes take some twenty seconds on two cores."""


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
    for record in recorders_of(module):
        record(query, key, value, {**kwargs, "attention_mask": attention_mask})
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
    """Undo `enable_packing`, unless somebody records the model's attention."""
    if model.config._attn_implementation == PACKED_SDPA and not is_recorded(model):
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


def _reach(model: PreTrainedModel) -> int:
    """The widest window of a model's attention that is narrower than what it reads; 0 where it has none."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return 0
    named = ((name, value) for name, value in config.to_dict().items() if "layers" not in name)
    windows = [value for name, value in named if "window" in name or name == "attention_chunk_size"]
    limit = context_length(model) or math.inf
    return max((width for width in windows if type(width) is int and 0 < width < limit), default=0)


def packing_problem(model: PreTrainedModel) -> str | None:
    """Why a model cannot read packed rows, tried out on two examples; None where it can.

    An example must have the states it has alone, and must not notice which example stands before it; one that reaches
    past every window of the model's attention too.

    Args:
        model: it is left in the mode it came in. `enable_packing` comes first.
    """
    reach = _reach(model)
    if reach > LONGEST_WINDOW or (reach and model.device.type == "cpu" and _products(model, reach) > MOST_PRODUCTS):
        where = "" if reach > LONGEST_WINDOW else " on a CPU"
        return f"its window of {reach} tokens is too wide to be tried out{where}"
    try:
        with evaluating(model), torch.no_grad():
            if _sees_others(model):
                return "packed examples would see each other"
            if reach and _ends_elsewhere(model, reach):
                return f"an example longer than its window of {reach} tokens would not be read as it is alone"
    except torch.OutOfMemoryError:
        return f"there is no memory to try out examples of {reach + LENGTH} tokens"
    except Exception as error:  # code of any family's own
        return f"its forward pass does not take what keeps packed examples apart: {reason_of(error)}"
    return None


def _states(model: PreTrainedModel, *examples: torch.Tensor) -> torch.Tensor:
    """The last states [12, d] of a row in which examples [1, T] are packed."""
    arguments = packed_arguments(model, [example.shape[1] for example in examples], model.device)
    row = torch.cat(examples, dim=1)
    return decoder_pass(model)(input_ids=row, **arguments)[0][0, -LENGTH:].float()


def _alone(model: PreTrainedModel, example: torch.Tensor) -> torch.Tensor:
    return decoder_pass(model)(input_ids=example, use_cache=False)[0][0, -LENGTH:].float()


def _sees_others(model: PreTrainedModel) -> bool:
    """Whether an example has other states than alone, or other ones beside another."""
    first, other, second = (made_up_tokens(model, count, start) for start, count in ((2, 9), (31, 9), (57, LENGTH)))
    packed, beside_other = _states(model, first, second), _states(model, other, second)
    # 8 bit picks its outliers over the whole row; else rows of equal shape are rounded equally, in any data type.
    noticing = NOTICED if model.dtype == torch.float32 else LOW_NOTICED
    noticing = LOW_TOLERANCE if getattr(model, "is_loaded_in_8bit", False) else noticing
    apart = _difference(packed, _alone(model, second)) <= _rounding(model)
    return not apart or _difference(packed, beside_other) > noticing


def _depth(model: PreTrainedModel) -> int:
    """How many of the first blocks have one of each kind among them; all, where the config names no kinds."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return max(map(kinds.index, set(kinds))) + 1 if kinds else number_of_layers(model)


def _products(model: PreTrainedModel, reach: int) -> float:
    """Products of weights and states in a pass over an example that reaches past a window."""
    count = sum(parameter.numel() for parameter in find_decoder(model).parameters())
    embeddings = cast(torch.Tensor, model.get_input_embeddings().weight).numel()
    return (count - embeddings) * _depth(model) / number_of_layers(model) * (reach + LENGTH)


def _ends_elsewhere(model: PreTrainedModel, reach: int) -> bool:
    """Whether the end of an example that is longer than the window is read otherwise than alone."""
    count = min(reach + LENGTH, context_length(model) or math.inf)
    long = made_up_tokens(model, int(count), 57)
    with truncated(model, _depth(model)):
        packed = _states(model, made_up_tokens(model, 9, 2), long)
        return _difference(packed, _alone(model, long)) > _rounding(model)


def _rounding(model: PreTrainedModel) -> float:
    """The difference from the states alone that counts as none."""
    low = getattr(model, "is_loaded_in_8bit", False) or model.dtype != torch.float32
    return LOW_TOLERANCE if low else TOLERANCE


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm().clamp(min=1e-12)).item()
