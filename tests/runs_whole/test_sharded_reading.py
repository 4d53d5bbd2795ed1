"""What a sharded student is worth is what it is worth whole, and no rank ever holds it whole."""

import json
import os
import re

import pytest
import torch
from helpers import fault_child, held_bytes, sharded_reading, sharded_run
from helpers.data import write_problems
from helpers.models import tiny_llama, tiny_sizes
from helpers.outcomes import finish
from helpers.processes import Run
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kava_trainer.quickstart import STUDENT_FOLDER


def measured(folder, function, ranks, held_out, settings):
    run = Run(function, folder, str(folder / "run"), held_out, settings, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(folder / "run.pt", weights_only=True)


BRIDGE = {"projector_anchor": "pca", "projector_rank": 8, "projector_init": "least_squares"}


@pytest.mark.parametrize(("ranks", "held_out", "settings"), [
    (2, 7, {"projector_init": "least_squares", "kd_weight": 0.5}),
    (2, 1, {"projector_init": "least_squares", "kind": "untied"}),  # the second rank has nothing to read
    (2, 5, {"projector_anchor": "pca", "layer_mapping": "uniform:2", "kind": "untied"}),
    pytest.param(4, 6, BRIDGE, marks=pytest.mark.slow),
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


SAMPLING = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1, "projector_dropout": 0.0, "kd_weight": 1.0, "on_policy_fraction": 0.5,
    "on_policy_max_new_tokens": 9, "per_device_eval_batch_size": 1, "model": tiny_llama, "max_tokens_per_batch": 60,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"rollouts_every": 2}])
