"""FSDP2 on gloo ranks. Of all that takes part only accelerate keeps sharding to accelerators; here it does not."""

import json
import os
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import HashStore
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard

import run_kava
from helpers import ddp_step, fault_child, models, several
from helpers.sharded_teacher import by_shards, own_hash
from kava_trainer.config import launcher
from kava_trainer.trainer import saving, weights
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.distributed import in_step
from kava_trainer.utils.progress_bar import own_batches

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip
"""What `accelerate launch --config_file training_args/accelerate/fsdp2.yaml` puts into the environment."""


@contextmanager
def sharding_on_cpu():
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        new = not AcceleratorState._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if new:
            if os.environ.get("WORLD_SIZE", "1") == "1":  # accelerate has a group of one rank on a GPU alone
                torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            else:
                assert self.distributed_type == DistributedType.MULTI_CPU
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    with (
        mock.patch.dict(os.environ, LAUNCHED),
        mock.patch.object(launcher, "SHARDING_DEVICES", {"cpu"}),
        mock.patch.object(AcceleratorState, "__init__", init),
    ):
        yield


def step(*arguments):
    """One optimizer step of `ddp_step.py` with sharded weights."""
    with sharding_on_cpu():
        ddp_step.main(*arguments)
    return 0


def step_of_several(output, batch_size, accumulation, *folders):
    """One optimizer step of `several.py` with sharded weights, also of the teachers, which lie in these folders."""

    def load():
        return [by_shards(folder) for folder in folders]

    with sharding_on_cpu(), mock.patch.object(several, "new_teachers", load):
        several.step(output, batch_size, accumulation)
    return 0


def train(*arguments):
    """A trainer's run of `fault_child.py` with sharded weights."""
    with sharding_on_cpu():
        return fault_child.train(*arguments)


def train_under(folder, output, resume, settings):
    """As `train`, under the sharded teacher that lies in the folder `settings["teacher"]`."""
    with sharding_on_cpu():
        teacher = by_shards(settings["teacher"])
        before = own_hash(teacher)
        code = fault_child.train(folder, output, resume, {**settings, "teacher": teacher})
        assert own_hash(teacher) == before
        return code


def run(*arguments):
    """A whole run of `run_kava.py` with sharded weights, as `fault_child.py` starts it."""
    with sharding_on_cpu():
        return fault_child.run(*arguments)


def run_replicated(*arguments):
    """A whole run of `run_kava.py` with the whole student on every rank, where a teacher may be sharded."""
    with mock.patch.object(launcher, "SHARDING_DEVICES", {"cpu"}):
        return fault_child.run(*arguments)


def run_and_signal(*arguments):
    """As `run`, and a signal comes in the middle of it."""
    with sharding_on_cpu():
        return fault_child.run_and_signal(*arguments)


def main(arguments):
    """`run_kava.py` with a command line."""
    with sharding_on_cpu():
        return run_kava.main(arguments)


def train_with_a_full_disk(place, *arguments):
    """As `train`; the first save finds no room, on one rank alone."""
    owner, name, rank = {
        "student": (weights, "save_weights", "0"),
        "projector": (saving, "write_projectors", "0"),
        "shard": (FileSystemWriter, "write_data", "1"),
    }[place]
    original, calls = getattr(owner, name), 0

    def refuse(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 1 and os.environ["RANK"] == rank:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, refuse):
        return train(*arguments)


def train_with_a_bad_step(*arguments):
    """As `train`; the loss of one rank is no number in its third step."""
    original = KavaTrainer.compute_loss

    def compute(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = original(self, model, inputs, return_outputs, num_items_in_batch)
        bad = num_items_in_batch is not None and self.state.global_step == 2 and os.environ["RANK"] == "1"
        return loss * float("nan") if bad else loss

    with mock.patch.object(KavaTrainer, "compute_loss", compute):
        return train(*arguments)


def read_in_step(output, items, size):
    """Each rank runs a sharded model on its own batches, once for each number in them, and writes what it read."""
    rank = PartialState(cpu=True).process_index
    model = models.tiny_llama(32, 2)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.eval()
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(1))

    def read(number):
        with torch.no_grad():
            return model(torch.tensor([[1, number]])).logits.sum().item()

    found = []
    for batch in own_batches(items, size, "Work", lambda: in_step(model, lambda: read(0))):
        found.append({str(number): [read(number) for _ in range(number)] for number in batch})
    with open(f"{output}{rank}.json", "w") as file:
        json.dump({"found": found, "passes": len(passes)}, file)
    return 0
