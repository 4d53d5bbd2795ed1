import pytest
import torch
from helpers.models import model_of, tiny_llama
from transformers.cache_utils import DynamicSlidingWindowLayer

from kava_trainer.models.attention.capture import (
    AttentionPart,
    FeatureCapture,
    check_attention_is_seen,
    check_features,
    in_order,
    key_value_shape,
)
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.packed_attention import PACKED_SDPA, disable_packing
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.utils.errors import BadRequest

IDS = torch.arange(3, 12).unsqueeze(0)

PARTS = [AttentionPart(layer, part) for layer in (1, 3) for part in ("key", "value")]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "mistral"])
def test_keys_and_values_are_those_that_the_cache_holds(kind):
    model = model_of(kind, **({"num_key_value_heads": 4} if kind == "gpt2" else {}))  # which has as many as heads
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    with FeatureCapture(model, PARTS) as found:
        run_decoder(model, IDS)
    assert set(found) == set(PARTS)
    for layer, part in PARTS:
        own = getattr(cache.layers[layer - 1], f"{part}s")
        torch.testing.assert_close(found[AttentionPart(layer, part)].transpose(1, 2), own)
        assert found[AttentionPart(layer, part)].shape[2:] == key_value_shape(model)
    check_features(model, PARTS, "student")


def test_each_example_of_a_packed_row_has_the_keys_that_it_has_alone():
    model, lengths = model_of("llama"), [4, 5]
    with FeatureCapture(model, PARTS) as found:
        run_decoder(model, IDS, packed_lengths=lengths)
        packed = dict(found)
    for own, ids in zip(range(2), IDS.split(lengths, dim=1), strict=True):
        with FeatureCapture(model, PARTS) as found:
            run_decoder(model, ids)
        for part in PARTS:
            torch.testing.assert_close(packed[part].split(lengths, dim=1)[own], found[part], rtol=1e-4, atol=1e-5)


def test_states_come_beside_parts_of_attention_and_the_deepest_of_both_decides_where_the_teacher_stops():
    teacher = OnlineTeacher(model_of("llama"), [AttentionPart(3, "key"), 2])
    found = teacher.features({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert found[2].shape == (1, 9, 32)
    assert found[AttentionPart(3, "key")].shape == (1, 9, 2, 8)
    expected = teacher.model(IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found[2], expected)
    assert teacher.num_layers == 4


def test_features_are_in_the_order_of_their_layers():
    features = [AttentionPart(2, "value"), 2, AttentionPart(1, "key"), AttentionPart(2, "key")]
    assert in_order(set(features)) == [AttentionPart(1, "key"), 2, AttentionPart(2, "key"), AttentionPart(2, "value")]


def test_a_capture_that_is_taken_off_records_nothing_and_packing_stays_while_one_is_on():
    model = tiny_llama(32, 2)
    capture = FeatureCapture(model, [AttentionPart(1, "key")])
    disable_packing(model)
    assert model.config._attn_implementation == PACKED_SDPA  # else nothing would be recorded from here on
    with capture as found:
        run_decoder(model, IDS)
    run_decoder(model, IDS)
    assert len(found) == 1
    capture.remove()
    disable_packing(model)
    assert model.config._attn_implementation == "sdpa"
    with capture as found:
        run_decoder(model, IDS)
    assert not found


def test_a_query_is_scaled_as_its_products_with_the_keys_are():
    model = model_of("llama")
    wanted = [AttentionPart(2, part) for part in ("query", "key")]
    with FeatureCapture(model, wanted) as found:
        run_decoder(model, IDS)
    query, key = (found[part][0].transpose(0, 1) for part in wanted)
    scores = (query @ key.repeat_interleave(2, dim=0).transpose(1, 2)).masked_fill(
        torch.ones(9, 9).triu(1).bool(), -torch.inf
    )
    eager = model_of("llama", attention="eager")
    own = eager(IDS, output_attentions=True).attentions[1][0]
    torch.testing.assert_close(scores.softmax(dim=-1), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "eager"), ("gemma2", None), ("gpt_oss", None)])
def test_another_attention_is_refused(kind, attention):
    """The latter two have no other one in transformers, as the documents say."""
    with pytest.raises(BadRequest, match="attends by eager; write attn_implementation sdpa"):
        check_attention_is_seen(model_of(kind, attention=attention), "teacher", "kv")


def test_a_layer_without_keys_is_refused():
    model = tiny_llama(32, 2)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(BadRequest, match="Layer 2 of the student, a LlamaForCausalLM, does not attend"):
        check_features(model, [AttentionPart(1, "key"), AttentionPart(2, "key")], "student")


def test_keys_of_another_shape_than_the_config_tells_are_refused():
    model = tiny_llama(32, 2)
    model.config.num_key_value_heads = 2
    with pytest.raises(BadRequest, match=r"has key heads of \[1, 16\] .* where its config tells \[2, 16\]"):
        check_features(model, [AttentionPart(1, "key")], "teacher")


ALL_PARTS = [AttentionPart(layer, part) for layer in (1, 2, 3, 4) for part in ("query", "key", "value")]


@pytest.mark.parametrize("chunk", [4, 32])  # the second is longer than what is tried out
def test_attention_in_chunks_is_refused_and_its_keys_are_not(chunk):
    model = model_of("llama4_text", attention_chunk_size=chunk, head_dim=8)
    assert "chunked_attention" in model.config.layer_types
    check_features(model, PARTS, "student")
    chunked = model.config.layer_types.index("chunked_attention") + 1
    with pytest.raises(BadRequest, match=f"Layer {chunked} of the student, .* attends by chunked_attention"):
        check_features(model, [AttentionPart(chunked, "query")], "student")


@pytest.mark.parametrize(
    ("layer_types", "chunk", "told"),
    [
        (["full_attention"] * 4, 32, r"attends by chunks \(attention_chunk_size\)"),
        (["full_attention", "indexed_attention"] * 2, None, "attends by indexed_attention"),
        (["full_attention"] * 4, None, None),
    ],
)
def test_what_the_config_tells_of_the_mask_is_refused_where_no_window_says_it(layer_types, chunk, told):
    model = model_of("llama")
    model.config.layer_types, model.config.attention_chunk_size = layer_types, chunk
    if told is None:
        check_features(model, ALL_PARTS, "teacher")
        return
    with pytest.raises(BadRequest, match=told):
        check_features(model, ALL_PARTS, "teacher")


WIDTHS = {"gemma3_text": {"head_dim": 8}}

SLIDING = ["mistral", "gemma3_text", "phi3", "starcoder2", "olmo3", "exaone4", "cohere2"]


@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("window", [2, 4, 5, 12, 40])
def test_a_window_shorter_than_what_is_tried_out_is_no_fault(kind, window):
    check_features(model_of(kind, sliding_window=window, **WIDTHS.get(kind, {})), ALL_PARTS, "student")


def test_other_keys_in_a_window_are_a_fault(monkeypatch):
    model = model_of("mistral", sliding_window=4)
    update = DynamicSlidingWindowLayer.update

    def other(own, keys, values, *more):
        return update(own, keys + 1.0, values, *more)

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", other)
    with pytest.raises(BadRequest, match="keeps other keys in its cache than it attends to"):
        check_features(model, PARTS, "teacher")


def test_a_cache_of_part_of_the_tokens_is_a_fault_without_a_window(monkeypatch):
    model = model_of("mistral", sliding_window=4)
    monkeypatch.setattr(DynamicSlidingWindowLayer, "is_sliding", False)
    with pytest.raises(BadRequest, match="keeps no keys of every token in a cache"):
        check_features(model, PARTS, "teacher")
