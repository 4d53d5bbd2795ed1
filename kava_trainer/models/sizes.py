"""Bytes of a model's weights and of an optimizer's states, from shapes alone."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.optimizer_names import TORCHAO_OPTIMIZERS, optimizer_name, parse_optim_args
from ..utils.distributed import is_sharded

_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight in NF4: half a byte, an 8-bit scale for 64 weights, and a float32 for 256 of those scales."""


def weight_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Size of weights as they are held."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def parameter_count(model: PreTrainedModel) -> int:
    """How many parameters a model has, each tied one once, also where sharding gave it weights of its own."""
    tied = getattr(model, "all_tied_weights_keys", {}) if is_sharded(model) else {}
    return sum(own.numel() for name, own in model.named_parameters() if name not in tied)


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


_QUANTISED_FROM, _BLOCK = 4096, 256
"""Optimizers quantise the states of weights this large, with a float32 scale for each block."""


def _state_bytes(name: str, parameter: nn.Parameter, is_embedding: bool, block: int) -> float:
    """Size of one state of one weight."""
    count, own = parameter.numel(), parameter.numel() * parameter.element_size()
    if name in TORCHAO_OPTIMIZERS:
        bits = 8 if "8bit" in name else 4
        quantised = count >= _QUANTISED_FROM and count % block == 0
        return count * bits / 8 + 4 * count // block + 4 * 2**bits if quantised else own
    if "8bit" in name and count >= _QUANTISED_FROM and not is_embedding:
        return count + 4 * math.ceil(count / _BLOCK)
    if name == "stable_adamw" and parameter.dtype == torch.bfloat16:
        return 1.5 * own  # beside its two states it carries what bfloat16 drops
    return 4 * count if "8bit" in name or "32bit" in name else own


def optimizer_bytes(
    optim: Any,
    parameters: Iterable[nn.Parameter],
    embeddings: Iterable[torch.Tensor] = (),
    optim_args: str | None = None,
) -> int:
    """Size of an optimizer's states: two a weight for Adam and its kin, one or none for the plainer ones.

    Args:
        optim: as in the arguments.
        parameters: the weights that it trains.
        embeddings: those whose states bitsandbytes keeps in 32 bits, because Trainer tells it to.
        optim_args: as in the arguments; torchao's `block_size` counts.
    """
    name, whole = optimizer_name(optim), {id(parameter) for parameter in embeddings}
    given = parse_optim_args(optim_args).get("block_size", "")
    block = int(given) if given.isdecimal() and int(given) else _BLOCK
    states = 2
    if any(word in name for word in ("lion", "rmsprop", "adagrad")):
        states = 1
    if any(word in name for word in ("adafactor", "sgd", "lomo")):
        states = 0
    return int(states * sum(_state_bytes(name, p, id(p) in whole, block) for p in parameters))


def optimizer_step_bytes(optim: Any, parameters: Iterable[nn.Parameter]) -> int:
    """What an optimizer's step takes beside its states: torchao's compiled one, two float32 copies of a weight.

    It was read in the code that torch 2.13.0 makes of torchao 0.18.0 for a CPU.
    """
    largest = max((parameter.numel() for parameter in parameters), default=0)
    return 8 * largest if optimizer_name(optim) in TORCHAO_OPTIMIZERS else 0
