import copy
import json
import logging

import psutil
import pytest
import torch
from helpers.models import LORA, model_of, tiny_llama, tiny_lora_llama
from helpers.places import ROOT, shared_path
from helpers.sharded_run import LAUNCHED
from helpers.trainers import make_trainer
from torch import nn
from transformers import AutoConfig
from transformers.training_args import OptimizerNames

from kava_trainer.config import launcher
from kava_trainer.config.arguments import KavaArguments, KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.models.lora import trained_parameters
from kava_trainer.models.sharding.sizes import gathered_bytes
from kava_trainer.models.sizes import model_bytes, optimizer_bytes, optimizer_step_bytes
from kava_trainer.models.student import load_student
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.runs.resources import (
    LiveMemory,
    checkpoint_bytes,
    describe_estimate,
    estimate_memory,
    try_to_estimate,
)
from kava_trainer.trainer.optimizers import settled
from kava_trainer.utils.errors import BadRequest

QUICKSTART = str(ROOT / "training_args" / "quickstart.json")


def test_live_memory_counts_what_lives_at_once_and_views_not_at_all():
    known = torch.zeros(100)
    with LiveMemory([known]) as live:
        known.view(10, 10).add_(1)
        assert live.now == 0
        left = torch.ones(1000)
        right = left * 2
        assert live.now == live.peak == 8000
        del left
        assert live.now == 4000
        right = right.view(10, 100)[1:]
        assert live.now == 4000
    assert live.peak == 8000
    assert right.shape == (9, 100)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adamw_torch", 80),
        ("adamw_torch_fused", 80),
        ("adamw_bnb_8bit", 80),
        ("sgd", 0),
        ("lion_32bit", 40),
        ("adafactor", 0),
        ("stable_adamw", 80),
    ],
)
def test_optimizer_states(name, size):
    assert optimizer_bytes(name, [nn.Parameter(torch.zeros(10))]) == size
    assert optimizer_bytes(OptimizerNames(name), [nn.Parameter(torch.zeros(10))]) == size


LARGE = 64 * 256


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adamw_torch_fused", 4 * LARGE),
        ("stable_adamw", 6 * LARGE),
        ("paged_adamw_32bit", 8 * LARGE),
        ("adamw_bnb_8bit", 2 * (LARGE + 4 * 64)),
        ("lion_8bit", LARGE + 4 * 64),
        ("adamw_torch_8bit", 2 * (LARGE + 4 * 64 + 4 * 256)),
        ("adamw_torch_4bit", 2 * (LARGE // 2 + 4 * 64 + 4 * 16)),
    ],
)
def test_optimizer_states_of_a_large_bfloat16_weight(name, size):
    weight = nn.Parameter(torch.zeros(64, 256, dtype=torch.bfloat16))
    assert optimizer_bytes(name, [weight]) == size
    if name == "adamw_bnb_8bit":
        assert optimizer_bytes(name, [weight], [weight]) == 8 * LARGE


@pytest.mark.parametrize(("bits", "block"), [(8, 256), (8, 64), (4, 256)])
def test_the_states_of_torchao_are_counted_as_it_keeps_them(bits, block):
    optim = pytest.importorskip("torchao.optim")
    shapes = [(64, 256), (64, 64), (63, 64), (4100,), (100,)]
    weights = [
        nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes for dtype in (torch.float32, torch.bfloat16)
    ]
    kind, options = settled(getattr(optim, f"AdamW{bits}bit"), {"block_size": str(block)}, torch.device("cpu"))
    optimizer = kind(weights, **options)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = 0
    for state in optimizer.state.values():
        for value in (state["exp_avg"], state["exp_avg_sq"]):
            parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())] or [value]
            kept += sum(part.numel() * part.element_size() for part in parts)
    assert optimizer_bytes(f"adamw_torch_{bits}bit", weights, optim_args=f"block_size={block}") == kept


def test_the_step_of_torchao_takes_more_than_a_small_micro_batch():
    weights = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((64, 256), (10,))]
    assert optimizer_step_bytes("adamw_torch_8bit", weights) == 8 * LARGE
    assert optimizer_step_bytes("adamw_torch_fused", weights) == 0


