"""Bytes of a model's weights, from its shapes alone."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight in NF4: half a byte, an 8-bit scale for 64 weights, and a float32 for 256 of those scales."""


def weight_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Size of weights as they are held."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def model_bytes(model: PreTrainedModel, quantization: str = "none") -> int:
    """Size of a model's weights, which may be fake, on its device, each tied one once.

    With `quantization` `8bit` or `4bit` that is their size after it, which leaves the vocabulary head as it is.
    """
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    for module in model.modules():
        if quantization != "none" and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight = module.weight
            in_8bit = weight.numel() + 4 * weight.shape[0]
            sizes[id(weight)] = in_8bit if quantization == "8bit" else int(weight.numel() * _BYTES_4BIT)
    return sum(sizes.values())
