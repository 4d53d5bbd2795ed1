"""What a teacher takes of each device, and how it comes to be held."""

import pytest
import torch
from helpers import sharded_run
from helpers.models import tiny_llama

from kava_trainer.config import launcher
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.models.sharding import choice
from kava_trainer.models.sharding.choice import Holding, choose_holding
from kava_trainer.runs.pair.held import describe_holding, share_bytes, teacher_parts
from kava_trainer.runs.resources import estimate_memory
from kava_trainer.utils.errors import BadRequest

CPU = torch.device("cpu")
WHOLE, SHARDED = Holding(sharded=False), Holding(sharded=True)


def bytes_of(*modules):
    return sum(own.numel() * own.element_size() for module in modules for own in module.parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_a_share_is_that_of_all_weights_with_a_head_of_its_own(tie):
    model = tiny_llama(64, 4, tie=tie)
    whole = bytes_of(model.model) + bytes_of(model.lm_head)
    assert share_bytes(model, 1) == whole
    assert share_bytes(model, 8) == pytest.approx(whole / 8, abs=1)


def test_what_is_gathered_is_told_beside_the_shares():
    small, large = tiny_llama(64, 2, tie=False), tiny_llama(128, 2, tie=False)
    block, norm = bytes_of(large.model.layers[0]), bytes_of(large.model.norm)
    named = [ModelArguments("one"), ModelArguments("two")]
    both = teacher_parts([small, large], named, [SHARDED, SHARDED], {}, 2)
    assert both["teacher"] == bytes_of(small) // 2
    assert both["teacher 2"] == bytes_of(large) // 2
    heads = bytes_of(small.lm_head) + bytes_of(large.lm_head)
    assert both["gathered teacher"] == max(norm + block + max(block, bytes_of(large.model.embed_tokens)), heads)
    mixed = teacher_parts([small, large], named, [WHOLE, SHARDED], {}, 2)
    assert mixed["teacher"] == bytes_of(small)
    assert teacher_parts([small, large], named, [WHOLE, WHOLE], {}, 2) == {
        "teacher": bytes_of(small), "teacher 2": bytes_of(large)
    }  # fmt: skip


@pytest.mark.parametrize("with_head", [True, False])
def test_of_a_teacher_whose_states_are_cached_the_head_alone_is_shared_out(with_head):
    model = tiny_llama(64, 4, tie=False)
    head = bytes_of(model.lm_head) if with_head else 0
    found = teacher_parts([model], [ModelArguments("one")], [SHARDED], {0: with_head}, 4)
    assert found == {"teacher": head // 4, "gathered teacher": head}


@pytest.fixture
def saved(tmp_path):
    tiny_llama(64, 4, tie=False).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def fsdp(monkeypatch):
    """FSDP2 on devices that a teacher of 854 kB takes more than a quarter of."""
    for name, value in sharded_run.LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "SHARDING_DEVICES", {"cpu"})
    monkeypatch.setattr(choice, "total_memory_bytes", lambda device: 3_400_000)


def test_a_teacher_that_takes_more_than_a_quarter_of_a_device_is_sharded(fsdp, saved, monkeypatch):
    assert choose_holding(ModelArguments(saved), CPU, 2) == SHARDED
    assert choose_holding(ModelArguments(saved), CPU, 1) == WHOLE
    assert choose_holding(ModelArguments(saved, teacher_sharding="none"), CPU, 2) == WHOLE
    assert choose_holding(ModelArguments(saved, teacher_quantization="4bit"), CPU, 2) == WHOLE
    assert choose_holding(ModelArguments(saved, teacher_dtype="bfloat16"), CPU, 2) == WHOLE
    monkeypatch.setattr(choice, "total_memory_bytes", lambda device: 3_500_000)
    assert choose_holding(ModelArguments(saved), CPU, 2) == WHOLE
    assert choose_holding(ModelArguments(saved, teacher_sharding="fsdp"), CPU, 2) == SHARDED


def test_beside_a_whole_student_nothing_is_sharded_by_itself(fsdp, saved, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert choose_holding(ModelArguments(saved), CPU, 2) == WHOLE
    assert choose_holding(ModelArguments(saved, teacher_sharding="fsdp"), CPU, 2) == SHARDED


def test_a_large_teacher_that_cannot_be_sharded_is_replicated_and_told_of(fsdp, tmp_path, saved):
    cut = ModelArguments(saved, student_num_layers=2)
    assert choose_holding(cut, CPU, 2).note == (
        "The teacher is replicated, because the student is cut out of its whole weights."
    )
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = choose_holding(ModelArguments(saved), CPU, 2, "teacher 2")
    assert not found.sharded
    told = f"The teacher 2 {saved!r} cannot be sharded, because it has no safetensors files."
    assert found.note == f"{told} Every process holds all of it."
    with pytest.raises(BadRequest, match="because it has no safetensors files; write teacher_sharding none"):
        choose_holding(ModelArguments(saved, teacher_sharding="fsdp"), CPU, 2)


def test_a_run_says_how_a_teacher_is_held_and_what_would_take_less(fsdp, saved):
    def told(holding, processes=2, **options):
        return list(describe_holding(ModelArguments(saved, **options), holding, "teacher", processes, "cpu"))

    assert told(WHOLE) == told(SHARDED, processes=1) == []
    assert told(Holding(False, "It is replicated.")) == ["It is replicated."]
    (spread,) = told(SHARDED)
    assert spread == (
        "Teacher is spread over 2 processes, float32, and takes 0.7 MB of each; whole on every process, 4bit, it would "
        "take less: 0.3 MB."
    )
    (quantised,) = told(WHOLE, teacher_quantization="8bit")
    assert "is whole on every process, 8bit, and takes" in quantised
    assert "spread over 2 processes, float32, it would take more" in quantised
    (many,) = told(WHOLE, processes=64, teacher_quantization="8bit")
    assert "spread over 64 processes, float32, it would take less" in many


def test_the_estimate_of_a_run_holds_a_share_of_a_sharded_teacher(monkeypatch, fsdp):
    monkeypatch.setattr(KavaTrainingArguments, "world_size", 4, raising=False)
    given = ["quickstart", "--use_cpu", "--teacher_sharding"]
    whole = estimate_memory(parse_arguments([*given, "none"]))
    sharded = estimate_memory(parse_arguments([*given, "fsdp"]))
    assert sharded["teacher"] == pytest.approx(whole["teacher"] / 4, rel=0.2)
    assert 0 < sharded.pop("gathered teacher") < whole["teacher"] / 2
    assert sharded["student"] == whole["student"]


REFUSED = {
    "quantised": (
        {"teacher_quantization": "8bit"},
        "spreads plain weights, and teacher_quantization is 8bit; write te",
    ),
    "cut": ({"student_num_layers": "2", "student_model_name_or_path": None}, "which needs it whole; write none"),
    "one process": ({}, "there is one process, which has nobody to share the teacher with; write none, or start more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sharded_whatever_it_is_is_refused_before_anything_is_read(kind):
    changes, told = REFUSED[kind]
    options = {"teacher_model_name_or_path": "not/there", "student_model_name_or_path": "not/there", "use_cpu": "true"}
    options |= {"dataset_name": "not/there", "teacher_sharding": "fsdp", **changes}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    with pytest.raises(BadRequest, match=told):
        parse_arguments(words)


def test_on_a_device_that_nothing_is_sharded_on_it_is_refused(monkeypatch):
    monkeypatch.setattr(KavaTrainingArguments, "world_size", 2, raising=False)
    with pytest.raises(BadRequest, match="teacher_sharding is fsdp on a cpu device; KAVA shards on CUDA devices alone"):
        parse_arguments(["quickstart", "--use_cpu", "--teacher_sharding", "fsdp"])
