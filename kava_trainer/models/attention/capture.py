"""Queries, keys and values of chosen layers after RoPE, captured in the forward pass beside hidden states.

A hook on a layer's projections would see them before RoPE, and transformers leaves its key-value cache out where
gradients are checkpointed. The attention function sees them in any case, and KAVA registers one of its own with
transformers (`packed_attention`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ...utils.errors import BadRequest
from ..hidden_states import HiddenStateCapture, run_decoder
from ..layers import evaluating, find_blocks, made_up_tokens
from ..packed_attention import PACKED_SDPA, enable_packing
from ..trial import are_same, can_run, check_states
from .recorders import add_recorder, remove_recorder


class AttentionPart(NamedTuple):
    """A part of what goes into the attention of a block."""

    layer: int
    """Of the block, counted from 1, as in `hidden_states`."""
    part: str
    """`query`, `key` or `value`; a query is scaled as its products with the keys will be."""


_BESIDE_PRODUCTS = ("s_aux", "position_bias", "softcap")
"""Arguments of attention functions that change its distribution (read in transformers 5.23.0)."""

_SLIDING_KINDS = ("sliding_attention", "hybrid_sliding")

_KNOWN_KINDS = ("full_attention", "hybrid", *_SLIDING_KINDS)
"""Values of `layer_types` whose masks are computed again from `window_of`; hybrid layers have a state space besides."""


class OfTeacher(NamedTuple):
    """What is captured of a teacher that is not the first of several."""

    teacher: int
    """Its number, counted from 0."""
    feature: "int | AttentionPart"


Feature = int | AttentionPart | OfTeacher
"""What is captured of a model: a hidden state by its layer [B, T, d], or a part of attention [B, T, heads, d]."""


def of_teacher(number: int, feature: Feature) -> Feature:
    """The feature of the teacher with this number, counted from 0, among those of all teachers."""
    return feature if number == 0 or isinstance(feature, OfTeacher) else OfTeacher(number, feature)


def states_of_teacher(states: Mapping[Feature, torch.Tensor], number: int) -> dict[Feature, torch.Tensor]:
    """What was captured of one teacher, of all that was captured of several."""
    if number == 0:
        return {own: state for own, state in states.items() if not isinstance(own, OfTeacher)}
    return {own.feature: s for own, s in states.items() if isinstance(own, OfTeacher) and own.teacher == number}


def layer_of(feature: Feature) -> int:
    """The layer that a feature is of."""
    own = feature.feature if isinstance(feature, OfTeacher) else feature
    return own if isinstance(own, int) else own.layer


def hidden_layers(features: Sequence[Feature]) -> list[int]:
    """The layers whose hidden states are among some features."""
    return [feature for feature in features if isinstance(feature, int)]


def in_order(features: set[Feature]) -> list[Feature]:
    """Features by their layers, each layer's state first."""
    return sorted(features, key=lambda own: (layer_of(own), own.part if isinstance(own, AttentionPart) else ""))


def check_attention_is_seen(model: PreTrainedModel, role: str, target: str) -> None:
    """Make sure that a model attends by the function that can be recorded.

    Raises:
        BadRequest: if it does not; it names the `role` and the `target` that needs it.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", PACKED_SDPA):
        raise BadRequest(
            f"alignment_target {target} reads what goes into sdpa attention, but the {role}, a {type(model).__name__}, "
            f"attends by {implementation};",
            "write attn_implementation sdpa where the model has it, or alignment_target hidden or relations.",
        )


def key_value_shape(model: PreTrainedModel) -> tuple[int, int]:
    """How many heads of keys and values each layer has, and how wide they are, by a model's config."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


def query_heads(model: PreTrainedModel) -> int:
    """How many heads of queries each layer has, by a model's config."""
    return model.config.get_text_config(decoder=True).num_attention_heads


