"""What steps and trainings in processes of their own end with."""

import json

import pytest
import torch

from helpers import ddp_step, fault_child
from helpers.processes import Run


def one_step(folder, batch_size, accumulation, ranks, weights="1.0,1.0", tokens="", on_policy="", **changes):
    """What `ddp_step` writes of a step; `changes` are arguments of the training."""
    output = folder / f"{ranks}x{batch_size}x{accumulation}"
    asked = (str(output), str(batch_size), str(accumulation), weights, "tiny_llama", tokens, on_policy)
    run = Run(ddp_step.main, folder, *asked, json.dumps(changes), ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(f"{output}.pt", weights_only=True)


def assert_same_step(split, whole_batch):
    """Weights, log line and evaluation after a step are those of the whole batch in one process."""
    assert split["weights"].keys() == whole_batch["weights"].keys()
    for name, parameter in whole_batch["weights"].items():
        torch.testing.assert_close(
            split["weights"][name], parameter, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    names = {"loss", "cos_sim", "mercator_loss", "attention_loss", "relations_loss", "lm_loss"}
    for name in names & whole_batch["line"].keys():
        assert split["line"][name] == pytest.approx(whole_batch["line"][name], rel=1e-5), name
    assert split["evaluation"] == pytest.approx(whole_batch["evaluation"], rel=1e-4)


def finish(folder, checkpoint, settings, ranks, function=fault_child.train):
    """What a training writes that began anew or from a checkpoint."""
    resume = str(checkpoint) if checkpoint else None
    output = folder / "result.pt"
    run = Run(function, folder, str(folder / "run"), str(output), resume, settings, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(output, weights_only=True)
