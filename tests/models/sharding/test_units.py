"""What cannot be spread is refused before anything is, and the rest in units of which each weight is in one."""

import pytest
import torch
from helpers.families import FAMILIES
from helpers.models import STUDENT_SIZE, lora_llama_with_a_trained_head, tiny_llama, tiny_lora_llama
from torch import nn

from kava_trainer.models.sharding import units
from kava_trainer.models.sharding.units import Sharding, shard_model
from kava_trainer.utils.errors import BadRequest

NOWHERE = Sharding(mesh=None)


@pytest.fixture
def made(monkeypatch):
    """The units that would be made, each with what it is asked for."""
    found = []
    monkeypatch.setattr(units, "fully_shard", lambda modules, **options: found.append((modules, options)))
    return found


def own_weights(made):
    """How many weights each unit has that are in none before it."""
    seen = set()
    for module, _ in made:
        fresh = {id(own) for own in module.parameters()} - seen
        seen |= fresh
        yield len(fresh)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, tiny_lora_llama])
def test_each_weight_is_in_one_unit_and_tied_ones_are_not_parted(made, make, tied):
    student = make(STUDENT_SIZE, 2, tie=tied)
    shard_model(student, NOWHERE)
    apart = [] if tied else [student.get_input_embeddings()]
    assert [module for module, _ in made] == [*student.model.layers, *apart, student]
    assert list(own_weights(made))[2:] == ([2] if tied else [1, 2])  # the last norm, and the head
    assert [options["reshard_after_forward"] for _, options in made] == [True] * (len(made) - 1) + [False]


@pytest.mark.parametrize("family", ["llava", "gemma3_vision", "qwen2_vl"])
def test_what_reads_no_text_is_no_part_of_the_ends(made, family):
    model = FAMILIES[family]()
    shard_model(model, NOWHERE)
    names = {id(module): name for name, module in model.named_modules()}
    units = [names[id(module)] for module, _ in made]
    vision = next(name for name in ("model.vision_tower", "model.visual") if name in units)
    inner = [place for place, name in enumerate(units) if name.startswith(f"{vision}.")]
    assert inner
    assert max(inner) < units.index(vision) < units.index("")
    assert list(own_weights(made))[-1] == 2  # the last norm, and embeddings or head


@pytest.mark.parametrize("computes_in", [None, torch.bfloat16])
def test_blocks_alone_are_gathered_in_what_they_compute_in(made, computes_in):
    shard_model(tiny_llama(STUDENT_SIZE, 2, tie=False), Sharding(mesh=None, computes_in=computes_in))
    policies = [options["mp_policy"] for _, options in made]
    assert [policy.param_dtype for policy in policies] == [computes_in, computes_in, None, None]
    assert {policy.reduce_dtype for policy in policies} == {None if computes_in is None else torch.float32}
    assert not any(policy.cast_forward_inputs for policy in policies)


def with_a_shared_weight():
    student = tiny_llama(STUDENT_SIZE, 2)
    student.model.layers[1].mlp.up_proj.weight = student.model.layers[0].mlp.up_proj.weight
    return student


def with_a_single_number():
    student = tiny_llama(STUDENT_SIZE, 2)
    student.model.layers[1].scale = nn.Parameter(torch.tensor(1.0))
    return student


def of_two_types():
    student = tiny_llama(STUDENT_SIZE, 2).bfloat16()
    student.model.layers[1].input_layernorm.float()
    return student


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (with_a_shared_weight, "model.layers.0.mlp.up_proj.weight of the LlamaForCausalLM is shared between blocks"),
        (with_a_single_number, "model.layers.1.scale of the LlamaForCausalLM is a single number"),
        (of_two_types, "Weights of the LlamaForCausalLM that are trained together are bfloat16 and float32"),
    ],
)
def test_what_fsdp2_cannot_spread_is_refused_before_anything_is_spread(made, make, told):
    with pytest.raises(BadRequest, match=f"^{told}.* cannot spread; .*DDP"):
        shard_model(make(), NOWHERE)
    assert made == []


def test_frozen_weights_of_another_type_are_gathered_beside_those_that_are_trained(made):
    shard_model(lora_llama_with_a_trained_head(STUDENT_SIZE, 2), NOWHERE)
    assert len(made) == 4
