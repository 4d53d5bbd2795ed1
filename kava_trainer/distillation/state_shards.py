"""Hidden states on disk: safetensors shards, each whole or absent, found again by the tokens they belong to.

A shard holds the states of some examples end to end, one tensor a layer, and of each example a key and where it ends.
The key is a hash of the token ids, so the order of the data, the batches and a resumed run do
not matter. Shards are memory-mapped: reading one example touches its own bytes.
"""

import hashlib
import uuid
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..utils.atomic_files import write_atomically
from ..utils.errors import BadRequest, reason_of

BLOCK = 32
"""Channels of a token that share one int8 scale; see `encode`."""

SHARD_BYTES = 128 * 2**20
"""A shard is written when its states take so many bytes: what a build that is cut off has to do again."""


def example_key(input_ids: Sequence[int]) -> int:
    """A 64-bit hash of token ids, as a signed number."""
    tokens = torch.as_tensor(input_ids, dtype=torch.int32).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little", signed=True)


def encode(states: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Hidden states [N, d] as they are stored.

    In int8 each token has one scale for every 32 channels, not one for all: a few channels of a language model are
    hundreds of times larger than the rest, and would leave nothing of it. With 32 the squared error is at most
    32 / (12 x 127^2) of the squared length on average, whatever the state, which is a cosine of 0.9999.

    Args:
        states: [N, d].
        dtype: `bfloat16` or `int8`.

    Returns:
        `values` [N, d], and for int8 `scales` [N, d / 32] in bfloat16.
    """
    if dtype == "bfloat16":
        return {"values": states.to(torch.bfloat16)}
    blocks = F.pad(states.float(), (0, -states.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    scales = (largest / 126).to(torch.bfloat16)  # bfloat16 rounds by up to 1/256: 127 steps are never exceeded
    values = (blocks / scales.float().clamp(min=torch.finfo(torch.bfloat16).tiny)).round().clamp(-127, 127)
    return {"values": values.flatten(1)[:, : states.shape[1]].to(torch.int8), "scales": scales.squeeze(2)}


def decode(values: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Stored states [N, d] as bfloat16; `scales` [N, d / 32] where they are int8."""
    if scales is None:
        return values
    each = scales.float().repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]
    return (values.float() * each).to(torch.bfloat16)


def bytes_per_token(hidden_size: int, layers: int, dtype: str) -> int:
    """Size on disk of the states of one token."""
    return layers * (2 * hidden_size if dtype == "bfloat16" else hidden_size + 2 * -(-hidden_size // BLOCK))


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(cast(Any, tensor.contiguous().view(torch.uint8).numpy())):08x}"


def write_shard(
    folder: Path, keys: list[int], examples: list[dict[int, torch.Tensor]], dtype: str, fingerprint: str
) -> None:
    """Write the states [T, d] by layer of some examples, with their `example_key`, as one shard of `Shards`."""
    lengths = torch.tensor([len(next(iter(states.values()))) for states in examples])
    tensors = {"keys": torch.tensor(keys), "ends": lengths.cumsum(0)}
    for layer in examples[0]:
        encoded = encode(torch.cat([states[layer] for states in examples]), dtype)
        tensors |= {f"layer_{layer}.{name}": part.cpu().contiguous() for name, part in encoded.items()}
    metadata = {name: _checksum(tensor) for name, tensor in tensors.items()} | {"fingerprint": fingerprint}
    path = folder / f"states-{uuid.uuid4().hex}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _broken(path: Path, reason: str) -> BadRequest:
    return BadRequest(
        f"The teacher cache's file {path} is broken ({reason}).", "Delete it; the next run writes its examples again."
    )


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


class Shards:
    """The shards of one folder, read by the tokens of an example.

    Args:
        folder: where they are.
        fingerprint: what each of them has to name; another one's shard does not belong here.

    Raises:
        BadRequest: naming the file that cannot be read or does not belong here.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = Path(folder), fingerprint
        self.refresh()

    def refresh(self) -> None:
        """Read again which examples there are."""
        self.paths = sorted(self.folder.glob("states-*.safetensors"))
        parts = [self._index(number, path) for number, path in enumerate(self.paths)]
        index = torch.cat(parts) if parts else torch.zeros(0, 4, dtype=torch.int64)
        order = index[:, 0].argsort(stable=True)
        self._keys, self._places = index[order, 0].contiguous(), index[order, 1:].contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that finding the examples takes: 32 for each."""
        return sum(part.numel() * part.element_size() for part in (self._keys, self._places))

    def _index(self, number: int, path: Path) -> torch.Tensor:
        """Key, shard, first and last position of each example of one shard: [N, 4]."""
        try:
            with safe_open(path, framework="pt") as shard:
                found, (keys, ends) = shard.metadata(), (shard.get_tensor(name) for name in ("keys", "ends"))
        except (OSError, SafetensorError) as error:
            raise _broken(path, reason_of(error)) from error
        if found.get("fingerprint") != self._fingerprint:
            raise BadRequest(
                f"{path} holds the states of another teacher than the rest of its folder does.",
                "Delete it; the next run writes what is missing.",
            )
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return torch.stack([keys, torch.full_like(keys, number), starts, ends], dim=1)

    def verify(self, paths: Iterable[Path]) -> None:
        """Compare the checksums of shards with what is on the disk. Raises `BadRequest` for the first that differs."""
        for path in paths:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a shard is no mapping
                    if _checksum(shard.get_tensor(name)) != shard.metadata()[name]:
                        raise _broken(path, f"the checksum of {name} differs")

    def _place(self, key: int) -> list[int] | None:
        position = int(torch.searchsorted(self._keys, key))
        if position == len(self._keys) or self._keys[position] != key:
            return None
        return self._places[position].tolist()

    def __contains__(self, input_ids: Sequence[int]) -> bool:
        return self._place(example_key(input_ids)) is not None

    def read(self, input_ids: Sequence[int], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """The states [T, d] of an example by layer, in bfloat16. Raises `BadRequest` if it is not there."""
        place = self._place(example_key(input_ids))
        if place is None or place[2] - place[1] != len(input_ids):
            raise BadRequest(
                f"The teacher cache {self.folder} lacks an example of {len(input_ids)} tokens that is needed now;",
                "build it with all the examples that are trained on or evaluated.",
            )
        number, start, end = place
        shard = _open(self.paths[number])
        names = set(shard.keys())

        def part(name: str) -> torch.Tensor | None:
            return shard.get_slice(name)[start:end] if name in names else None

        return {
            layer: decode(cast(torch.Tensor, part(f"layer_{layer}.values")), part(f"layer_{layer}.scales"))
            for layer in layers
        }


class ShardWriter:
    """Collects examples and writes a shard of `Shards` whenever their states, once encoded, take `shard_bytes`."""

    def __init__(self, folder: Path, dtype: str, fingerprint: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._dtype, self._fingerprint, self._limit = folder, dtype, fingerprint, shard_bytes
        self._keys: list[int] = []
        self._examples: list[dict[int, torch.Tensor]] = []
        self._bytes = 0

    def add(self, input_ids: Sequence[int], states: dict[int, torch.Tensor]) -> None:
        """Add one example with its states [T, d] by layer."""
        self._keys.append(example_key(input_ids))
        self._examples.append({layer: part.cpu() for layer, part in states.items()})
        width = next(iter(states.values())).shape[1]
        self._bytes += len(input_ids) * bytes_per_token(width, len(states), self._dtype)
        if self._bytes >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if self._keys:
            write_shard(self._folder, self._keys, self._examples, self._dtype, self._fingerprint)
        self._keys, self._examples, self._bytes = [], [], 0
