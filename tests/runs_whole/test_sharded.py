"""FSDP2 on gloo ranks: the same steps as one process makes, and whole files on disk."""

import json
import re
import shlex
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import fault_child, outcomes, sharded_run
from helpers.data import random_examples, write_problems
from helpers.models import bfloat16_llama, llama_as_wide_as_the_teacher, tiny_llama
from helpers.outcomes import assert_same_step, one_step
from helpers.places import ROOT
from helpers.processes import Run
from helpers.programs import words
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import run_kava
from kava_trainer.config import launcher
from kava_trainer.config.parser import parse_arguments
from kava_trainer.data.collators import JoiningCollator
from kava_trainer.data.packing import as_many_rows, pack_step
from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import broken_reason, list_checkpoints
from kava_trainer.utils.errors import BadRequest

SLOW_SPLITS = [
    *(pytest.param(*split, marks=pytest.mark.slow) for split in ((2, 1, 4), (1, 4, 2))),
    pytest.param(1, 2, 4, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
]


@pytest.mark.parametrize(("batch_size", "accumulation", "ranks"), [(4, 1, 2), *SLOW_SPLITS])
def test_a_sharded_step_is_that_of_one_process(tmp_path, whole_batch, batch_size, accumulation, ranks):
    output = tmp_path / "step"
    run = Run(sharded_run.step, tmp_path, str(output), str(batch_size), str(accumulation), "1.0,1.0", ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    split = torch.load(f"{output}.pt", weights_only=True)
    assert (split["world_size"], split["wrapper"]) == (ranks, "FSDPDistillationModel")
    assert_same_step(split, whole_batch)


@pytest.mark.slow
def test_a_sharded_step_on_answers_of_a_file_is_that_of_one_process(tmp_path):
    whole = one_step(tmp_path, 8, 1, 1, tokens="all", on_policy="file")
    asked = (str(tmp_path / "step"), "4", "1", "1.0,1.0", "tiny_llama", "all", "file")
    run = Run(sharded_run.step, tmp_path, *asked, ranks=2)
    assert run.wait() == [0, 0], run.output()
    assert_same_step(torch.load(tmp_path / "step.pt", weights_only=True), whole)


SETTINGS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "logging_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "layer_mapping": "uniform:2", "projector_dropout": 0.1,
}  # fmt: skip


finish = partial(outcomes.finish, function=sharded_run.train)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        pytest.param(2, {"model": bfloat16_llama, "max_tokens_per_batch": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"optim": "adamw_torch_8bit"}, marks=pytest.mark.slow),
        pytest.param(4, {"optim": "adamw_torch_8bit"}, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_a_resumed_sharded_run_has_the_same_losses_and_weights(tmp_path, ranks, changes):
    settings = SETTINGS | {"max_tokens_per_batch": 40} | changes
    straight = finish(tmp_path / "straight", None, settings, ranks)
    assert (straight["world_size"], straight["wrapper"]) == (ranks, "FSDPDistillationModel")
    assert straight["packs"] == (settings["max_tokens_per_batch"] > 0)
    checkpoint = tmp_path / "straight" / "run" / "checkpoint-3"
    assert broken_reason(checkpoint) is None
    resumed = finish(tmp_path / "again", checkpoint, settings, ranks)
    for name in ("weights", "optimizer", "rates", "losses", "lines"):
        assert resumed[name] == straight[name], name


@pytest.mark.slow
def test_a_sharded_run_needs_no_projector(tmp_path):
    settings = SETTINGS | {"projector_direction": "none", "relative_mse_weight": 1.0, "max_steps": 4}
    settings |= {"kd_weight": 1.0, "kd_tokens": "all", "model": llama_as_wide_as_the_teacher}
    straight = finish(tmp_path / "straight", None, settings, 2)
    resumed = finish(tmp_path / "again", tmp_path / "straight" / "run" / "checkpoint-2", settings, 2)
    alone = outcomes.finish(tmp_path / "alone", None, settings | {"gradient_accumulation_steps": 4}, 1)
    for name in ("weights", "optimizer", "losses", "lines"):
        assert resumed[name] == straight[name], name
    assert straight["losses"] == pytest.approx(alone["losses"], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_run_goes_from_states_to_logits(tmp_path):
    """In the first half the projectors learn and the head does not, then the other way round; each half is resumed."""
    settings = SETTINGS | {"projector_dropout": 0.0, "max_steps": 4, "lm_weight": 0.0, "kd_weight": 1.0}
    settings |= {"alignment_schedule": "stage", "kd_schedule": "stage", "logging_steps": 1, "model": tiny_llama}
    straight = finish(tmp_path / "straight", None, settings, 2)
    assert [line.get("kd_loss") is None for line in straight["lines"] if "loss" in line] == [True, True, False, False]
    for stop in (1, 3):
        resumed = finish(tmp_path / f"again{stop}", tmp_path / "straight" / "run" / f"checkpoint-{stop}", settings, 2)
        for name in ("weights", "optimizer", "losses", "lines"):
            assert resumed[name] == straight[name], (stop, name)
    alone = outcomes.finish(tmp_path / "alone", None, settings | {"gradient_accumulation_steps": 4}, 1)
    assert straight["losses"] == pytest.approx(alone["losses"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "changes"),
    [
        (sharded_run.train, [((2, 2), (4, 1)), ((4, 1), (2, 2))]),
        (fault_child.train, [((1, 4), (2, 2)), ((4, 1), (1, 4))]),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, function, changes):
    """The same examples in the same steps, so without dropout the same weights, up to rounding."""
    settings = SETTINGS | {"projector_dropout": 0.0, "max_tokens_per_batch": 40, "model": tiny_llama, "count": 24}

    def trained(name, split, checkpoint=None):
        ranks, accumulation = split
        changed = {**settings, "gradient_accumulation_steps": accumulation}
        return finish(tmp_path / name, checkpoint, changed, ranks, function=function)

    splits = sorted({split for pair in changes for split in pair})
    straight = {split: trained("{}x{}".format(*split), split) for split in splits}
    for before, after in changes:
        checkpoint = tmp_path / "{}x{}".format(*before) / "run" / "checkpoint-3"
        resumed = trained(f"after{before[0]}", after, checkpoint)
        assert resumed["world_size"] == after[0] != before[0]
        assert resumed["losses"][-1] == pytest.approx(straight[after]["losses"][-1], rel=1e-4)
        assert resumed["optimizer"] == pytest.approx(straight[after]["optimizer"], rel=1e-2, abs=1e-6)
        kept, other = (
            load_file(tmp_path / name / "run" / "checkpoint-6" / "model.safetensors")
            for name in ("{}x{}".format(*after), f"after{before[0]}")
        )
        assert kept.keys() == other.keys()
        for name, tensor in kept.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_files_of_a_sharded_run_are_whole(tmp_path):
    settings = SETTINGS | {"max_steps": 2, "projector_dropout": 0.0, "projector_anchor": "reconstruction"}
    for name, function in (("sharded", sharded_run.train), ("replicated", fault_child.train)):
        finish(tmp_path / name, None, settings, 2, function=function)
    sharded, replicated = (tmp_path / name / "run" / "checkpoint-2" for name in ("sharded", "replicated"))
    student, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (sharded, replicated))
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (load_projectors(folder / "projector.pth") for folder in (sharded, replicated))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    decoders = [torch.load(f / "projector.pth", weights_only=True)["decoders"] for f in (sharded, replicated)]
    assert decoders[0].keys() == decoders[1].keys() != set()
    for name, tensor in decoders[0].items():
        torch.testing.assert_close(tensor, decoders[1][name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_whole_sharded_run_with_control_and_signal(tmp_path):
    """`run_kava.py` with everything on, stopped by a signal on the way, resumed with what it printed."""
    data = str(write_problems(tmp_path / "data.jsonl"))
    (tmp_path / "straight").mkdir()
    changes = {"run_control": "true", "evaluate_generation": "true", "generation_max_new_tokens": "8"}
    stopped = Run(sharded_run.run_and_signal, tmp_path, tmp_path, data, "training", "SIGTERM", 1, 1, changes, ranks=2)
    assert stopped.wait() == [143, 143], stopped.output()
    assert "Saved after step" in stopped.output()
    command = re.search(r"^Resume with: (.*)$", stopped.output(), re.M)[1]
    assert command.startswith("accelerate launch --config_file training_args/accelerate/fsdp2.yaml --num_processes 2 ")
    words = shlex.split(command)
    start = next(place for place, word in enumerate(words) if word.endswith("run_kava.py"))
    resumed = Run(sharded_run.main, tmp_path, words[start + 1 :], ranks=2)
    assert resumed.wait() == [0, 0], resumed.output()
    assert re.search(r"^Resuming from .*checkpoint-\d+\.$", resumed.output(), re.M)
    straight = Run(sharded_run.run, tmp_path / "straight", tmp_path / "straight", data, changes, ranks=2)
    assert straight.wait() == [0, 0], straight.output()
    folders = [tmp_path / "out", tmp_path / "straight" / "out"]
    summaries = [json.loads((folder / "run_summary.json").read_text()) for folder in folders]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]
    assert summaries[0]["evaluation"]["control_sft"]["perplexity"] > 0
    assert not [reason for reason in summaries[0]["verdict"]["reasons"] if "not whole" in reason]
    for folder in folders:
        assert {broken_reason(checkpoint) for checkpoint in list_checkpoints(folder)} == {None}
    assert summaries[0]["final"] == summaries[1]["final"]
    first, second = (load_file(folder / "final_student" / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_rows_are_halved_until_all_ranks_have_as_many(tokenizer):
    rows = pack_step([JoiningCollator(None)(random_examples(9))], 60)
    more = as_many_rows(rows, len(rows) + 3)
    assert len(more) == len(rows) + 3
    for name in ("input_ids", "next_tokens"):
        joined = [torch.cat([row[name].flatten() for row in group]).sort().values for group in (rows, more)]
        assert torch.equal(*joined)
    assert as_many_rows(rows, 1) == rows


LAUNCHED = sharded_run.LAUNCHED


def problems_of(**changes):
    training = SimpleNamespace(bf16=False, fp16=False, optim="adamw_torch_fused", save_on_each_node=False)
    training.__dict__.update(changes)
    return [str(one) for one in launcher.engine_problems(None, None) + launcher.sharding_problems(training)]


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "write fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "without its weights"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "write fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "gradient_checkpointing"),
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {}, "Write fsdp_state_dict_type: SHARDED_STATE_DICT"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}, "Write fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, {}, "leave it out, the blocks are known"),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            {},
            "Mixed precision in fp16 is not supported under FSDP2; write bf16 true",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "Mixed precision in fp8 is not supported under FSDP2"),
        ({}, {"fp16": True}, "write bf16 true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"fp16": True}, "Mixed precision in fp16"),
        ({}, {"optim": "adamw_bnb_8bit"}, "cannot update sharded weights"),
        ({}, {"optim": "paged_adamw_32bit"}, "write adamw_torch_8bit"),
        ({}, {"save_on_each_node": True}, "need a folder that all share"),
    ],
)
def test_what_would_go_wrong_with_sharded_weights_is_refused(monkeypatch, environment, changes, message):
    for name, value in (LAUNCHED | environment).items():
        monkeypatch.setenv(name, value)
    (problem,) = problems_of(**changes)
    assert message in problem


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (problem,) = problems_of()
    assert problem.startswith(
        "deepspeed is not supported; shard with FSDP2 in its place: accelerate launch --config_file"
    )
    assert "fsdp2.yaml" in problem


@pytest.mark.parametrize("device", ["cuda", "cpu", "xpu"])
def test_the_config_that_comes_along_shards_on_cuda_alone(monkeypatch, device):
    assert launcher.device_problem(device) is None
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert problems_of(optim="adamw_torch_8bit") == problems_of(bf16=True) == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert problems_of() == []
    problem = launcher.device_problem(device)
    assert (problem is None) == (device == "cuda")
    assert device != "cpu" or "plain data parallelism" in str(problem)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "student_quantization",
            "4bit",
            "student_quantization is 4bit, but FSDP2 cannot spread such weights; write none, or start with DDP",
        ),
        ("student_quantization", "8bit", "student_quantization is 8bit, but FSDP2 cannot spread such weights"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(monkeypatch, name, value, told):
    for variable, setting in LAUNCHED.items():
        monkeypatch.setenv(variable, setting)
    monkeypatch.setattr(launcher, "SHARDING_DEVICES", {"cpu"})
    options = {"teacher_model_name_or_path": "quickstart", "student_model_name_or_path": TEACHER_FOLDER}
    options |= {"dataset_name": "quickstart", name: value, "use_cpu": "true", "use_peft": "true"}
    with pytest.raises(BadRequest, match=told):
        parse_arguments(words(options))


def test_sharding_asked_for_on_a_cpu_ends_the_run_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert run_kava.main(["training_args/quickstart.json", "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert "FSDP was asked for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", ["shard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("student", "projector"))]
)
def test_a_disk_that_refuses_one_rank_costs_a_sharded_save_and_no_run(tmp_path, place):
    settings = SETTINGS | {"max_steps": 3}
    output = tmp_path / "result.pt"
    run = Run(
        sharded_run.train_with_a_full_disk, tmp_path, place, str(tmp_path / "run"), str(output), None, settings, ranks=2
    )
    assert run.wait() == [0, 0], run.output()
    result = torch.load(output, weights_only=True)
    assert [problem["kind"] for problem in result["problems"]] == ["save"]
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_everything_beside_the_loss_works_with_sharded_weights(tmp_path):
    """The best model, the projectors' start, an anchor, the divergence, a step that is skipped, and a finished run."""
    settings = SETTINGS | {
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_steps": 2, "kd_weight": 0.5,
        "projector_anchor": "pca", "projector_init": "least_squares", "calibration_tokens": 300,
    }  # fmt: skip
    first = finish(tmp_path / "first", None, settings, 2, function=sharded_run.train_with_a_bad_step)
    assert [problem["kind"] for problem in first["problems"]] == ["nan"]
    again = finish(tmp_path / "again", tmp_path / "first" / "run" / "checkpoint-6", settings, 2)
    assert again["weights"] == first["weights"]
    assert again["problems"] == first["problems"]


CONFIGS = sorted((ROOT / "training_args" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert not config.use_cpu


def test_the_environment_of_the_tests_is_that_of_the_config():
    path = str(ROOT / "training_args" / "accelerate" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "run_kava.py"])
    arguments = _validate_launch_command(arguments)[0]
    environment = prepare_multi_gpu_env(arguments)
    assert {name: environment[name] for name in LAUNCHED} == LAUNCHED
