import random

import pytest
import torch
from helpers.models import SIZES, model_of, tiny_llama
from helpers.places import shared_path
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.data.packing import plan_packs
from kava_trainer.models import packed_attention as packed_attention_module
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.packed_attention import (
    PACKED_SDPA,
    disable_packing,
    enable_packing,
    packed_attention,
    packing_problem,
)
from kava_trainer.models.teacher import load_teacher

LENGTHS = (7, 3, 12, 1)


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 512, (1, length), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("qwen2", "sdpa", {}),
        ("qwen2", "eager", {}),
        ("qwen3", "sdpa", {}),
        ("mistral", "sdpa", {"sliding_window": 5}),
        ("mistral", "eager", {"sliding_window": 5}),
        ("gemma3_text", "sdpa", {"sliding_window": 5, "head_dim": 8, "sliding_window_pattern": 2}),
        ("gpt_neox", "sdpa", {}),
    ],
)
def test_an_example_has_the_states_and_gradients_it_has_alone(kind, attention, changes):
    model, rows = model_of(kind, attention, **changes), examples()
    enable_packing(model)
    assert packing_problem(model) is None
    packed = run_decoder(model, torch.cat(rows, dim=1), packed_lengths=LENGTHS)
    alone = torch.cat([run_decoder(model, row) for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.get_decoder().parameters())
    ours, reference = (torch.autograd.grad((value * weights).sum(), parameters) for value in (packed, alone))
    for left, right in zip(ours, reference, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-5


def test_in_bf16_the_states_agree_to_its_rounding():
    model, rows = model_of("qwen2").to(torch.bfloat16), examples()
    enable_packing(model)
    assert packing_problem(model) is None
    packed = run_decoder(model, torch.cat(rows, dim=1), packed_lengths=LENGTHS).float()
    alone = torch.cat([run_decoder(model, row) for row in rows], dim=1).float()
    assert (packed - alone).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same_packed_attention(reentrant):
    model, rows = model_of("qwen2"), examples()
    enable_packing(model)
    run = lambda: run_decoder(model.train(), torch.cat(rows, dim=1), packed_lengths=LENGTHS).square().sum()  # noqa: E731
    reference = torch.autograd.grad(run(), model.model.layers[0].self_attn.q_proj.weight)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    run().backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, reference)


WINDOWS = {
    "llama4_text": {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "phimoe": {"sliding_window": 20, "num_local_experts": 2},
    "doge": {"sliding_window": 30, "head_dim": 8},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_that_packed_attention_is_not_told_of_is_found_beyond_its_end(kind):
    model = model_of(kind, **WINDOWS[kind])
    enable_packing(model)
    assert "an example longer than its window" in packing_problem(model)
    disable_packing(model)


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [
        ("mistral", "sdpa", {"sliding_window": 40}),
        ("mistral", "eager", {"sliding_window": 40}),
        ("gemma3_text", "sdpa", {"sliding_window": 40, "head_dim": 8, "sliding_window_pattern": 2}),
    ],
)
def test_beyond_a_window_an_example_has_the_states_it_has_alone(kind, attention, changes):
    model = model_of(kind, attention, **changes)
    enable_packing(model)
    assert packing_problem(model) is None
    rows = [torch.randint(1, 512, (1, length)) for length in (60, 70)]
    packed = run_decoder(model, torch.cat(rows, dim=1), packed_lengths=(60, 70))
    torch.testing.assert_close(
        packed, torch.cat([run_decoder(model, row) for row in rows], dim=1), rtol=1e-4, atol=1e-5
    )


def test_a_window_too_wide_to_be_tried_out_keeps_rows_padded_unless_no_example_can_reach_it():
    wide = {"sliding_window": 8192}
    assert "8192 tokens is too wide" in packing_problem(model_of("mistral", max_position_embeddings=32768, **wide))
    assert packing_problem(model_of("mistral", max_position_embeddings=4096, **wide)) is None


@pytest.mark.parametrize(
    ("kind", "changes", "blocks"),
    [
        ("mistral", {}, 4),  # which names no kinds of layers
        ("gemma3_text", {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
    ],
)
def test_on_a_cpu_a_window_is_tried_out_where_that_takes_seconds_and_not_minutes(monkeypatch, kind, changes, blocks):
    model = model_of(kind, sliding_window=40, num_hidden_layers=4, **changes)
    enable_packing(model)
    one = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    norm = sum(parameter.numel() for parameter in model.model.norm.parameters())
    products = blocks * (one + norm / 4) * 52
    monkeypatch.setattr(packed_attention_module, "MOST_PRODUCTS", products - 1)
    assert packing_problem(model) == "its window of 40 tokens is too wide to be tried out on a CPU"
    monkeypatch.setattr(packed_attention_module, "MOST_PRODUCTS", products + 1)
    assert packing_problem(model) is None


HYBRIDS = {
    "falcon_h1": {
        "lm_head_multiplier": 0.02, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    },
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "attn_layer_offset": 1, "attn_layer_period": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_state_space_that_leaks_next_to_nothing_into_the_next_example_is_found_out(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | HYBRIDS[kind]))
    enable_packing(model)
    assert "see each other" in packing_problem(model)


def test_a_forward_pass_that_fails_on_packed_rows_is_a_reason_and_no_error(monkeypatch):
    model = model_of("llama")
    decoder, whole = model.model, model.model.forward

    def forward(*args, packed_lengths=None, **kwargs):
        if packed_lengths is not None:
            raise RuntimeError("sizes of tensors must match")
        return whole(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    enable_packing(model)
    assert "keeps packed examples apart: sizes of tensors must match" in packing_problem(model)


@pytest.mark.parametrize(("kind", "changes"), [("bloom", {"n_head": 4}), ("mamba", {}), ("stablelm", {})])
def test_models_that_cannot_keep_examples_apart_are_found_out(kind, changes):
    model = model_of(kind, None, **changes)
    enable_packing(model)
    assert "see each other" in packing_problem(model)


def test_a_key_value_cache_would_mix_the_examples_and_is_never_used():
    model, rows = model_of("qwen2"), examples()
    enable_packing(model)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    disable_packing(model)
    ids = torch.cat(rows, dim=1)
    alone = torch.cat([run_decoder(model, row) for row in rows], dim=1)
    mixed = model.model(input_ids=ids, position_ids=positions, use_cache=True)[0]
    assert (mixed - alone).norm() > 0.1 * alone.norm()
    model.config.use_cache = True
    enable_packing(model)
    torch.testing.assert_close(run_decoder(model, ids, packed_lengths=LENGTHS), alone, rtol=1e-4, atol=1e-5)


def test_packing_changes_neither_generation_nor_padded_rows_nor_the_saved_config(tmp_path):
    model = model_of("qwen2")
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ask = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    before, states = model.generate(**ask), run_decoder(model, ids, mask)
    enable_packing(model)
    assert model.config._attn_implementation == PACKED_SDPA
    assert torch.equal(model.generate(**ask), before)
    assert torch.equal(run_decoder(model, ids, mask), states)
    model.save_pretrained(tmp_path)
    assert "kava" not in (tmp_path / "config.json").read_text()
    disable_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_of_a_packed_row_is_causal_within_each_example():
    layer = tiny_llama(32, 1).model.layers[0].self_attn
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 16) for heads in (2, 1, 1))
    ours, weights = packed_attention(layer, query, key, value, None, LENGTHS, scaling=0.25)
    mask = torch.block_diag(*[torch.ones(length, length) for length in LENGTHS]).tril().bool()
    repeated = (states.expand(1, 2, -1, -1) for states in (key, value))
    reference = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.25)
    torch.testing.assert_close(ours, reference.transpose(1, 2))
    assert weights is None


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_teachers_can_read_packed_rows(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    model_of("qwen2", **wide).save_pretrained(tmp_path)
    arguments = ModelArguments(teacher_model_name_or_path=str(tmp_path), teacher_quantization=kind)
    teacher = load_teacher(arguments, torch.device("cpu"))
    enable_packing(teacher)
    assert packing_problem(teacher) is None


def test_packs_hold_all_and_never_more_than_the_budget():
    rng = random.Random(0)
    for budget in (50, 200, 1024):
        lengths = [rng.randint(1, 80) for _ in range(60)]
        packs = plan_packs(lengths, budget)
        assert sorted(index for pack in packs for index in pack) == list(range(60))
        assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= budget for pack in packs)
        assert all(pack == sorted(pack) for pack in packs)
    assert plan_packs([5, 900, 7], 100) == [[1], [0, 2]]


def test_packs_of_gsm8k_are_full_but_for_the_last_of_a_step():
    data, folder = shared_path("data", "gsm8k", "train.jsonl"), shared_path("models", "qwen2.5-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [len(ids) for ids in tokenizer(data.read_text(encoding="utf-8").splitlines()[:1600])["input_ids"]]
    fills = []
    for step in range(0, 1600, 32):
        chosen = lengths[step : step + 32]
        used = [sum(chosen[i] for i in pack) for pack in plan_packs(chosen, 1024)]
        fills += [tokens / 1024 for tokens in used[:-1]]
    assert sum(fills) / len(fills) >= 0.95
