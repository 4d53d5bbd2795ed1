"""FSDP2 on gloo ranks in bfloat16 and with adapters: steps, checkpoints and exports."""

import json
from functools import partial

import pytest
import torch
from helpers import ddp_step, outcomes, sharded_run, sharded_variants
from helpers.data import write_problems
from helpers.models import lora_llama_of_rank_1, lora_llama_with_a_trained_head, tiny_llama, tiny_lora_llama
from helpers.outcomes import assert_same_step
from helpers.processes import Run
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.distillation.pairing import check_student
from kava_trainer.models.student import student_config
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import broken_reason
from kava_trainer.utils.errors import BadRequest

PADDED = {"max_tokens_per_batch": 0}
"""The examples of a rank are then those of a micro-batch of one process."""


def step(folder, function, ranks, batch_size, accumulation, student="tiny_llama", **changes):
    asked = (str(folder / "step"), str(batch_size), str(accumulation), "1.0,1.0", student, "", "")
    run = Run(function, folder, *asked, json.dumps({**PADDED, **changes}), ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(folder / "step.pt", weights_only=True)


def distance(one, other, names):
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in names)


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """One process: a step of two micro-batches."""
    return step(tmp_path_factory.mktemp("alone"), ddp_step.main, 1, 4, 2, bf16=True)


