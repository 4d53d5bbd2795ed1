"""What a student keeps, and that it is that part of its teacher, for every family that can be cut."""

import json

import pytest
import torch
from helpers.models import SIZES, model_of, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.loading import build_causal_lm
from kava_trainer.models.pruning.cut import (
    Cut,
    CutRequest,
    choose_cut,
    cut_request,
    evenly_spaced,
    most_important,
    planned_cut,
)
from kava_trainer.models.pruning.search import Removal
from kava_trainer.models.pruning.skipping import skipped
from kava_trainer.models.pruning.student import check_logits, copy_weights, cut_config, fill_student
from kava_trainer.models.student import load_student
from kava_trainer.utils.errors import BadRequest

GEMMA = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA, "attention": "eager"},
    "gemma3_text": GEMMA,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 3, "attention": "eager"},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 2},
    "gpt_neox": {},
}


def cut_of(teacher, kept, method="list", **parts):
    return Cut(method, teacher.config.get_text_config().num_hidden_layers, kept, **parts)


def student_of(teacher, cut):
    student = build_causal_lm(cut_config(teacher.config, cut), "auto", ModelArguments())
    fill_student(teacher, student, cut)
    return student.eval()


@torch.no_grad()
def logits(model, length=9):
    return model(torch.arange(1, 1 + length).unsqueeze(0)).logits


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 2], [0, 3], [3]])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cut_student_gives_what_its_teacher_gives_without_the_other_blocks(kind, kept, tmp_path):
    teacher = model_of(kind, **FAMILIES[kind])
    weights = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    cut = cut_of(teacher, kept)
    student = student_of(teacher, cut)
    with skipped(teacher, cut.removed):
        torch.testing.assert_close(logits(student), logits(teacher))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(student))
    assert all(torch.equal(weight, teacher.state_dict()[name]) for name, weight in weights.items())
    assert teacher.config.num_hidden_layers == 4


def test_lists_of_the_config_keep_the_entries_of_the_kept_blocks():
    teacher = model_of("gemma3_text", **GEMMA)
    config = cut_config(teacher.config, cut_of(teacher, [0, 2, 3]))
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert teacher.config.layer_types == ["sliding_attention", "full_attention"] * 2
    rope = cut_config(AutoConfig.for_model("smollm3", **SIZES, no_rope_layers=[1, 1, 0, 1]), cut_of(teacher, [1, 2]))
    assert rope.no_rope_layers == [1, 0]
    tokens = AutoConfig.for_model("llama", **SIZES | {"eos_token_id": [5, 6, 7, 8]})
    assert cut_config(tokens, cut_of(teacher, [1, 2])).eos_token_id == [5, 6, 7, 8]


def test_the_text_part_of_a_composite_config_is_cut():
    text = {**SIZES, **GEMMA}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={"hidden_size": 16, "num_hidden_layers": 4, "layers": 4}
    )
    found = cut_config(config, Cut("list", 4, [0, 3]))
    assert found.text_config.num_hidden_layers == 2
    assert found.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert found.vision_config.num_hidden_layers == 4


def test_the_student_stops_where_the_teacher_stops():
    teacher = tiny_llama(32, 3)
    teacher.generation_config.eos_token_id = [4, 5]
    assert student_of(teacher, cut_of(teacher, [0, 2])).generation_config.eos_token_id == [4, 5]


@pytest.mark.parametrize(
    ("kind", "changes", "kept", "message"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}, [1, 2],
         "its block 1 differs from what block 0 would be .attn has scaling"),
        ("minimax", {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}, [0, 1],
         "num_hidden_layers 4 and 2"),
        ("deepseek_v3", {"first_k_dense_replace": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                         "kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                         "num_experts_per_tok": 2, "moe_intermediate_size": 16}, [0, 2, 3], "is missing|differs"),
        ("rwkv", {"attention": "eager"}, [1, 2], "is missing in that part"),
    ],
)  # fmt: skip
def test_a_family_whose_blocks_depend_on_their_place_is_refused(kind, changes, kept, message):
    teacher = model_of(kind, **changes)
    with pytest.raises(BadRequest, match=message):
        student_of(teacher, cut_of(teacher, kept))


def test_a_student_that_is_not_what_is_left_is_refused(monkeypatch):
    teacher = tiny_llama(32, 3)
    cut = cut_of(teacher, [0, 2])
    student = build_causal_lm(cut_config(teacher.config, cut), "auto", ModelArguments())
    student.model.layers[0].register_forward_hook(lambda block, args, output: 2 * output)
    with pytest.raises(BadRequest, match="does not give what the teacher gives without the rest"):
        fill_student(teacher, student, cut)


