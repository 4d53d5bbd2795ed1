"""Steps and runs with sharded weights in which one thing is another than usual."""

import os
from unittest import mock

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from helpers import sharded_run
from kava_trainer.models.sharding import units


def step_launched_in_bf16(*arguments):
    """As `step`, where not the arguments but the accelerate config asks for bfloat16."""
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "bf16"}):
        return sharded_run.step(*arguments)


def step_that_adds_up_in_bf16(*arguments):
    """As `step`, with gradients that are rounded before the ranks add them up, as accelerate has it of its own."""

    def policy(**options):
        return MixedPrecisionPolicy(**{**options, "reduce_dtype": torch.bfloat16})

    with mock.patch.object(units, "MixedPrecisionPolicy", policy):
        return sharded_run.step(*arguments)
