"""The teacher's hidden states from disk: written once, then read by whatever batches, packs or epochs come."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..config.model_arguments import ModelArguments
from ..data.packing import pack_step
from ..models.adapters import find_adapter
from ..models.attention.capture import Feature
from ..models.layers import find_decoder, number_of_layers, state_width
from ..models.lm_head import vocabulary_logits, whole_head
from ..models.loading import model_folder
from ..models.packed_attention import disable_packing, enable_packing, packing_problem
from ..models.teacher import OnlineTeacher, in_step_reading
from ..utils.atomic_files import write_atomically
from ..utils.digests import read_samples
from ..utils.distributed import own_part
from ..utils.errors import BadRequest, reason_of
from ..utils.files import check_cache_space
from ..utils.progress_bar import progress_bar, with_progress
from ..utils.signals import WATCH
from .state_shards import Shards, ShardWriter, bytes_per_token, example_key

MANIFEST = "teacher_cache.json"

GROUP = 256
"""Examples that are packed or sorted by length together while a cache is built."""


def weights_digest(folder: Path) -> str:
    """A hash of a local model's config and weight files: their names, their sizes, and 64 samples of 64 KiB of each.

    Training a model changes nearly every weight, so the samples tell two versions apart without reading gigabytes.
    Of an adapter the model beneath it counts too.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".pt"))
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + read_samples(path, 64, 2**16))
    if (adapter := find_adapter(str(folder), "adapter's folder")) is not None:
        beneath = Path(adapter.base)
        digest.update((weights_digest(beneath) if beneath.is_dir() else adapter.base).encode())
    return digest.hexdigest()


def teacher_identity(arguments: ModelArguments, model: PreTrainedModel, mixed_precision: str) -> dict[str, Any]:
    """All that decides which states a teacher gives to a text.

    Args:
        arguments: which teacher it is.
        model: the loaded teacher. A model from the hub knows the commit that it was loaded from.
        mixed_precision: `no`, `bf16` or `fp16`: what autocast computes in.
    """
    folder = model_folder(cast(str, arguments.teacher_model_name_or_path), "teacher")
    return {
        "teacher": arguments.teacher_model_name_or_path,
        "version": weights_digest(folder) if folder else getattr(model.config, "_commit_hash", None),
        "quantization": arguments.teacher_quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": mixed_precision,
    }


