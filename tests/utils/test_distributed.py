"""What the ranks of a run tell each other."""

import json

import pytest
import torch
from helpers import sharded_run
from helpers.models import tiny_llama
from helpers.processes import Run
from torch import nn

from kava_trainer.utils.distributed import in_step


@pytest.mark.parametrize(("items", "size", "passes"), [
    ([1, 3, 2, 4, 1], 1, 4 + 3 + 2),  # the ranks have 1, 3, 2 and 4, 1: the second one waits for the last of the first
    ([1, 3, 2], 2, 1 + 3),
    ([2], 1, 2),  # the second rank has nothing to read at all
])  # fmt: skip
def test_ranks_that_read_a_sharded_model_wait_for_each_other(tmp_path, items, size, passes):
    run = Run(sharded_run.read_in_step, tmp_path, str(tmp_path / "rank"), items, size, ranks=2)
    assert run.wait() == [0, 0], run.output()
    model, read = tiny_llama(32, 2).eval(), []
    for rank in range(2):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        read += [(int(number), values) for batch in told["found"] for number, values in batch.items()]
        assert told["passes"] == passes
    assert sorted(number for number, _ in read) == sorted(items)
    with torch.no_grad():
        for number, values in read:
            assert values == pytest.approx([model(torch.tensor([[1, number]])).logits.sum().item()] * number, rel=1e-5)


def test_a_model_that_is_read_in_step_is_left_as_it_was():
    model, idle = nn.Linear(2, 2), []
    with in_step(model, lambda: idle.append(1)):
        model(torch.ones(2))
    with pytest.raises(ValueError, match="broke"), in_step(model, lambda: idle.append(1)):
        raise ValueError("broke")
    assert idle == []
    assert not model._forward_pre_hooks
