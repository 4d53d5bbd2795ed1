"""A sharded teacher over a student that is sharded too, or not: the same steps as one process makes."""

import pytest
import torch
from helpers import ddp_step, sharded_run
from helpers.outcomes import assert_same_step, one_step
from helpers.processes import Run
from helpers.trainers import tiny_teacher

STATES = {"weighting": "1.0,1.0", "tokens": "", "changes": "{}"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(folder)
    return str(folder)


CASES = {
    "states": ("1.0,1.0", "", {}),
    "logits": ("1.0,1.0", "all", {}),
    "logits, padded": ("0.0,1.0", "answers", {"max_tokens_per_batch": 0}),
    "inner layers": ("1.0,1.0", "", {"layer_mapping": "[[1, 2]]"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [sharded_run.step, ddp_step.main])
def test_a_step_under_a_sharded_teacher_is_that_of_one_process(tmp_path, teacher, case, step):
    import json

    weighting, tokens, changes = CASES[case]
    alone = one_step(tmp_path, 8, 1, 1, weighting, tokens, **changes)
    output = str(tmp_path / "step")
    asked = (output, "4", "1", weighting, "tiny_llama", tokens, "", json.dumps(changes), teacher)
    run = Run(step, tmp_path, *asked, ranks=2)
    assert run.wait() in ([0, 0], [None, None]), run.output()
    assert_same_step(torch.load(f"{output}.pt", weights_only=True), alone)