def test_sharded_students_answer_as_whole_ones_and_go_on_as_if_nothing_had_been(tmp_path, changes):
    """One rank has two of its three prompts to answer, one at a time, while the other has one."""
    settings = SAMPLING | changes
    straight = finish(tmp_path / "straight", None, settings, 2, function=sharded_run.train)
    resumed = finish(
        tmp_path / "again", tmp_path / "straight" / "run" / "checkpoint-2", settings, 2, function=sharded_run.train
    )
    whole = finish(tmp_path / "whole", None, settings, 2)
    assert straight["wrapper"] == "FSDPDistillationModel" != whole["wrapper"]
    for name in ("weights", "optimizer", "losses", "lines"):
        assert resumed[name] == straight[name], name
    assert straight["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    sampled = [[line for line in run["lines"] if "rollout_entropy" in line] for run in (straight, whole)]
    assert len(sampled[0]) == settings["max_steps"] // settings.get("rollouts_every", 1)
    for own, other in zip(*sampled, strict=True):
        assert own["rollout_length"] == other["rollout_length"]
        assert own["rollout_entropy"] == pytest.approx(other["rollout_entropy"], rel=1e-3)


def nothing_on_the_second_rank(prompts, student, sampling):
    return [[5, 7, 0] if os.environ.get("RANK", "0") == "0" else [] for _ in prompts]


@pytest.mark.slow
def test_ranks_whose_answers_say_nothing_make_as_many_passes(tmp_path):
    """Rows of one example, of which the second rank would have fewer if it left prompts without an answer out."""
    settings = SAMPLING | {"max_tokens_per_batch": 1, "rollout_fn": nothing_on_the_second_rank, "max_steps": 2}
    settings |= {"save_strategy": "no", "on_policy_fraction": 1.0}
    sharded = finish(tmp_path / "sharded", None, settings, 2, function=sharded_run.train)
    whole = finish(tmp_path / "whole", None, settings, 2)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_teacher_reads_answers_beside_its_cache(tmp_path):
    """In each step one rank has two answers for it to read, one at a time, and the other has one."""
    data = str(write_problems(tmp_path / "data.jsonl"))
    changes = {
        "teacher_cache_dir": str(tmp_path / "cache"), "teacher_sharding": "fsdp", "on_policy_fraction": 0.375,
        "on_policy_max_new_tokens": 4, "kd_weight": 1.0, "max_steps": 2, "eval_strategy": "no", "save_steps": 2,
        "projector_dropout": 0.0,
    }  # fmt: skip
    run = Run(sharded_run.run, tmp_path, tmp_path, data, changes, ranks=2)
    assert run.wait() == [0, 0], run.output()
    assert "spread over 2 processes" in run.output()


@pytest.mark.slow
def test_a_whole_sharded_run_finishes_with_the_student_of_a_replicated_one(tmp_path):
    """And measures it, its start and its control as that one does, on examples that two ranks cannot share evenly."""
    data = str(write_problems(tmp_path / "data.jsonl"))
    changes = {
        "max_steps": 4, "max_eval_samples": 5, "projector_dropout": 0.0, "generation_max_new_tokens": 6,
        "evaluate_generation": True, "run_control": True, "retention_dataset_name": data, "learning_rate": 1e-4,
    }  # fmt: skip
    folders = [tmp_path / "sharded", tmp_path / "replicated"]
    for folder, function in zip(folders, (sharded_run.run, fault_child.run), strict=True):
        folder.mkdir()
        run = Run(function, folder, folder, data, changes, ranks=2)
        assert run.wait() == [0, 0], run.output()
        assert re.search("^Time estimate: ", run.output(), re.M)
    summaries = [json.loads((folder / "out" / "run_summary.json").read_text()) for folder in folders]
    ours, theirs = (summary["evaluation"] for summary in summaries)
    assert ours.keys() == theirs.keys() == {"teacher", "student_before", "student_after", "control_sft"}
    for name, figures in theirs.items():
        assert ours[name] == pytest.approx(figures, rel=1e-5 if name in ("teacher", "student_before") else 1e-3), name
    assert summaries[0]["samples"] == summaries[1]["samples"]
    first, second = (load_file(folder / "out" / "final_student" / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, weight in second.items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_models_are_measured_on_shards_as_whole(tmp_path):
    options = {"evaluate_generation": True, "generation_max_new_tokens": 6, "max_eval_samples": 5}
    words = fault_child.words(tmp_path, str(write_problems(tmp_path / "data.jsonl")), **options)
    found = {}
    for function, ranks in ((sharded_reading.evaluate, 1), (sharded_reading.evaluate_sharded, 2)):
        run = Run(function, tmp_path, str(tmp_path / function.__name__), words, ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
        found[ranks] = [json.loads((tmp_path / f"{function.__name__}{rank}.json").read_text()) for rank in range(ranks)]
    (alone,) = found[1]
    for one in found[2]:
        assert (alone["sharded"], one["sharded"]) == ([False], [True])
        assert one["figures"].keys() == {"teacher", "student"}
        for name, figures in one["figures"].items():
            assert figures == pytest.approx(alone["figures"][name], rel=1e-5), name


@pytest.mark.slow
def test_a_sharded_student_writes_the_answers_of_a_replicated_one(tmp_path):
    options = {"max_train_samples": 7, "on_policy_max_new_tokens": 9, "per_device_eval_batch_size": 2}
    words = fault_child.words(tmp_path, str(write_problems(tmp_path / "data.jsonl")), **options)
    written = [tmp_path / "replicated.jsonl", tmp_path / "sharded.jsonl"]
    for path, function in zip(written, (sharded_reading.answer, sharded_reading.answer_sharded), strict=True):
        run = Run(function, tmp_path, str(path), words, ranks=2)
        assert run.wait() == [0, 0], run.output()
    replicated, sharded = (path.read_text().splitlines() for path in written)
    assert len(sharded) == 7
    assert sharded == replicated


@pytest.mark.slow
def test_terms_that_are_weighed_later_are_tried_out_on_shards(tmp_path):
    settings = SAMPLING | {"on_policy_fraction": 0.0, "kd_weight": 0.0, "max_steps": 2, "save_strategy": "no"}
    functions = (sharded_reading.train_with_another_term_sharded, sharded_reading.train_with_another_term)
    sharded, whole = (finish(tmp_path / own.__name__, None, settings, 2, function=own) for own in functions)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert all(line["kd_loss"] > 0 for line in sharded["lines"] if "loss" in line)
