"""What a sharded student is worth is what it is worth whole, and no rank ever holds it whole."""

import json

import pytest
import torch
from helpers import held_bytes, sharded_reading
from helpers.data import write_problems
from helpers.models import tiny_sizes
from helpers.processes import Run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kava_trainer.quickstart import STUDENT_FOLDER


def measured(folder, function, ranks, held_out, settings):
    run = Run(function, folder, str(folder / "run"), held_out, settings, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(folder / "run.pt", weights_only=True)


@pytest.mark.parametrize(("ranks", "held_out", "settings"), [
    (2, 7, {"projector_init": "least_squares", "kd_weight": 0.5}),
    (2, 1, {"projector_init": "least_squares", "kind": "untied"}),  # the second rank has nothing to read
    (2, 5, {"projector_anchor": "pca", "layer_mapping": "uniform:2", "kind": "untied"}),
    pytest.param(4, 6, {"projector_anchor": "pca", "projector_rank": 8}, marks=pytest.mark.slow),
])  # fmt: skip
def test_figures_of_a_sharded_student_are_those_of_the_whole_one(tmp_path, ranks, held_out, settings):
    alone = measured(tmp_path / "alone", sharded_reading.measure, 1, held_out, settings)
    sharded = measured(tmp_path / "sharded", sharded_reading.measure_sharded, ranks, held_out, settings)
    assert (sharded["sharded"], sharded["held"]) == (True, {"DTensor"})
    assert len({len(answer) for answer in alone["answers"]}) == min(held_out, 2) or held_out > 2
    assert sharded["answers"] == alone["answers"]
    for name in ("figures", "again", "metrics", "probe"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    for name in ("figures", "again"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-5), name
    assert sharded["projectors"].keys() == alone["projectors"].keys() != set()
    for name, tensor in alone["projectors"].items():
        torch.testing.assert_close(sharded["projectors"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


SMALL_STEPS = {
    "max_steps": 2, "save_steps": 1, "eval_steps": 1, "optim": "sgd", "gradient_checkpointing": True, "max_length": 48,
    "evaluate_generation": True, "generation_max_new_tokens": 4, "run_control": False, "max_eval_samples": 3,
    "projector_init": "least_squares", "calibration_tokens": 300, "max_tokens_per_batch": 96,
}  # fmt: skip


def held(folder, ranks, gathers=""):
    """The size of a student of many blocks, and what each rank holds of it in the stages of a run."""
    student = LlamaForCausalLM(LlamaConfig(**tiny_sizes(64, 16) | {"intermediate_size": 256}))
    student.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(folder / "student")
    data = str(write_problems(folder / "data.jsonl", 12))
    changes = {**SMALL_STEPS, "student_model_name_or_path": str(folder / "student")}
    run = Run(held_bytes.run, folder, str(folder / "rank"), folder, data, changes, gathers, ranks=ranks)
    assert run.wait(300) == [0] * ranks, run.output()
    size = sum(weight.numel() * weight.element_size() for weight in student.parameters())
    return size, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


MOST = {"evaluation": 0.8, "calibration": 0.8, "training": 1.7, "time": 2.2}
"""Shares of the student that a rank of two holds at most: its half, that of the gradients and, where passes are timed,
of a copy, what is gathered for a block or two, and what passes take. With all weights there would be one more."""

WRITTEN = {"checkpoint": 0.8, "export": 0.8}
"""Likewise, but the main process's host takes all that is written, and a CPU is host and device."""


def test_no_rank_ever_holds_the_whole_student(tmp_path):
    size, ranks = held(tmp_path, 2)
    for rank, found in enumerate(ranks):
        assert found["shards"] < 0.55 * size
        for stage, most in (MOST | (WRITTEN if rank else {})).items():
            assert 0 < found[stage] < most * size, (rank, stage)


@pytest.mark.slow
def test_a_rank_that_held_the_whole_student_would_be_seen(tmp_path):
    size, ranks = held(tmp_path, 2, gathers="evaluation")
    assert all(found["evaluation"] > 1.5 * size > MOST["evaluation"] * size for found in ranks)


@pytest.mark.slow
def test_the_more_ranks_the_less_each_holds(tmp_path):
    for ranks in (2, 4):
        (tmp_path / str(ranks)).mkdir()
    (size, two), (_, four) = held(tmp_path / "2", 2), held(tmp_path / "4", 4)
    for stage in ("shards", *MOST, *WRITTEN):
        assert max(found[stage] for found in four[1:]) < two[1][stage] - 0.15 * size, stage
