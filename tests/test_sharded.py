"""FSDP2 on gloo ranks: the same steps as one process makes, and whole files on disk."""

import json

import fault_child
import pytest
import sharded_run
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, random_examples, tiny_llama
from processes import Run, write_problems
from safetensors.torch import load_file
from test_invariants import one_step
from transformers import AutoModelForCausalLM

import run_kava
from kava_trainer import engines
from kava_trainer.collating import JoiningCollator, as_many_rows, pack_step
from kava_trainer.projector import load_projectors

SLOW_SPLITS = [pytest.param(*split, marks=pytest.mark.slow) for split in ((1, 4, 2), (1, 2, 4))]


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("whole"), 8, 1, 1)


@pytest.mark.parametrize(("batch_size", "accumulation", "ranks"), [(4, 1, 2), (2, 1, 4), *SLOW_SPLITS])
def test_a_sharded_step_is_that_of_one_process(tmp_path, whole_batch, batch_size, accumulation, ranks):
    output = tmp_path / "step"
    run = Run(sharded_run.step, tmp_path, str(output), str(batch_size), str(accumulation), "1.0,1.0", ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    split = torch.load(f"{output}.pt", weights_only=True)
    assert (split["world_size"], split["wrapper"]) == (ranks, "FSDPDistillationModel")
    assert split["weights"].keys() == whole_batch["weights"].keys()
    for name, parameter in whole_batch["weights"].items():
        torch.testing.assert_close(
            split["weights"][name], parameter, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("loss", "cos_sim", "mercator_loss", "lm_loss"):
        assert split["line"][name] == pytest.approx(whole_batch["line"][name], rel=1e-5), name
    assert split["evaluation"] == pytest.approx(whole_batch["evaluation"], rel=1e-4)


SETTINGS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "logging_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "layer_mapping": "uniform:2", "projector_dropout": 0.1,
}  # fmt: skip


def finish(folder, checkpoint, settings, ranks, function=sharded_run.train):
    resume = str(checkpoint) if checkpoint else None
    output = folder / "result.pt"
    run = Run(function, folder, str(folder / "run"), str(output), resume, settings, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((4, {}), (2, {"bf16": True, "max_tokens_per_batch": 0}), (4, {"bf16": True}))
        ),
    ],
)
def test_a_resumed_sharded_run_has_the_same_losses_and_weights(tmp_path, ranks, changes):
    settings = SETTINGS | {"max_tokens_per_batch": 40} | changes
    straight = finish(tmp_path / "straight", None, settings, ranks)
    assert (straight["world_size"], straight["wrapper"]) == (ranks, "FSDPDistillationModel")
    assert straight["packs"] == (settings["max_tokens_per_batch"] > 0)
    resumed = finish(tmp_path / "again", tmp_path / "straight" / "run" / "checkpoint-3", settings, ranks)
    for name in ("weights", "optimizer", "rates", "losses", "lines"):
        assert resumed[name] == straight[name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        (sharded_run.train, (2, 2), (4, 1)),
        (sharded_run.train, (4, 1), (2, 2)),
        (fault_child.train, (1, 4), (2, 2)),
        (fault_child.train, (4, 1), (1, 4)),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, function, before, after):
    """The same examples in the same steps, so without dropout the same weights, up to rounding."""
    settings = SETTINGS | {"projector_dropout": 0.0, "max_tokens_per_batch": 40, "model": tiny_llama, "count": 24}

    def split(ranks, accumulation):
        return {**settings, "gradient_accumulation_steps": accumulation}, ranks

    straight = finish(tmp_path / "straight", None, *split(*after), function)
    finish(tmp_path / "before", None, *split(*before), function)
    checkpoint = tmp_path / "before" / "run" / "checkpoint-3"
    resumed = finish(tmp_path / "after", checkpoint, *split(*after), function)
    assert resumed["world_size"] == after[0] != before[0]
    assert resumed["losses"][-1] == pytest.approx(straight["losses"][-1], rel=1e-4)
    assert resumed["optimizer"] == pytest.approx(straight["optimizer"], rel=1e-2, abs=1e-6)
    kept, other = (
        load_file(tmp_path / name / "run" / "checkpoint-6" / "model.safetensors") for name in ("straight", "after")
    )
    assert kept.keys() == other.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_files_of_a_sharded_run_are_whole(tmp_path):
    settings = SETTINGS | {"max_steps": 2, "projector_dropout": 0.0, "projector_anchor": "reconstruction"}
    for name, function in (("sharded", sharded_run.train), ("replicated", fault_child.train)):
        finish(tmp_path / name, None, settings, 2, function)
    sharded, replicated = (tmp_path / name / "run" / "checkpoint-2" for name in ("sharded", "replicated"))
    student, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (sharded, replicated))
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (load_projectors(folder / "projector.pth") for folder in (sharded, replicated))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    decoders = [torch.load(f / "projector.pth", weights_only=True)["decoders"] for f in (sharded, replicated)]
    assert decoders[0].keys() == decoders[1].keys() != set()


@pytest.mark.slow
def test_a_whole_sharded_run_with_control_and_signal(tmp_path):
    """`run_kava.py` with everything on, stopped by a signal on the way, resumed with what it printed."""
    data = str(write_problems(tmp_path / "data.jsonl"))
    (tmp_path / "straight").mkdir()
    changes = {"run_control": "true", "evaluate_generation": "true", "generation_max_new_tokens": "8"}
    stopped = Run(sharded_run.run_and_signal, tmp_path, tmp_path, data, "training", "SIGTERM", 1, 1, changes, ranks=2)
    assert stopped.wait() == [143, 143], stopped.output()
    assert "Saved after step" in stopped.output()
    resumed = Run(sharded_run.run, tmp_path, tmp_path, data, changes, ranks=2)
    assert resumed.wait() == [0, 0], resumed.output()
    straight = Run(sharded_run.run, tmp_path / "straight", tmp_path / "straight", data, changes, ranks=2)
    assert straight.wait() == [0, 0], straight.output()
    folders = [tmp_path / "out", tmp_path / "straight" / "out"]
    summaries = [json.loads((folder / "run_summary.json").read_text()) for folder in folders]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]
    assert summaries[0]["evaluation"]["control_sft"]["perplexity"] > 0
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


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        (FSDP, "cpu", "on a cpu device transformers runs plain data parallelism in its place"),
        (FSDP | {"FSDP_VERSION": "1"}, "cuda", "write fsdp_version: 2"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "cuda", "without its weights"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "cuda", "write fsdp_offload_params: false"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "cuda", "gradient_checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "cuda", "deepspeed is not supported; shard with FSDP2"),
    ],
)
def test_what_would_not_be_done_as_asked_is_refused(monkeypatch, environment, device, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    problems = [*engines.engine_problems(None, None), engines.device_problem(device)]
    assert [problem for problem in problems if problem] == [next(p for p in problems if p and message in p)]


def test_nothing_is_refused_of_the_config_that_comes_along(monkeypatch):
    for name, value in sharded_run.LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert engines.engine_problems(True, None) == []
    assert engines.device_problem("cuda") is None


def test_sharding_asked_for_on_a_cpu_ends_the_run_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    for name, value in sharded_run.LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert run_kava.main(["training_args/quickstart.json", "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert "FSDP was asked for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert {name: environment[name] for name in sharded_run.LAUNCHED} == sharded_run.LAUNCHED
