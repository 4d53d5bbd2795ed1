"""Who wants to see what goes into an attention layer; `packed_attention` asks here."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Recorder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]], None]
"""Is given query [B, heads, T, d], key and value [B, key heads, T, d], and the attention function's other arguments."""

_RECORDERS: "WeakKeyDictionary[nn.Module, list[Recorder]]" = WeakKeyDictionary()


def add_recorder(module: nn.Module, recorder: Recorder) -> None:
    """From now on show a recorder what goes into the attention of a module."""
    _RECORDERS.setdefault(module, []).append(recorder)


def remove_recorder(module: nn.Module, recorder: Recorder) -> None:
    """Undo `add_recorder`."""
    _RECORDERS[module].remove(recorder)
    if not _RECORDERS[module]:
        del _RECORDERS[module]


def recorders_of(module: nn.Module) -> list[Recorder]:
    """Who wants to see what goes into the attention of a module."""
    return _RECORDERS.get(module, [])


def is_recorded(model: nn.Module) -> bool:
    """Whether anybody wants to see the attention of any part of a model."""
    return any(module in _RECORDERS for module in model.modules())