def test_quantised_weights_are_counted_as_they_are_stored():
    model = tiny_llama(64, 2, tie=False)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    rest = 4 * (model.num_parameters() - linear)
    assert model_bytes(model) == 4 * model.num_parameters()
    assert model_bytes(model, "4bit") == pytest.approx(rest + 0.516 * linear, rel=0.001)
    assert model_bytes(model, "8bit") == pytest.approx(rest + linear, rel=0.1)
    tied = tiny_llama(64, 2, tie=True)
    assert model_bytes(tied) == 4 * tied.num_parameters()


def test_the_estimate_of_the_weights_is_that_of_the_loaded_models():
    estimate = estimate_memory(parse_arguments([QUICKSTART]))
    assert list(estimate) == ["teacher", "student", "projector", "gradients", "optimizer", "micro-batch"]
    assert estimate["teacher"] == pytest.approx(854_000 * 4, rel=0.001)
    assert estimate["student"] == pytest.approx(181_056 * 4)
    assert estimate["gradients"] == estimate["student"] + estimate["projector"]
    assert estimate["optimizer"] == 2 * estimate["gradients"]


CHANGES = [
    {},
    {"max_tokens_per_batch": 0},
    {"kd_weight": 0.5, "layer_mapping": "uniform:2"},
    {"gradient_checkpointing": True},
    {"lm_weight": 0.0, "projector_direction": "student_to_teacher"},
    {"use_peft": True},
    {"use_peft": True, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_estimate_of_a_micro_batch_is_what_a_real_one_takes(tmp_path, tokenizer, changes):
    folders = {role: tmp_path / role for role in ("teacher", "student")}
    lora = {"use_peft": True, **LORA} if changes.get("use_peft") else {}
    changes = {name: value for name, value in changes.items() if name != "use_peft"}
    trainer = make_trainer(tmp_path, tokenizer, model=tiny_lora_llama if lora else tiny_llama, **changes)
    trainer.teacher.model.save_pretrained(folders["teacher"])
    trainer.student.config.save_pretrained(folders["student"])
    args = copy.copy(trainer.args)
    args.max_tokens_per_batch = 96 if trainer.batches.packs else 0
    names = {"teacher_model_name_or_path": str(folders["teacher"]), "student_config_name": str(folders["student"])}
    data = DataArguments(dataset_name="quickstart", max_length=24)
    estimate = estimate_memory(KavaArguments(ModelArguments(**names, **lora), data, args))["micro-batch"]
    examples = [{"input_ids": list(range(1, 25)), "labels": list(range(1, 25))} for _ in range(4)]
    batch = trainer.data_collator(examples)
    if trainer.batches.packs:
        batch = {name: part.view(1, 96) for name, part in batch.items() if part.dim() == 2} | {
            "packed_lengths": (24,) * 4, "answer_index": batch["answer_index"], "next_tokens": batch["next_tokens"],
        }  # fmt: skip
    if changes.get("gradient_checkpointing"):
        trainer.student.gradient_checkpointing_enable()
    trainer.model.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*trainer.teacher.model.parameters(), *trainer.model.parameters()]
    with LiveMemory([*known, *(parameter.grad for parameter in trained)]) as live:
        trainer.compute_loss(trainer.model, batch).backward()
    assert estimate == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize(("rank", "numbers"), [
    ("null", 64 * (128 + 1)), ("8", 8 * (128 + 64 + 2)), ("64", 64 * (128 + 64 + 2)), ("auto", 64 * (128 + 64 + 2)),
])  # fmt: skip
def test_a_frozen_projector_takes_memory_and_trains_nothing(rank, numbers):
    asked = ["--projector_direction", "teacher_to_student", "--projector_anchor", "pca", "--projector_rank", rank]
    arguments = parse_arguments([QUICKSTART, *asked, "--projector_init", "least_squares"])
    estimate = estimate_memory(arguments)
    assert estimate["projector"] == 2 * 4 * numbers  # two pairs of layers in float32
    assert estimate["gradients"] == estimate["student"]
    assert checkpoint_bytes(estimate, arguments.training) == 3 * estimate["student"] + estimate["projector"]


@pytest.mark.parametrize("rank", ["65", "1000000"])
def test_a_bridge_of_too_many_dimensions_is_refused_by_the_configs_alone(rank):
    asked = ["--projector_direction", "teacher_to_student", "--projector_anchor", "pca", "--projector_rank", rank]
    with pytest.raises(BadRequest, match=f"projector_rank is {rank}, but the teacher's states are 128 wide and the st"):
        estimate_memory(parse_arguments([QUICKSTART, *asked, "--projector_init", "least_squares"]))


def test_the_schedules_hold_nothing_back_in_the_estimate():
    plain = estimate_memory(parse_arguments([QUICKSTART, "--kd_weight", "1"]))
    staged = ["--kd_schedule", "stage", "--alignment_schedule", "stage"]
    assert estimate_memory(parse_arguments([QUICKSTART, "--kd_weight", "1", *staged])) == plain


def test_a_cache_leaves_no_teacher_but_the_head():
    plain = estimate_memory(parse_arguments([QUICKSTART, "--kd_weight", "1"]))
    cached = estimate_memory(parse_arguments([QUICKSTART, "--kd_weight", "1", "--teacher_cache_dir", "cache"]))
    bare = estimate_memory(parse_arguments([QUICKSTART, "--teacher_cache_dir", "cache"]))
    assert cached["teacher"] == 512 * 128 * 4
    assert bare["teacher"] == 0
    assert plain["teacher"] > 10 * cached["teacher"]


def test_an_estimate_that_cannot_be_made_is_a_reason_and_leaves_no_traceback(tmp_path, caplog):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    model_of("qwen3_moe", **sizes).save_pretrained(tmp_path)
    arguments = parse_arguments([QUICKSTART, "--student_model_name_or_path", str(tmp_path), "--use_cpu", "true"])
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        parts, reason = try_to_estimate(lambda: estimate_memory(arguments))
    finally:
        logger.removeHandler(caplog.handler)
    assert parts is None or sum(parts.values()) > 0
    assert (parts is None) == ("cannot be played through" in reason)
    assert not caplog.records
    assert not logger.disabled
    with pytest.raises(BadRequest, match="the student has layers 1 to 3"):
        try_to_estimate(lambda: estimate_memory(parse_arguments([QUICKSTART, "--layer_mapping", "[[9, 1]]"])))


def test_on_a_cpu_the_process_counts_as_it_does_in_the_measured_peak():
    total, shown = describe_estimate({"teacher": 1000}, torch.device("cpu"))
    assert total == pytest.approx(1000 + psutil.Process().memory_info().rss, rel=0.01)
    assert "Python and its libraries" in shown
    assert describe_estimate({"teacher": 1000, "student": 2000}, torch.device("cuda"))[0] == 3000


def test_what_does_not_fit_the_models_is_refused_before_they_are_loaded():
    with pytest.raises(BadRequest, match="the student has layers 1 to 3"):
        estimate_memory(parse_arguments([QUICKSTART, "--layer_mapping", "[[9, 1]]"]))


def test_without_a_projector_none_is_estimated_or_told(tmp_path):
    pair = ["--student_model_name_or_path", str(TEACHER_FOLDER), "--projector_direction", "none", "--layer_mapping"]
    for mapping in ("all", "last"):
        parts = estimate_memory(parse_arguments([QUICKSTART, *pair, mapping, "--kd_weight", "1", "--kd_tokens", "all"]))
        assert parts["projector"] == 0
        assert "projector" not in describe_estimate(parts, torch.device("cuda"))[1]
    with pytest.raises(BadRequest, match="layer_mapping inherited needs a student that is cut out of its teacher"):
        parse_arguments([QUICKSTART, *pair, "inherited"])
    config = AutoConfig.from_pretrained(TEACHER_FOLDER)
    config.num_hidden_layers, config.layer_types = 2, None
    config.save_pretrained(tmp_path / "student")
    recipe = json.loads((ROOT / "training_args" / "quickstart.json").read_text())
    recipe |= {"student_config_name": str(tmp_path / "student"), "student_init": "teacher_layers"}
    recipe |= {"projector_direction": "none", "layer_mapping": "inherited"}
    del recipe["student_model_name_or_path"]
    (tmp_path / "cut.json").write_text(json.dumps(recipe))
    assert estimate_memory(parse_arguments([str(tmp_path / "cut.json")]))["projector"] == 0


def test_the_recipe_for_8_gb_takes_at_most_6():
    models = {
        role: str(shared_path("models", name))
        for role, name in (("teacher", "qwen2.5-1.5b-instruct"), ("student", "qwen2.5-0.5b"))
    }
    recipe = str(ROOT / "training_args" / "gsm8k_qwen2.5_8gb.json")
    words = [word for role, name in models.items() for word in (f"--{role}_model_name_or_path", name)]
    estimate = estimate_memory(parse_arguments([recipe, *words, "--use_cpu", "true"]))
    assert estimate["teacher"] == pytest.approx(1.14e9, rel=0.01)
    assert sum(estimate.values()) <= 6.0e9
    assert json.loads((ROOT / "training_args" / "gsm8k_qwen2.5_8gb.json").read_text())["teacher_quantization"] == "4bit"


def test_with_adapters_only_they_have_gradients_and_optimizer_states():
    argv = [QUICKSTART, "--student_model_name_or_path", str(TEACHER_FOLDER)]
    lora, quantised = [*argv, "--use_peft"], [*argv, "--use_peft", "--student_quantization", "4bit"]
    arguments = parse_arguments(lora)
    plain, lora, quantised = (estimate_memory(parse_arguments(argv)) for argv in (argv, lora, quantised))
    student = load_student(arguments.model, None)
    assert lora["adapter"] == 4 * trained_parameters(student)
    assert lora["student"] == plain["student"] == plain["teacher"]
    assert lora["gradients"] == lora["adapter"] + lora["projector"]
    assert lora["optimizer"] == 2 * lora["gradients"]
    assert plain["gradients"] == plain["student"] + plain["projector"]
    assert quantised["student"] < 0.3 * lora["student"]
    assert quantised["adapter"] == lora["adapter"]
    assert checkpoint_bytes(lora, arguments.training) == lora["adapter"] + lora["projector"] + lora["optimizer"]


@pytest.fixture
def over_4_ranks(monkeypatch):
    """Estimates what a rank of four takes where weights are sharded."""

    def estimate(*argv):
        with monkeypatch.context() as patch:
            for name, value in LAUNCHED.items():
                patch.setenv(name, value)
            patch.setattr(launcher, "SHARDING_DEVICES", {"cpu"})
            patch.setattr(KavaTrainingArguments, "world_size", 4)
            return estimate_memory(parse_arguments([QUICKSTART, "--use_cpu", "true", *argv]))

    return estimate


@pytest.mark.parametrize(("precision", "kind"), [("false", None), ("true", torch.bfloat16)])
def test_of_a_sharded_student_a_rank_has_its_share_and_what_is_gathered(over_4_ranks, precision, kind):
    argv = ("--bf16", precision, "--use_cpu", "true")
    alone, shares = estimate_memory(parse_arguments([QUICKSTART, *argv])), over_4_ranks(*argv)
    for name in ("student", "projector"):
        assert shares[name] == pytest.approx(alone[name] / 4, abs=1)
    assert shares["gradients"] == shares["student"] + shares["projector"]  # in float32, whatever is computed in
    assert shares["optimizer"] == 2 * shares["gradients"]
    student = load_student(parse_arguments([QUICKSTART]).model, None)
    assert shares["gathered weights"] == gathered_bytes(student, nn.Identity(), kind) + 2 * alone["projector"]
    if kind is None:
        assert shares["micro-batch"] == alone["micro-batch"]
    else:  # autocast makes copies of the weights, which are gathered in bfloat16 already
        assert shares["micro-batch"] < alone["micro-batch"]


def test_of_sharded_adapters_a_rank_has_their_gradients_and_states_alone(over_4_ranks):
    argv = ("--student_model_name_or_path", str(TEACHER_FOLDER), "--use_peft")
    alone, shares = estimate_memory(parse_arguments([QUICKSTART, *argv])), over_4_ranks(*argv)
    for name in ("student", "adapter", "projector"):
        assert shares[name] == pytest.approx(alone[name] / 4, abs=1)
    assert shares["gradients"] == shares["adapter"] + shares["projector"]
    assert shares["optimizer"] == 2 * shares["gradients"]
    whole = over_4_ranks("--student_model_name_or_path", str(TEACHER_FOLDER))
    assert shares["gathered weights"] < whole["gathered weights"]
