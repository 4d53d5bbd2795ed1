"""A model's weights in safetensors files, of which a rank reads its own rows alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ...utils.errors import BadRequest, reason_of
from ..loading import model_folder

_PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantised, as the files call them."""


@dataclass(frozen=True)
class StoredWeight:
    """What the header of a file tells of one weight."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it."""

    @property
    def is_plain(self) -> bool:
        """Whether it holds floating-point numbers of 16 bits or more, and nothing that is quantised."""
        return self.dtype in _PLAIN


@dataclass(frozen=True)
class StoredWeights:
    """Weights by name, of which nothing but the headers has been read."""

    weights: dict[str, StoredWeight]
    _opened: dict[Path, Any] = field(default_factory=dict)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` up to `stop` of a weight, as they are stored."""
        return self._open(name).get_slice(name)[start:stop]

    def whole(self, name: str) -> torch.Tensor:
        """All of a weight, as it is stored."""
        return self._open(name).get_tensor(name)

    def _open(self, name: str) -> Any:
        """The file of a weight, mapped into memory; what is read of it takes memory, and nothing else does."""
        file = self.weights[name].file
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]


def find_weights(name: str, role: str, revision: str | None, fetch: bool = True) -> StoredWeights | None:
    """The weights of a model in its folder or in the cache of the hub.

    Args:
        name: hub id, local folder or `quickstart`.
        role: what messages call the model.
        revision: hub revision, or None.
        fetch: whether the cache fetches what it lacks.

    Returns:
        None where the model has no safetensors files, or not all of them are here and none is fetched.

    Raises:
        BadRequest: if they cannot be read.
    """
    try:
        files = _files(name, role, revision, fetch)
        return None if files is None else StoredWeights(_read_headers(files))
    except Exception as error:  # safetensors, json and the hub fail in ways of their own
        raise BadRequest(f"The {role} {name!r} cannot be loaded: {reason_of(error)}") from error


def _files(name: str, role: str, revision: str | None, fetch: bool) -> list[Path] | None:
    """The files in the order that transformers looks for them: one, or else those that an index names."""
    if (single := _file(name, role, revision, SAFE_WEIGHTS_NAME, fetch)) is not None:
        return [single]
    if (index := _file(name, role, revision, SAFE_WEIGHTS_INDEX_NAME, fetch)) is None:
        return None
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {part: _file(name, role, revision, part, fetch) for part in parts}
    missing = [part for part, path in found.items() if path is None]
    if missing and not fetch and model_folder(name, role) is None:
        return None
    if missing:
        raise FileNotFoundError(f"of its {len(parts)} files of weights {', '.join(missing[:3])} are not there")
    return [path for path in found.values() if path is not None]


def _file(name: str, role: str, revision: str | None, file: str, fetch: bool) -> Path | None:
    if (folder := model_folder(name, role)) is not None:
        return folder / file if (folder / file).is_file() else None
    try:
        found = cached_file(name, file, revision=revision, local_files_only=not fetch)
    except OSError:  # neither on the hub nor in its cache
        return None
    return None if found is None else Path(found)


def _read_headers(files: list[Path]) -> dict[str, StoredWeight]:
    """Every weight of some files. Raises `ValueError` for one that is there twice."""
    weights: dict[str, StoredWeight] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                if name in weights:
                    raise ValueError(f"{weights[name].file.name} and {file.name} both hold {name}")
                part = opened.get_slice(name)
                weights[name] = StoredWeight(file, tuple(part.get_shape()), part.get_dtype())
    return weights