@pytest.mark.parametrize(("name", "own", "others"), [("neurons", [1, 5, 30], [0, 6, 31]), ("head_groups", [1], [0])])
def test_a_teacher_in_bfloat16_is_cut_in_width_though_its_sums_round_in_another_way(name, own, others):
    teacher = model_of("llama", num_attention_heads=4, num_key_value_heads=2).to(torch.bfloat16)
    for block in teacher.model.layers:  # as large beside what attention adds as in a trained model
        block.mlp.down_proj.weight.data *= 100
    cut, other = (Cut("list", 4, [0, 2, 3], **{name: [part] * 3}) for part in (own, others))
    good, bad = (build_causal_lm(cut_config(teacher.config, cut), "float32", ModelArguments()) for _ in range(2))
    fill_student(teacher, good, cut)
    assert good.dtype == torch.float32
    copy_weights(teacher, bad, other)
    with pytest.raises(BadRequest, match="does not give what the teacher gives without the rest"):
        check_logits(teacher, bad, cut)


def test_how_blocks_are_chosen():
    assert evenly_spaced(7, 3) == [0, 3, 6]
    assert evenly_spaced(30, 1) == [0]
    assert most_important([0.9, 0.1, 0.5, 0.1, 0.8], 3) == [0, 2, 4]
    assert most_important([0.5, 0.5, 0.5], 2) == [0, 1]
    teacher = tiny_llama(32, 4)
    assert choose_cut(teacher, CutRequest(3, "uniform"), []).kept == [0, 2, 3]
    assert choose_cut(teacher, CutRequest(2, [1, 3]), []).method == "list"
    whole = choose_cut(teacher, CutRequest(4, "importance"), [])
    assert (whole.method, whole.kept, whole.is_whole) == ("all", [0, 1, 2, 3], True)


def test_a_cut_is_the_same_after_json():
    cut = Cut("search", 4, [0, 3], [0.1, 0.2, 0.3, 0.4], [Removal(1, 2.5), Removal(2, 3.0)],
              [[0, 5, 63], [1, 2, 3]], [[0], [1]])  # fmt: skip
    assert Cut.from_dict(json.loads(json.dumps(cut.to_dict()))) == cut
    assert cut.inherited_layers == [1, 4]
    assert cut.removed == [1, 2]
    assert not cut.is_whole


LLAMA = AutoConfig.for_model("llama", **SIZES)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"student_num_layers": 5}, "asks for 5 layers, but the teacher, .* has 4; write 3 or less"),
        ({"student_layers": [0, 4]}, "names block 4, but the teacher has the blocks 0 to 3"),
        ({"student_intermediate_size": 65}, "is 65, but the teacher's feed-forward blocks have 64 neurons"),
        ({"student_num_attention_heads": 3}, "of which each 2 share a key and a value; write one of 2, 4"),
        ({"student_num_attention_heads": 6}, "is 6, but the teacher has 4 attention heads"),
    ],
)  # fmt: skip
def test_what_the_teacher_does_not_have_is_refused(asked, message):
    with pytest.raises(BadRequest, match=message):
        cut_request(ModelArguments("teacher", **asked), LLAMA)


def test_a_size_as_large_as_the_teacher_s_cuts_nothing():
    asked = ModelArguments("teacher", student_intermediate_size=64, student_num_attention_heads=4)
    request = cut_request(asked, LLAMA)
    assert not request.reads_text(4)
    assert planned_cut(request, LLAMA).is_whole


def test_the_depth_of_a_config_is_filled_with_chosen_blocks(tmp_path):
    teacher = tiny_llama(32, 5, seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_llama(32, 2).config.save_pretrained(tmp_path / "config")
    asked = ModelArguments(
        str(tmp_path / "teacher"), student_config_name=str(tmp_path / "config"), student_init="teacher_layers",
        student_layers="[1, 4]",
    )  # fmt: skip
    student = load_student(asked, teacher, cut=cut_of(teacher, [1, 4]))
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[4].mlp.up_proj.weight)
    assert student.training
    tiny_llama(16, 2).config.save_pretrained(tmp_path / "config")
    with pytest.raises(BadRequest, match="is \\(512, 32\\) in that part of it and \\(512, 16\\) in the student"):
        load_student(asked, teacher, cut=cut_of(teacher, [1, 4]))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_read_from_the_files_where_the_teacher_holds_them_shortened(tmp_path, dtype, expected):
    stored = tiny_llama(32, 4, seed=2)
    stored.save_pretrained(tmp_path)
    asked = ModelArguments(str(tmp_path), student_num_layers=2, student_layers="uniform", student_dtype=dtype)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = load_student(asked, short)
    assert student.dtype == expected
    ours, theirs = student.model.layers[1].mlp.up_proj.weight, stored.model.layers[3].mlp.up_proj.weight
    assert torch.equal(ours, theirs.to(expected))


def test_files_that_hold_no_plain_weights_are_refused(tmp_path):
    tiny_llama(32, 4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match="is quantised by gptq in its own files; name the model that it was made of"):
        load_student(ModelArguments(str(tmp_path), student_num_layers=2), tiny_llama(32, 4))