def test_a_sharded_step_in_bf16_is_that_of_one_process(tmp_path, in_bf16):
    """Its products are the same ones; only the norms' weights are rounded, which autocast leaves as they are."""
    split = step(tmp_path / "split", sharded_run.step, 2, 4, 1, bf16=True)
    rounded = step(tmp_path / "rounded", sharded_variants.step_that_adds_up_in_bf16, 2, 4, 1, bf16=True)
    assert {weight.dtype for weight in split["weights"].values()} == {torch.float32}
    assert split["weights"].keys() == in_bf16["weights"].keys()
    norms = {name for name in split["weights"] if "layernorm" in name}
    products = split["weights"].keys() - norms
    assert distance(split, in_bf16, products) < 1e-6 < 1e-5 < distance(rounded, in_bf16, products)
    assert distance(split, in_bf16, norms) < 1e-4
    for name in ("loss", "cos_sim", "mercator_loss", "lm_loss"):
        assert split["line"][name] == pytest.approx(in_bf16["line"][name], rel=1e-6), name
    assert split["line"]["grad_norm"] == pytest.approx(in_bf16["line"]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_step_in_bf16_is_no_further_from_float32_than_that_of_one_process(tmp_path, in_bf16):
    exact = step(tmp_path / "exact", ddp_step.main, 1, 4, 2)
    split = step(tmp_path / "split", sharded_run.step, 2, 2, 2, bf16=True)
    names = exact["weights"].keys()
    assert 1e-4 < distance(split, exact, names) < 1.1 * distance(in_bf16, exact, names)


@pytest.mark.slow
def test_gradients_of_a_sharded_step_in_bf16_are_clipped_as_in_one_process(tmp_path):
    clipped = {"bf16": True, "max_grad_norm": 0.5}
    alone = step(tmp_path / "alone", ddp_step.main, 1, 4, 2, **clipped)
    split = step(tmp_path / "split", sharded_run.step, 2, 4, 1, **clipped)
    assert distance(split, alone, alone["weights"].keys()) < 1e-5
    assert split["line"]["grad_norm"] == pytest.approx(alone["line"]["grad_norm"], rel=1e-5)
    assert alone["line"]["grad_norm"] > 1


@pytest.mark.slow
def test_an_accelerate_config_asks_for_bf16_as_the_arguments_do(tmp_path):
    asked = step(tmp_path / "asked", sharded_run.step, 2, 4, 1, bf16=True)
    launched = step(tmp_path / "launched", sharded_variants.step_launched_in_bf16, 2, 4, 1)
    assert distance(asked, launched, asked["weights"].keys()) == 0
    assert asked["line"] == launched["line"]


@pytest.mark.parametrize(
    ("student", "ranks", "batch_size"),
    [
        ("tiny_lora_llama", 2, 4),
        pytest.param("lora_llama_of_rank_1", 4, 2, marks=pytest.mark.slow),
        pytest.param("tiny_lora_llama", 4, 2, marks=pytest.mark.slow),
        pytest.param("lora_llama_with_a_trained_head", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_step_of_adapters_is_that_of_one_process(tmp_path, student, ranks, batch_size):
    heads = []
    alone = step(tmp_path / "alone", ddp_step.main, 1, batch_size, ranks, student)
    split = step(tmp_path / "split", sharded_run.step, ranks, batch_size, 1, student)
    assert split["wrapper"] == "FSDPDistillationModel"
    for state in (split, alone):  # a head in bfloat16 is as near as that is
        head = state["weights"].pop("student.lm_head.modules_to_save.default.weight", None)
        heads.append(head)
    if heads[0] is not None:
        torch.testing.assert_close(*heads, rtol=2**-7, atol=1e-4)
    assert_same_step(split, alone)


finish = partial(outcomes.finish, function=sharded_run.train)

SETTINGS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "logging_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "max_tokens_per_batch": 40,
}  # fmt: skip

KINDS = {
    "bf16": {"bf16": True},
    "adapters": {"model": tiny_lora_llama},
    "adapters in bf16": {"model": tiny_lora_llama, "bf16": True},
    "adapters and head": {"model": lora_llama_with_a_trained_head},
    "adapters of one row": {"model": lora_llama_of_rank_1},
    "adapters, activations computed twice": {"model": tiny_lora_llama, "gradient_checkpointing": True},
}


IN_EVERY_RUN = ("bf16", "adapters", "adapters of one row")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in IN_EVERY_RUN else pytest.mark.exhaustive) for kind in KINDS]
)
def test_a_resumed_sharded_run_has_the_same_losses_and_weights(tmp_path, kind):
    settings = SETTINGS | {"projector_dropout": 0.1} | KINDS[kind]
    straight = finish(tmp_path / "straight", None, settings, 2)
    checkpoint = tmp_path / "straight" / "run" / "checkpoint-3"
    assert broken_reason(checkpoint) is None
    resumed = finish(tmp_path / "again", checkpoint, settings, 2)
    for name in ("weights", "optimizer", "rates", "losses", "lines"):
        assert resumed[name] == straight[name], name


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["bf16", "adapters"])
def test_a_compiled_sharded_run_is_that_of_one_that_is_not(tmp_path, kind):
    settings = SETTINGS | {"projector_dropout": 0.0, **PADDED} | KINDS[kind]
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain = finish(tmp_path / "plain", None, settings, 2)
    straight = finish(tmp_path / "straight", None, settings | compiled, 2)
    resumed = finish(tmp_path / "again", tmp_path / "straight" / "run" / "checkpoint-3", settings | compiled, 2)
    assert (plain["wrapper"], straight["wrapper"]) == ("FSDPDistillationModel", "OptimizedModule")
    for name in ("optimizer", "losses"):
        assert resumed[name] == straight[name], name
    exact = "bf16" not in settings  # in which small gradients have either sign
    assert plain["losses"] == pytest.approx(straight["losses"], rel=1e-5 if exact else 2e-3)
    if exact:
        assert plain["optimizer"] == pytest.approx(straight["optimizer"], rel=1e-5, abs=1e-7)


