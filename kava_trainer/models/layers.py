"""The parts of a decoder: where it holds its blocks, how many there are, and how wide and long it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.errors import BadRequest

TOKENS = 16
"""Of the text that models are tried out on."""

DECODER_PASS = "decoder_pass_of_shards"
"""Name that a sharded model has a pass of its decoder by, before which its ends are gathered."""


def config_layers(config: PreTrainedConfig) -> int:
    """Number of blocks that a config describes, see `number_of_layers`."""
    return config.get_text_config(decoder=True).num_hidden_layers


def number_of_layers(model: PreTrainedModel) -> int:
    """Number of blocks of a decoder, which is also the index of its last hidden state."""
    return config_layers(model.config)


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the hidden states of a decoder between its blocks."""
    return model.config.get_text_config(decoder=True).hidden_size


def state_width(model: PreTrainedModel, layers: Iterable[int]) -> int:
    """Width of the hidden states of some layers; of the last one it may be another (OPT-350m projects it).

    Raises:
        BadRequest: if the layers' states differ in width.
    """
    inner, depth = hidden_size(model), number_of_layers(model)
    last = getattr(model.config.get_text_config(decoder=True), "word_embed_proj_dim", inner)
    widths = {last if layer == depth else inner for layer in layers} or {last}
    if len(widths) > 1:
        raise BadRequest(
            f"The last hidden state of {type(model).__name__} is {last} wide and its others {inner}, so they cannot be "
            "projected, or cached, together;",
            "use layer_mapping last, or map layers before the last one alone, and then without kd_weight in a cache.",
        )
    return widths.pop()


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text and gives the last hidden state, without vocabulary head and vision.

    Raises:
        BadRequest: if there is none.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is not model and decoder is not head:
        return decoder
    # transformers 5.23.0 takes the model itself for it (Llama 4), or the head (ModernBERT's decoder).
    inner = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if inner is None:
        raise BadRequest(f"{type(model).__name__} keeps no decoder apart from its vocabulary head;", "use another.")
    return inner


def decoder_pass(model: PreTrainedModel) -> Callable[..., Any]:
    """What runs the decoder alone, called as the decoder itself is. Raises `BadRequest` if there is none."""
    return getattr(model, DECODER_PASS, None) or find_decoder(model)


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens a model has positions for, or None where its config sets no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def train_text_alone(model: PreTrainedModel) -> None:
    """Freeze what a model that reads more than text has beside its decoder and its vocabulary head.

    It has no part in a loss, and data parallelism would wait for its gradients.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return
    parts = (find_decoder(model), model.get_output_embeddings())
    text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in text:
            parameter.requires_grad_(False)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks of a decoder.

    Raises:
        BadRequest: if the model keeps no list of as many modules as its config counts layers.
    """
    depth = number_of_layers(model)
    for module in find_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise BadRequest(
        f"{type(model).__name__} holds no list of {depth} blocks, so its hidden states cannot be read layer by layer;",
        "use layer_mapping last.",
    )


@contextmanager
def truncated(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Within the `with` block the model ends after its first `depth` blocks; what it returns is then not its output."""
    if depth >= number_of_layers(model):
        yield
        return
    blocks = find_blocks(model)
    owner, name = next(
        (module, name)
        for module in find_decoder(model).modules()
        for name, child in module.named_children()
        if child is blocks
    )
    setattr(owner, name, blocks[:depth])
    try:
        yield
    finally:
        setattr(owner, name, blocks)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Within the `with` block a model is in evaluation mode; afterwards each module is in the mode it was in."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the `with` block a model trains, or evaluates; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Whatever gradients the `with` block gives the parameters of a model, afterwards they have those of before."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def made_up_tokens(model: PreTrainedModel, count: int = TOKENS, first: int = 1) -> torch.Tensor:
    """Token ids [1, count] that a model has embeddings for, where it takes them; fewer where it reads no more."""
    count = min(count, context_length(model) or count)
    size = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    return (torch.arange(first, first + count) % size).unsqueeze(0).to(model.device)
