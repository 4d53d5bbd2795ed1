"""One step with sharded weights, and what the ranks send each other in it."""

from unittest import mock

import torch
from torch import distributed

from helpers import sharded_run
from kava_trainer.trainer.trainer import KavaTrainer

GATHERS, SCATTERS = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")
"""Of which torch has one or both; the newer name comes first, and calls the older one where both are."""


def step(output, *arguments):
    """As `sharded_run.step`; rank 0 also writes the bytes of all that is gathered and scattered in its passes."""
    counts, is_counted = {"gathered": 0, "scattered": 0}, False
    original = KavaTrainer.training_step

    def training_step(self, *args, **kwargs):
        nonlocal is_counted
        is_counted = True
        try:
            return original(self, *args, **kwargs)
        finally:
            is_counted = False

    def counting(kind, names, place):
        name = next(name for name in names if hasattr(distributed, name))
        sent = getattr(distributed, name)

        def call(*args, **kwargs):
            whole = kwargs[place] if place in kwargs else args[0]
            counts[kind] += whole.nbytes if is_counted else 0
            return sent(*args, **kwargs)

        return mock.patch.object(distributed, name, call)

    with (
        counting("gathered", GATHERS, "output_tensor"),
        counting("scattered", SCATTERS, "input"),
        mock.patch.object(KavaTrainer, "training_step", training_step),
    ):
        code = sharded_run.step(output, *arguments)
    if distributed.get_rank() == 0:
        torch.save(counts, f"{output}-traffic.pt")
    return code