SPLITS = [((2, 2), (4, 1)), ((4, 1), (2, 2)), ((2, 2), (1, 4)), ((1, 4), (2, 2))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        *((*SPLITS[number], kind) for number, kind in enumerate(("bf16", "adapters", "adapters", "bf16"))),
        *(
            pytest.param(*SPLITS[number], kind, marks=pytest.mark.exhaustive)
            for number, kind in enumerate(("adapters", "bf16", "bf16", "adapters"))
        ),
    ],
)
def test_a_sharded_run_goes_on_with_another_number_of_ranks(tmp_path, kind, before, after):
    settings = SETTINGS | {"projector_dropout": 0.0, "count": 24, **PADDED} | KINDS[kind]

    def trained(name, split, checkpoint=None):
        changed = {**settings, "gradient_accumulation_steps": split[1]}
        return finish(tmp_path / name, checkpoint, changed, split[0])

    first, straight = trained("first", before), trained("straight", after)
    resumed = trained("resumed", after, tmp_path / "first" / "run" / "checkpoint-3")
    assert resumed["world_size"] == after[0] != first["world_size"]
    assert resumed["wrapper"] == "FSDPDistillationModel"
    assert resumed["losses"][-1] == pytest.approx(straight["losses"][-1], rel=2e-3 if "bf16" in settings else 1e-5)
    if "bf16" not in settings:  # in which small gradients have either sign
        assert resumed["optimizer"] == pytest.approx(straight["optimizer"], rel=1e-2, abs=1e-5)


@pytest.mark.slow
def test_what_a_sharded_run_in_bf16_writes_is_float32(tmp_path):
    finish(tmp_path, None, SETTINGS | {"bf16": True, "max_steps": 1}, 2)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {weight.dtype for weight in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        parts = FileSystemReader(checkpoint / folder).read_metadata().state_dict_metadata.values()
        kinds = {part.properties.dtype for part in parts if hasattr(part, "properties")}
        assert kinds == {torch.float32}, folder


@pytest.mark.slow
def test_checkpoints_of_adapters_leave_out_what_is_beneath_them(tmp_path):
    finish(tmp_path, None, SETTINGS | {"max_steps": 1, "model": tiny_lora_llama}, 2)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    names = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    own = {name.removeprefix("model.") for name in names}
    assert own == {name for name in own if "lora_" in name or name.startswith("target.")} != set()
    assert not (checkpoint / "model.safetensors").exists()
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    trained = {name for name in own if "lora_" in name}
    assert len(adapter) == len(trained)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in adapter.values())


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_whole_sharded_run_exports_its_adapters(tmp_path, merge):
    """What is exported is the student that one process would have trained, up to rounding."""
    data = str(write_problems(tmp_path / "data.jsonl"))
    changes = {"use_peft": "true", "merge_adapter": merge, "lora_r": "4", "lora_dropout": "0", "max_steps": "4"}
    changes |= {"projector_dropout": "0", "learning_rate": "1e-2", "student_model_name_or_path": TEACHER_FOLDER}
    runs = {}
    for name, function, ranks, accumulation in (("alone", "run", 1, 4), ("split", "run", 2, 2)):
        module = sharded_run if ranks > 1 else sharded_run.fault_child
        (tmp_path / name).mkdir()
        own = {**changes, "gradient_accumulation_steps": str(accumulation)}
        runs[name] = Run(getattr(module, function), tmp_path / name, tmp_path / name, data, own, ranks=ranks)
    for run in runs.values():
        assert set(run.wait()) == {0}, run.output()
    folders = [tmp_path / name / "out" / "final_student" for name in runs]
    assert all((folder / "adapter_config.json").exists() == (merge == "false") for folder in folders)
    alone, split = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert alone.keys() == split.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(split[name], weight, rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    summaries = [json.loads((folder.parent / "run_summary.json").read_text()) for folder in folders]
    measured = [summary["evaluation"]["student_after"]["perplexity"] for summary in summaries]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)


def test_quantised_students_are_refused_where_weights_are_sharded(tmp_path, monkeypatch):
    """By their config, before a weight is read; in a script by the model."""
    config = json.loads((TEACHER_FOLDER / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ModelArguments("quickstart", student_model_name_or_path=str(tmp_path), use_peft=True, merge_adapter=False)
    student = tiny_llama(32, 2)
    student_config(asked)
    check_student(student)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_student(student)
    with pytest.raises(BadRequest, match=r"quantised by bitsandbytes, which FSDP2 cannot spread; name one .* DDP"):
        student_config(asked)
    student.is_quantized = True
    with pytest.raises(ValueError, match="quantised, which FSDP2 cannot spread; load them as they are"):
        check_student(student)
