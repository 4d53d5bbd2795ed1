"""What a rank of a sharded run has in memory at once, stage by stage."""

import gc
import json
import os
import weakref
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import fault_child
from helpers.sharded_run import sharding_on_cpu
from kava_trainer.runs import pipeline
from kava_trainer.trainer.student_trainer import StudentTrainer
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.distributed import own_part


class HeldBytes(TorchDispatchMode):
    """Adds up the storages alive at each operation, those of a model and all that are made from here on.

    FSDP2 takes the memory of some of its storages away and gives it back, so their sizes are asked for every time.
    """

    def __init__(self, model):
        super().__init__()
        self.peaks, self.stage = {}, "beside the stages"
        self._others, self._own = weakref.WeakValueDictionary(), weakref.WeakValueDictionary()
        for tensor in (own for own in gc.get_objects() if type(own) in (torch.Tensor, torch.nn.Parameter)):
            self._others[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        for tensor in (*model.parameters(), *model.buffers()):
            storage = own_part(tensor.detach()).untyped_storage()
            self._others.pop(storage._cdata, None)
            self._own[storage._cdata] = storage
        self.shards = self.now()

    def now(self):
        return sum(storage.nbytes() for storage in list(self._own.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        found = [own_part(leaf).untyped_storage() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        new = [one for one in found if one._cdata not in self._others and one._cdata not in self._own]
        self._own.update((storage._cdata, storage) for storage in new)
        if new:
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), self.now())
        return output


STAGES = {
    "time": (pipeline, "tell_time"), "evaluation": (pipeline, "_evaluate"), "training": (pipeline, "_train"),
    "export": (pipeline, "save_student"), "calibration": (KavaTrainer, "calibrate"),
    "checkpoint": (StudentTrainer, "save_model"),
}  # fmt: skip


def run(output, folder, data, changes, gathers=""):
    """A whole run; each rank writes the most bytes that it has held in each stage, and how many its shards take.

    With `gathers` each rank gathers all weights in the middle of that stage.
    """
    held, began = {}, StudentTrainer.shard

    def shard(trainer):
        began(trainer)
        if not held:
            held["bytes"] = HeldBytes(trainer.model).__enter__()
            held["trainer"] = trainer

    def within(stage, original):
        def call(*args, **kwargs):
            before, held["bytes"].stage = held["bytes"].stage, stage
            try:
                if stage == gathers:
                    every = [own.full_tensor() for own in held["trainer"].student.parameters()]
                    assert len(every) > 1
                return original(*args, **kwargs)
            finally:
                held["bytes"].stage = before

        return call

    with sharding_on_cpu(), ExitStack() as patches:
        patches.enter_context(mock.patch.object(StudentTrainer, "shard", shard))
        for stage, (owner, name) in STAGES.items():
            patches.enter_context(mock.patch.object(owner, name, within(stage, getattr(owner, name))))
        code = fault_child.run(folder, data, changes)
        held["bytes"].__exit__(None, None, None)
    content = {"shards": held["bytes"].shards, **held["bytes"].peaks}
    with open(f"{output}{os.environ['RANK']}.json", "w") as file:
        json.dump(content, file)
    return code
