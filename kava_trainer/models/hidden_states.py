"""Which hidden states are read, and how: the one home of the layer convention.

A layer index is an index into Hugging Face `hidden_states`: 0 are the embeddings, k is the output of block k, and
the last one is taken *after* the final norm. A hook on the last block would give the state before that norm, so the
last layer is read from the output of the decoder itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers import decoder_pass, find_blocks, find_decoder, number_of_layers
from .packed_attention import packed_arguments


def decoder_output(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    packed_lengths: Sequence[int] | None = None,
) -> Any:
    """What the decoder itself gives; see `run_decoder`."""
    if packed_lengths is None:
        arguments = {"attention_mask": attention_mask, "use_cache": False}
    else:
        arguments = packed_arguments(model, packed_lengths, input_ids.device)
    return decoder_pass(model)(input_ids=input_ids, **arguments)


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
        packed_lengths: tokens of each example of a packed row [1, T]; see `packed_attention`.

    Returns:
        The last hidden state [B, T, d].
    """
    return first_tensor(decoder_output(model, input_ids, attention_mask, packed_lengths))


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden state of what a decoder or a block gives."""
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
                self._states[layer] = first_tensor(output)

        return record

    def __enter__(self) -> dict[int, torch.Tensor]:
        self._states = {}
        return self._states

    def __exit__(self, *error: object) -> None:
        self._states = None
