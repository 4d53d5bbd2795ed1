"""Which neurons and which attention heads of a block are most active, and how its weights are cut to them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...utils.errors import BadRequest
from .text import Batch, TextPass

_UP = ("gate_proj", "up_proj", "fc1", "mlp.c_fc")
"""Layers whose outputs are the neurons of a feed-forward block, as the families call them."""

_UP_TWICE = ("gate_up_proj",)
"""Those that hold the neurons' gates before the neurons."""

_DOWN = ("down_proj", "fc2", "mlp.c_proj")
"""Those that read the neurons."""

_QUERY, _KEY_VALUE = ("q_proj",), ("k_proj", "v_proj")
_OUT = ("o_proj", "self_attn.out_proj")


@dataclass(frozen=True)
class Width:
    """The feed-forward neurons, or the groups of attention heads, of every block of a model."""

    what: str
    """`neurons` or `heads`, for messages."""
    count: int
    """Of each block."""
    size: int
    """Entries of one of them where they are read: 1 for a neuron, its heads' width for a group of heads."""
    readers: list[nn.Module]
    """The layer of each block that reads them."""


def config_heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Attention heads of a decoder, how many of them share keys and values, and the width of one."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    return heads, heads // keys, getattr(text, "head_dim", None) or text.hidden_size // heads


def _reader(block: nn.Module, names: Sequence[str], inputs: int, what: str) -> nn.Module:
    found = [module for name, module in block.named_modules() if _is(name, names)]
    if len(found) != 1 or _inputs(found[0]) != inputs:
        raise BadRequest(
            f"The {what} of {type(block).__name__} cannot be cut one by one: they are not laid out as KAVA knows them;",
            "cut the student in depth alone, with student_num_layers.",
        )
    return found[0]


def _inputs(layer: nn.Module) -> int:
    """How many numbers a layer reads, also where its weights are quantised."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0]
    return cast(int, getattr(layer, "in_features", -1))


def neurons_of(config: PreTrainedConfig, blocks: Sequence[nn.Module]) -> Width:
    """The neurons of some blocks. Raises `BadRequest` where the family lays them out in another way."""
    count = feed_forward_size(config)
    return Width("neurons", count, 1, [_reader(block, _DOWN, count, "neurons") for block in blocks])


def head_groups_of(config: PreTrainedConfig, blocks: Sequence[nn.Module]) -> Width:
    """The groups of attention heads of some blocks that share keys and values. Raises `BadRequest` as `neurons_of`."""
    heads, group, size = config_heads(config)
    readers = [_reader(block, _OUT, heads * size, "attention heads") for block in blocks]
    return Width("heads", heads // group, group * size, readers)


def feed_forward_size(config: PreTrainedConfig) -> int:
    """Neurons of each feed-forward block of a decoder."""
    text = config.get_text_config(decoder=True)
    size = getattr(text, _name_of_size(text), None)
    return cast(int, size if isinstance(size, int) else 4 * text.hidden_size)


def set_feed_forward_size(config: PreTrainedConfig, size: int) -> None:
    """Give a config another number of neurons, under whatever name it has for it."""
    text = config.get_text_config(decoder=True)
    setattr(text, _name_of_size(text), size)


def _name_of_size(text: PreTrainedConfig) -> str:
    """What a config calls the number of neurons: OPT and GPT-2 have names of their own for it."""
    return next((name for name in ("ffn_dim", "n_inner") if hasattr(text, name)), "intermediate_size")


@torch.no_grad()
def activities(model: PreTrainedModel, widths: Sequence[Width], batches: Sequence[Batch]) -> list[torch.Tensor]:
    """How active the neurons or groups of heads of each block are on some text.

    That is the mean over all real tokens of the length of what the reading layer gets from each: of a neuron its
    magnitude.

    Args:
        model: run as it is, for instance without some blocks.
        widths: of its blocks.
        batches: of a collator.

    Returns:
        For each of the widths [blocks, count] in float32, on the CPU.
    """
    sums = [torch.zeros(len(width.readers), width.count) for width in widths]
    reading = TextPass()

    def recorder(total: torch.Tensor, width: Width, number: int) -> Callable[..., None]:
        def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
            mask = reading.mask.to(args[0].device)
            read = args[0].reshape(*mask.shape, -1)[mask].float()
            total[number] += read.unflatten(-1, (width.count, width.size)).norm(dim=-1).sum(0).cpu()

        return record

    hooks = [
        reader.register_forward_pre_hook(recorder(total, width, number))
        for total, width in zip(sums, widths, strict=True)
        for number, reader in enumerate(width.readers)
    ]
    reading.run(model, batches, hooks, "Measuring the teacher's neurons and heads")
    return [total / max(reading.count, 1) for total in sums]


def most_active(activity: torch.Tensor, keep: int) -> list[list[int]]:
    """The `keep` most active of each row [blocks, count], in their own order."""
    return cast(list[list[int]], activity.topk(keep, dim=1).indices.sort(dim=1).values.tolist())


@contextmanager
def silenced(width: Width, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Within the `with` block all but some of the neurons, or groups of heads, of each block give zero."""

    def muting(own: Sequence[int]) -> Callable[..., Any]:
        mask = torch.zeros(width.count, 1)
        mask[list(own)] = 1

        def mute(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            parts = args[0].unflatten(-1, (width.count, width.size))
            return ((parts * mask.to(parts)).flatten(-2), *args[1:])

        return mute

    pairs = zip(width.readers, kept, strict=True)
    hooks = [reader.register_forward_pre_hook(muting(own)) for reader, own in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cut_weight(
    name: str, weight: torch.Tensor, is_conv1d: bool, neurons: list[int] | None, groups: list[int] | None, group: int,
    head: int,
) -> torch.Tensor:  # fmt: skip
    """One weight or bias of a block, cut to some of its neurons and groups of heads.

    Args:
        name: of the parameter inside its block.
        weight: whole.
        is_conv1d: whether its layer keeps inputs in the rows (GPT-2).
        neurons: that are kept; None for all.
        groups: of heads, that are kept; None for all.
        group: heads of one group.
        head: width of one head.
    """
    layer, _, kind = name.rpartition(".")
    if neurons is not None and _is(layer, _UP_TWICE):
        half = weight.shape[0] // 2
        neurons = [*neurons, *(half + neuron for neuron in neurons)]
        return weight.index_select(0, _entries(neurons, 1).to(weight.device))
    rows, columns = (1, 0) if is_conv1d and weight.ndim > 1 else (0, 1)
    for kept, size, writing, reading in (
        (neurons, 1, _UP, _DOWN),
        (groups, group * head, _QUERY, _OUT),
        (groups, head, _KEY_VALUE, ()),
    ):
        if kept is None:
            continue
        if _is(layer, writing):
            weight = weight.index_select(rows, _entries(kept, size).to(weight.device))
        elif _is(layer, reading) and kind == "weight":
            weight = weight.index_select(columns, _entries(kept, size).to(weight.device))
    return weight


def _is(layer: str, names: Sequence[str]) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _entries(kept: list[int], size: int) -> torch.Tensor:
    """Where so many entries each of the kept ones stand."""
    return (torch.tensor(kept).unsqueeze(1) * size + torch.arange(size)).flatten()
