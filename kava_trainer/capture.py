"""Which hidden states are read, and how: the one home of the layer convention.

A layer index is an index into Hugging Face `hidden_states`: 0 are the embeddings, k is the output of block k, and
the last one is taken *after* the final norm. A hook on the last block would give the state before that norm, so the
last layer is read from the output of the decoder itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import BadRequest
from .layer_mapping import parse_layer_mapping
from .packing import packed_arguments


def _spread(count: int, depth: int) -> list[int]:
    """`count` layers of `depth`, evenly spaced, ending with the last; the first is block 1 where `count` > 1."""
    if count == 1:
        return [depth]
    return [round(1 + index * (depth - 1) / (count - 1)) for index in range(count)]


def resolve_layer_pairs(mapping: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Turn `layer_mapping` into (student layer, teacher layer) pairs for two models of known depth.

    Args:
        mapping: the argument as the user wrote it, see `layer_mapping.parse_layer_mapping`.
        student_layers: number of blocks of the student.
        teacher_layers: number of blocks of the teacher.

    Returns:
        Pairs of layer indices in the module's convention, 1 up to the depth of each model.

    Raises:
        BadRequest: if a layer does not exist, or more pairs are asked for than the shallower model has blocks.
    """
    parsed = parse_layer_mapping(mapping)
    if parsed == "last":
        return [(student_layers, teacher_layers)]
    if parsed == "all":
        return [(k, max(1, round(k * teacher_layers / student_layers))) for k in range(1, student_layers + 1)]
    if isinstance(parsed, int):
        limit = min(student_layers, teacher_layers)
        if parsed > limit:
            raise BadRequest(
                f"layer_mapping asks for {parsed} pairs, but the shallower model has {limit} layers; "
                f"write uniform:{limit} or less."
            )
        return list(zip(_spread(parsed, student_layers), _spread(parsed, teacher_layers), strict=True))
    for student, teacher in parsed:
        if student > student_layers or teacher > teacher_layers:
            raise BadRequest(
                f"layer_mapping names the pair [{student}, {teacher}], but the student has layers 1 to "
                f"{student_layers} and the teacher 1 to {teacher_layers}; write pairs of these."
            )
    return parsed


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


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module whose output is the last hidden state: the model without its vocabulary head."""
    return model.get_decoder()


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
        f"{type(model).__name__} holds no list of {depth} blocks, so its hidden states cannot be read layer by layer; "
        "use layer_mapping last."
    )


def run_decoder(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    packed_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Run a model without its vocabulary head and without a key-value cache.

    Args:
        model: a causal language model.
        input_ids: tokens [B, T].
        attention_mask: 1 at real tokens [B, T]; not read where the row is packed.
        packed_lengths: tokens of each example of a packed row [1, T]; see `packing`.

    Returns:
        The last hidden state [B, T, d].
    """
    if packed_lengths is None:
        arguments = {"attention_mask": attention_mask, "use_cache": False}
    else:
        arguments = packed_arguments(model, packed_lengths, input_ids.device)
    return _first_tensor(find_decoder(model)(input_ids=input_ids, **arguments))


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


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


class HiddenStateCapture:
    """Keeps the hidden states of chosen layers during a forward pass, and nothing else.

    Use it as a context manager around one forward pass; the states are yielded as a dictionary from layer index to
    a [B, T, d] tensor that is still part of the autograd graph. Outside of the `with` block the hooks do nothing, so
    the recomputation of gradient checkpointing is not recorded.

    Args:
        model: a decoder with or without its vocabulary head.
        layers: layer indices in the module's convention, 1 up to the number of layers.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        self.layers = sorted(set(layers))
        self._states: dict[int, torch.Tensor] | None = None
        depth = number_of_layers(model)
        inner = [layer for layer in self.layers if layer < depth]
        blocks: Sequence[nn.Module] = list(find_blocks(model)) if inner else []
        self._hooks = [blocks[layer - 1].register_forward_hook(self._recorder(layer)) for layer in inner]
        if depth in self.layers:
            self._hooks.append(find_decoder(model).register_forward_hook(self._recorder(depth)))

    def remove(self) -> None:
        """Take the hooks off the model; nothing is captured any more."""
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._states is not None:
                self._states[layer] = _first_tensor(output)

        return record

    def __enter__(self) -> dict[int, torch.Tensor]:
        self._states = {}
        return self._states

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states = None
