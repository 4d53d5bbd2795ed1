"""Teachers that are loaded by shards on gloo ranks."""

import hashlib
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.distillation.teacher_cache import CachedTeacher, is_released, release_weights
from kava_trainer.models.attention.capture import AttentionPart
from kava_trainer.models.layers import number_of_layers
from kava_trainer.models.sharding.checkpoint import StoredWeights
from kava_trainer.models.sharding.sizes import gathered_of_teacher, held_bytes
from kava_trainer.models.sharding.teacher import load_sharded
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.utils.distributed import own_part, whole
from kava_trainer.utils.errors import BadRequest

CPU = torch.device("cpu")


class RealMemory(TorchDispatchMode):
    """The most bytes of tensors that live at once within a `with` block.

    Of one that is spread over ranks the own part counts, of one on the meta device nothing, and of one whose storage
    FSDP2 has emptied nothing any more.
    """

    def __init__(self):
        super().__init__()
        self.peak, self._seen = 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._seen.add(own_part(tensor).untyped_storage())
        sizes = {storage._cdata: storage.nbytes() for storage in self._seen}
        self.peak = max(self.peak, sum(sizes.values()))
        return output


def by_shards(folder, **changes):
    """The teacher of a folder, of which this rank holds its share."""
    assert PartialState(cpu=True).num_processes > 1
    return load_sharded(ModelArguments(str(folder), **changes), CPU)


def by_shards_from_a_torn_file(folder):
    """Of two ranks the second cannot read a file; all of them end with the sentence that it says."""
    PartialState(cpu=True)
    original = StoredWeights.rows

    def rows(self, name, start, stop):
        if PartialState().process_index == 1 and "norm" in name:
            raise OSError(5, "Input/output error")
        return original(self, name, start, stop)

    with mock.patch.object(StoredWeights, "rows", rows):
        try:
            by_shards(folder)
        except BadRequest as error:
            print(error)
            return error.exit_code
    return 0


def own_hash(model):
    """Of what this rank holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + own_part(tensor).clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def look(folder, output, options):
    """Compare a sharded teacher with the whole one; rank 0 writes what each rank holds of it and held at most."""
    with RealMemory() as live:
        model = by_shards(folder, **options)
    before = own_hash(model)
    dtype = options.get("teacher_dtype", "auto")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    plain.eval()
    assert not any(own.requires_grad for own in model.parameters())
    assert not any(module.training for module in model.modules())
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(plain, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(whole(ours[name]), tensor), name
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    check_states(model, plain, ATTENTION)
    assert own_hash(model) == before
    held = held_bytes(model.parameters())
    check_release(model, plain)
    sizes = [held, live.peak, held_bytes(plain.parameters()), gathered_of_teacher(plain)]
    found = [None] * PartialState().num_processes
    torch.distributed.all_gather_object(found, sizes)
    if PartialState().is_main_process:
        torch.save(found, output)
    return 0


ATTENTION = [[2, AttentionPart(2, "query"), AttentionPart(3, "key")]]


def check_states(model, plain, more=()):
    """What both give are the same bits, whatever is captured and however much of the decoder runs for it."""
    depth = number_of_layers(plain)
    ids = torch.arange(1, 25).view(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for features in (*more, [1], [depth - 1], [1, 2, depth], [depth]):
        sharded, ours = OnlineTeacher(model, features), OnlineTeacher(plain, features)
        found, expected = sharded.features(batch), ours.features(batch)
        assert found.keys() == expected.keys()
        for name, states in expected.items():
            assert torch.equal(found[name], states), (features, name)
        for teacher in (sharded, ours):
            teacher.close()
    states = expected[depth]
    logits = ours.head(states)
    assert torch.equal(sharded.head(states), logits)
    with sharded.whole_head():  # as often as a rank likes
        for _ in range(1 + PartialState().process_index):
            assert torch.equal(sharded.head(states), logits)
    assert torch.equal(sharded.head(states), logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def check_release(model, plain):
    """What is left of a teacher whose states are cached is its head, still spread over the ranks."""
    before = [own_part(own) for own in model.parameters()]
    head = held_bytes(model.get_output_embeddings().parameters())
    release_weights(model, keep_head=True)
    assert sum(own.untyped_storage().nbytes() for own in before) == pytest.approx(head, rel=0.02)  # rows of padding
    assert is_released(model)
    states = torch.randn(3, 5, plain.config.hidden_size).to(plain.dtype)
    cached = CachedTeacher(model, lambda ids: {})
    with cached.whole_head():
        assert torch.equal(cached.head(states), CachedTeacher(plain, lambda ids: {}).head(states))


def look_at_each(folder, output):
    """Compare the sharded teacher with the whole one in each folder of a folder; rank 0 writes which are refused."""
    refused = {}
    for own in sorted(Path(folder).iterdir()):
        try:
            model = by_shards(own)
        except BadRequest as error:
            refused[own.name] = str(error)
            continue
        plain = AutoModelForCausalLM.from_pretrained(own).eval()
        check_states(model, plain)
    if PartialState().is_main_process:
        torch.save(refused, output)
    return 0