def window_of(model: PreTrainedModel, layer: int) -> int | None:
    """How many tokens back, itself included, a token attends in a layer, by a model's config; None for all."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer - 1] in _SLIDING_KINDS
    return getattr(config, "sliding_window", None) or None if slides else None


class FeatureCapture:
    """Keeps chosen features during a forward pass; a context manager as `HiddenStateCapture` is.

    Args:
        model: a decoder with or without its vocabulary head; one whose attention is captured attends by KAVA's own
            function from now on, which gives what `sdpa` does.
        features: what is kept.
    """

    def __init__(self, model: PreTrainedModel, features: Sequence[Feature]) -> None:
        self._hidden = HiddenStateCapture(model, hidden_layers(features))
        self._parts = {feature for feature in features if isinstance(feature, AttentionPart)}
        self._states: dict[Any, torch.Tensor] | None = None
        self._recorders: list[tuple[nn.Module, Any]] = []
        self.options: dict[int, Mapping[str, Any]] = {}
        """By layer what its attention was last called with, beside query, key and value."""
        if self._parts:
            enable_packing(model)
            blocks = find_blocks(model)
            for layer in {part.layer for part in self._parts}:
                recorder = partial(self._record, layer)
                self._recorders += [(module, recorder) for module in blocks[layer - 1].modules()]
        for module, recorder in self._recorders:
            add_recorder(module, recorder)

    def remove(self) -> None:
        """Take the hooks off the model; nothing is captured any more."""
        self._hidden.remove()
        for module, recorder in self._recorders:
            remove_recorder(module, recorder)
        self._recorders = []

    def _record(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Mapping[str, Any]
    ) -> None:
        if self._states is None:
            return
        self.options[layer] = options
        scale = options.get("scaling")
        given = {"query": lambda: query * (query.shape[-1] ** -0.5 if scale is None else scale)}
        given |= {"key": lambda: key, "value": lambda: value}
        for part in given.keys() & {wanted.part for wanted in self._parts if wanted.layer == layer}:
            self._states[AttentionPart(layer, part)] = given[part]().transpose(1, 2)

    def __enter__(self) -> dict[Any, torch.Tensor]:
        self._states = self._hidden.__enter__()
        return self._states

    def __exit__(self, *error: object) -> None:
        self._states = None
        self._hidden.__exit__(*error)


@torch.no_grad()
def check_features(model: PreTrainedModel, features: Sequence[Feature], role: str) -> None:
    """Make sure that what is captured are a model's hidden states, and the keys and values that its cache would hold.

    Args:
        model: it is left in the mode it came in.
        features: that are aligned.
        role: `teacher` or `student`, for the message.

    Raises:
        BadRequest: if they are not.
    """
    parts = [feature for feature in features if isinstance(feature, AttentionPart)]
    if not parts:
        check_states(model, hidden_layers(features), role)
        return
    if not can_run(model):
        return
    ids, capture = made_up_tokens(model), FeatureCapture(model, parts)
    try:
        with evaluating(model), capture as states:
            run_decoder(model, ids)
            found = dict(states)
            options = dict(capture.options)
            cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        capture.remove()
    kept = getattr(cache, "layers", [])
    for part in parts:
        problem = _problem(model, part, found.get(part), kept)
        if part.part == "query" and problem is None:
            problem = _odd_attention(model, part.layer, options[part.layer])
        if problem is not None:
            raise BadRequest(
                f"Layer {part.layer} of the {role}, a {type(model).__name__}, {problem};",
                "name other layers in layer_mapping, or write alignment_target hidden or relations.",
            )


def _problem(
    model: PreTrainedModel, part: AttentionPart, found: torch.Tensor | None, kept: Sequence[Any]
) -> str | None:
    """Why what was captured is not what a layer's cache holds; None where it is."""
    if found is None:
        return "does not attend by the function that shows its keys and values"
    heads, width = key_value_shape(model)
    heads = query_heads(model) if part.part == "query" else heads
    if tuple(found.shape[2:]) != (heads, width):
        return (
            f"has {part.part} heads of {list(found.shape[2:])} (number, width) where its config tells {[heads, width]}"
        )
    if part.part == "query":
        return None
    layer = kept[part.layer - 1] if part.layer <= len(kept) else None
    own, given = getattr(layer, f"{part.part}s", None), found.transpose(1, 2)
    if own is not None and getattr(layer, "is_sliding", False):  # it holds what the next token will attend to, no more
        given = given[:, :, -own.shape[2] :]
    if own is None or own.shape != given.shape:
        return f"keeps no {part.part}s of every token in a cache"
    if not are_same(own, given):
        return f"keeps other {part.part}s in its cache than it attends to"
    return None


def _odd_attention(model: PreTrainedModel, layer: int, options: Mapping[str, Any]) -> str | None:
    """Why a layer's attention is not the softmax of its scaled queries' products with its keys; None where it is."""
    mask = options.get("attention_mask")
    odd = [name for name in _BESIDE_PRODUCTS if options.get(name) is not None]
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        odd.append("attention_mask")
    if odd:
        return f"attends by more than its queries and keys ({', '.join(odd)})"
    if (kind := _kind_beside_windows(model, layer)) is not None:
        return f"attends by {kind}, which is neither all tokens before a token nor a window of them"
    if (window := options.get("sliding_window")) != window_of(model, layer):
        return f"has a window of {window} where its config tells {window_of(model, layer)}"
    return None


def _kind_beside_windows(model: PreTrainedModel, layer: int) -> str | None:
    """How a layer chooses the tokens that it attends to, by a model's config; None where by all or by a window.

    A probe as short as a chunk would not show it.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer - 1] not in _KNOWN_KINDS:
        return str(kinds[layer - 1])
    return "chunks (attention_chunk_size)" if getattr(config, "attention_chunk_size", None) else None
