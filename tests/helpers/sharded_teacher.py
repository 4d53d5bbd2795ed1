"""Teachers that are loaded by shards on gloo ranks."""

import hashlib

import torch
from accelerate import PartialState

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.sharding.teacher import load_sharded
from kava_trainer.utils.distributed import own_part


def by_shards(folder, **changes):
    """The teacher of a folder, of which this rank holds its share."""
    assert PartialState(cpu=True).num_processes > 1
    return load_sharded(ModelArguments(str(folder), **changes), torch.device("cpu"))


def own_hash(model):
    """Of what this rank holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + own_part(tensor).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
