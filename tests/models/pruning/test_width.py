"""Students that are cut in width: which neurons and heads they keep, and that the others alone are gone."""

import pytest
import torch
from helpers.models import model_of

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.loading import build_causal_lm
from kava_trainer.models.pruning.cut import Cut, CutRequest, choose_cut
from kava_trainer.models.pruning.student import cut_config, fill_student
from kava_trainer.models.pruning.width import activities, head_groups_of, most_active, neurons_of
from kava_trainer.utils.errors import BadRequest

BATCH = {
    "input_ids": torch.tensor([[3, 7, 11, 2, 9], [4, 8, 1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
NEURONS = {
    "llama": {}, "qwen3": {"head_dim": 8}, "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "phi3": {}, "gemma3_text": {"head_dim": 8},
}  # fmt: skip
HEADS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma3_text": {"head_dim": 8}, "mistral": {}}


def cut_student(teacher, request):
    cut = choose_cut(teacher, request, [BATCH])
    student = build_causal_lm(cut_config(teacher.config, cut), "auto", ModelArguments())
    fill_student(teacher, student, cut)
    return student.eval(), cut


@torch.no_grad()
def last_states(model):
    return run_decoder(model, BATCH["input_ids"], BATCH["attention_mask"])[BATCH["attention_mask"].bool()]


@pytest.mark.parametrize("kind", NEURONS)
def test_without_the_other_neurons_the_teacher_gives_the_same(kind):
    teacher = model_of(kind, **NEURONS[kind])
    student, cut = cut_student(teacher, CutRequest(4, "uniform", intermediate_size=24))
    readers = neurons_of(
        teacher.config, list(teacher.get_decoder().layers if kind != "gpt2" else teacher.transformer.h)
    )
    for layer, kept in zip(readers.readers, cut.neurons, strict=True):
        gone = [neuron for neuron in range(readers.count) if neuron not in kept]
        assert len(kept) == 24
        with torch.no_grad():
            if kind == "gpt2":
                layer.weight[gone] = 0
            else:
                layer.weight[:, gone] = 0
    torch.testing.assert_close(last_states(student), last_states(teacher))


@pytest.mark.parametrize("kind", HEADS)
def test_without_the_other_heads_the_teacher_gives_the_same(kind, tmp_path):
    teacher = model_of(kind, **HEADS[kind])
    student, cut = cut_student(teacher, CutRequest(3, [0, 1, 3], num_attention_heads=2))
    size = HEADS[kind].get("head_dim", 8)
    assert student.config.num_attention_heads == 2
    assert student.config.num_key_value_heads == 1
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (2 * size, 32)
    del teacher.model.layers[2]
    teacher.config.num_hidden_layers = 3
    if getattr(teacher.config, "layer_types", None):
        teacher.config.layer_types = student.config.layer_types
    for block, (kept,) in zip(teacher.model.layers, cut.head_groups, strict=True):
        gone = slice(2 * size, None) if kept == 0 else slice(None, 2 * size)
        with torch.no_grad():
            block.self_attn.o_proj.weight[:, gone] = 0
    torch.testing.assert_close(last_states(student), last_states(teacher))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(last_states(again), last_states(student))


def test_activity_is_the_mean_length_of_what_is_read():
    model = model_of("llama")
    blocks, read = list(model.model.layers), {}
    for number, block in enumerate(blocks):
        for name, layer in (("neurons", block.mlp.down_proj), ("heads", block.self_attn.o_proj)):
            layer.register_forward_pre_hook(lambda _, args, key=(name, number): read.update({key: args[0]}))
    found = activities(model, [neurons_of(model.config, blocks), head_groups_of(model.config, blocks)], [BATCH])
    mask = BATCH["attention_mask"].bool()
    for number in range(4):
        neurons, heads = read["neurons", number][mask], read["heads", number][mask]
        torch.testing.assert_close(found[0][number], neurons.abs().mean(0))
        groups = torch.stack([heads[:, :16].norm(dim=-1), heads[:, 16:].norm(dim=-1)], dim=1)
        torch.testing.assert_close(found[1][number], groups.mean(0))
    assert most_active(torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]]), 2) == [[1, 2], [0, 2]]


@pytest.mark.parametrize(
    ("kind", "changes", "request_", "message"),
    [
        (
            "mixtral",
            {"num_local_experts": 2},
            {"intermediate_size": 24},
            "neurons of MixtralDecoderLayer cannot be cut",
        ),
        ("gpt_neox", {}, {"intermediate_size": 24}, "neurons of GPTNeoXLayer cannot be cut"),
        ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4}, {"num_attention_heads": 2}, "heads of GPT2Block cannot"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {"num_attention_heads": 2}, "cut it in depth alone"),
        ("olmo2", {}, {"num_attention_heads": 2}, "q_norm.weight is .32,. in that part of it and .16,."),
        ("phi3", {}, {"num_attention_heads": 2}, "qkv_proj.weight is .* cut it in depth alone"),
    ],
)
def test_a_family_that_cannot_be_cut_so_is_refused(kind, changes, request_, message):
    with pytest.raises(BadRequest, match=message):
        cut_student(model_of(kind, **changes), CutRequest(4, "uniform", **request_))


def test_the_widths_of_a_cut_are_those_of_its_kept_blocks():
    teacher = model_of("llama")
    _, cut = cut_student(teacher, CutRequest(2, [1, 2], intermediate_size=8, num_attention_heads=2))
    assert isinstance(cut, Cut)
    assert [len(kept) for kept in cut.neurons] == [8, 8]
    assert [len(kept) for kept in cut.head_groups] == [1, 1]