class TeacherCache:
    """A folder of teacher states, and what fills it.

    Args:
        folder: empty, new, or a cache of the same teacher in the same form.
        identity: see `teacher_identity`.
        layers: layers whose states are wanted; a cache that has more will do.
        dtype: `bfloat16`, or `int8` in blocks with a scale, see `state_shards.encode`.

    Raises:
        BadRequest: if the folder holds anything else, or a file of it is broken; the message names it.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], layers: Sequence[int], dtype: str) -> None:
        self.folder, self.wanted, self.dtype = Path(folder), list(layers), dtype
        manifest = {"format": 1, **identity, "states": dtype, "layers": self.wanted}
        with PartialState().main_process_first():
            self.layers = self._open(manifest)
        self.shards = Shards(self.folder, self.fingerprint)

    def _open(self, wanted: dict[str, Any]) -> list[int]:
        """The layers in the folder, which is given a manifest where it has none."""
        path = self.folder / MANIFEST
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise BadRequest(
                    f"teacher_cache_dir {self.folder} holds files but no teacher cache;", "name an empty or new folder."
                )
            try:
                write_atomically(path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=2)))
            except OSError as error:
                raise BadRequest(f"teacher_cache_dir {self.folder} cannot be written to: {error.strerror}.") from error
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            layers = list(found["layers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"The teacher cache's {path} cannot be read ({reason_of(error)}).") from error
        differing = [name for name in wanted if name != "layers" and found.get(name) != wanted[name]]
        if not set(wanted["layers"]) <= set(layers):
            differing.append("layers")
        if differing:
            there = "; ".join(f"{n} is {found.get(n)} there and {wanted[n]} here" for n in differing)
            raise BadRequest(
                f"teacher_cache_dir {self.folder} holds the states of another teacher, or in another form: {there}.",
                "Name another folder, or delete that one.",
            )
        self.fingerprint = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return layers

    def missing(self, examples: Sequence[Sequence[int]]) -> list[int]:
        """Which examples, given by their token ids, are not there yet; equal ones count once."""
        keys: dict[int, int] = {}
        for position, ids in enumerate(examples):
            if ids not in self.shards:
                keys.setdefault(example_key(ids), position)
        return list(keys.values())

    def bytes_for(self, tokens: int, width: int) -> int:
        """Size on disk of so many tokens' states."""
        return tokens * bytes_per_token(width, len(self.layers), self.dtype)

    def check_space(self, needed: int) -> None:
        """Make sure that the disk holds so many more bytes. Raises `BadRequest` if not."""
        check_cache_space(self.folder, needed)

    def verify(self) -> None:
        """Compare the checksums of all shards, shared out over the ranks. Raises `BadRequest` for a broken one."""
        with PartialState().split_between_processes(self.shards.paths) as share:
            self.shards.verify(with_progress(share, "Checking the teacher cache", "file"))

    def build(
        self,
        model: PreTrainedModel,
        examples: Sequence[Sequence[int]],
        missing: Sequence[int],
        budget: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Let the teacher read what is missing, shared out over the ranks, and write its states.

        A build that is cut off leaves whole shards, one that a signal ends all that was read; the next one goes on.

        Args:
            model: the teacher, without gradients.
            examples: token ids of each example.
            missing: which of them to add.
            budget: tokens in one forward pass; a longer example gets its own.
            autocast: makes the context that the teacher runs in.

        Raises:
            BadRequest: if an example is still missing afterwards, which means that not all ranks see the same folder.
            Interrupted: on all ranks, if any has got a signal.
        """
        state = PartialState()
        share = missing[state.process_index :: state.num_processes]
        tokens = sum(len(examples[i]) for i in share)
        self._write(model, (examples[i] for i in share), tokens, budget, autocast)
        if absent := sum(examples[i] not in self.shards for i in missing):
            raise BadRequest(
                f"{absent} examples are missing in {self.folder} after all ranks have written theirs. All "
                "ranks must see the same folder;",
                "name one on a shared disk.",
            )

    def extend(
        self,
        model: PreTrainedModel,
        examples: Iterable[Sequence[int]],
        budget: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> int:
        """Let the teacher read those of this rank's examples that are not there yet, however many come.

        It holds few of them at a time, and of those that it has written the keys. A call that is cut off leaves whole
        shards, one that a signal ends all that was read; the next one goes on.

        Args:
            model: the teacher, without gradients.
            examples: token ids of each example of this rank.
            budget: as for `build`.
            autocast: as for `build`.

        Returns:
            How many examples were written.

        Raises:
            Interrupted: on all ranks, if any has got a signal.
        """
        written: set[int] = set()

        def missing() -> Iterator[Sequence[int]]:
            for ids in examples:
                if WATCH.received is not None:
                    return
                key = example_key(ids)
                if key not in written and ids not in self.shards:
                    written.add(key)
                    yield ids

        self._write(model, missing(), None, budget, autocast)
        return len(written)

    def _write(
        self,
        model: PreTrainedModel,
        examples: Iterator[Sequence[int]],
        tokens: int | None,
        budget: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Write this rank's examples, of so many `tokens` if that is known, then read what all ranks have written."""
        teacher = OnlineTeacher(model, self.layers)
        enable_packing(model)
        packed = packing_problem(model) is None
        if not packed:
            disable_packing(model)
        writer = ShardWriter(self.folder, self.dtype, self.fingerprint)
        groups = iter(lambda: list(islice(examples, GROUP)), [])
        rows = (row for group in groups for row in _rows(group, budget, packed))
        with progress_bar(tokens, "Caching the teacher's states", "token", True) as bar, in_step_reading([teacher]):
            for row in rows:
                if WATCH.received is not None:
                    break
                with autocast():
                    states = teacher.features(send_to_device(row, model.device))
                for ids, own in _examples(row, cast(dict[int, torch.Tensor], states)):
                    writer.add(ids, own)
                    bar.update(len(ids))
        writer.flush()
        WATCH.check()
        PartialState().wait_for_everyone()
        self.shards.refresh()

    def read(self, input_ids: Sequence[int]) -> dict[int, torch.Tensor]:
        """The wanted states [T, d_t] of one example by layer, in bfloat16."""
        return self.shards.read(input_ids, self.wanted)


def _rows(examples: list[Sequence[int]], budget: int, packed: bool) -> Iterator[dict[str, Any]]:
    """What the teacher reads at once: packed rows, or batches of examples of like lengths, padded."""
    if packed:
        nothing = torch.zeros(0, dtype=torch.int64)
        answers = {"answer_index": nothing, "next_tokens": nothing}
        rows = [{"input_ids": torch.tensor(ids), "lengths": [len(ids)], "answers": [0], **answers} for ids in examples]
        yield from pack_step(rows, budget)
        return
    waiting = sorted(examples, key=len, reverse=True)
    while waiting:
        count = max(1, budget // len(waiting[0]))
        taken, waiting = [torch.tensor(ids) for ids in waiting[:count]], waiting[count:]
        mask = [torch.ones_like(ids) for ids in taken]
        yield {"input_ids": pad_sequence(taken, True), "attention_mask": pad_sequence(mask, True)}


def _examples(
    row: dict[str, Any], states: dict[int, torch.Tensor]
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """Token ids and states [T, d_t] by layer of each example that the teacher read at once."""
    if "packed_lengths" in row:
        tokens = row["input_ids"][0].split(row["packed_lengths"])
        split = (part[0].split(row["packed_lengths"]) for part in states.values())
        parts: Iterable[Sequence[torch.Tensor]] = zip(*split, strict=True)
    else:
        lengths = row["attention_mask"].sum(dim=1).tolist()
        tokens = [ids[:length] for ids, length in zip(row["input_ids"], lengths, strict=True)]
        parts = ([part[i, :length] for part in states.values()] for i, length in enumerate(lengths))
    for ids, own in zip(tokens, parts, strict=True):
        yield ids.tolist(), dict(zip(states, own, strict=True))


class CachedTeacher:
    """A teacher whose states come with the batch, from where `read` found them; of its weights it needs the head.

    Args:
        model: the teacher, or what `release_weights` left of it.
        read: gives the states [T, d_t] of an example by layer, from its token ids; the data collator calls it.
    """

    def __init__(self, model: PreTrainedModel, read: Callable[[Sequence[int]], dict[int, torch.Tensor]]) -> None:
        self.model, self.read, self._dtype = model, read, model.dtype
        self.num_layers = number_of_layers(model)
        self.hidden_size = state_width(model, [self.num_layers])

    def features(self, inputs: Mapping[str, Any]) -> dict[Feature, torch.Tensor]:
        """The states [B, T, d_t] by layer that the data collator put into a batch."""
        return inputs["teacher_states"]

    @torch.no_grad()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_t], from the vocabulary head alone."""
        return vocabulary_logits(self.model, states.to(self._dtype))

    def whole_head(self) -> AbstractContextManager[None]:
        """As `OnlineTeacher.whole_head`."""
        return whole_head(self.model)


def is_released(model: PreTrainedModel) -> bool:
    """Whether `release_weights` took the model's weights."""
    return any(parameter.is_meta for parameter in model.parameters())


def release_weights(model: PreTrainedModel, keep_head: bool) -> None:
    """Free a teacher's weights, so that it cannot run; its config and, if wanted, its vocabulary head are left."""
    head = model.get_output_embeddings()
    kept = {id(parameter) for parameter in head.parameters()} if keep_head else set()
    for spread in (own for own in model.parameters() if id(own) not in kept and isinstance(own, DTensor)):
        own_part(spread).untyped_storage().resize_(0)  # FSDP2 holds on to it
    for module in list(find_decoder(model).modules()):  # blocks go as a whole: quantised ones keep more than parameters
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList):
                setattr(module, name, nn.ModuleList())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in kept:
                nothing = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                setattr(module, name, nn.Parameter(nothing, requires_grad=False))
