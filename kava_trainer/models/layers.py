"""The parts of a decoder: where it holds its blocks, how many there are, and how wide and long it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.errors import BadRequest


def config_layers(config: PreTrainedConfig) -> int:
    """Number of blocks that a config describes, see `number_of_layers`."""
    return config.get_text_config(decoder=True).num_hidden_layers


def number_of_layers(model: PreTrainedModel) -> int:
    """Number of blocks of a decoder, which is also the index of its last hidden state."""
    return config_layers(model.config)


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the hidden states of a decoder."""
    return model.config.get_text_config(decoder=True).hidden_size


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens a model has positions for, or None where its config sets no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks of a decoder.

    Raises:
        BadRequest: if the model keeps no list of as many modules as its config counts layers.
    """
    depth = number_of_layers(model)
    for module in model.get_decoder().modules():
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
        for module in model.get_decoder().modules()
        for name, child in module.named_children()
        if child is blocks
    )
    setattr(owner, name, blocks[:depth])
    try:
        yield
    finally:
        setattr(owner, name, blocks)
