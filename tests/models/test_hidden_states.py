import pytest
import torch
from helpers.models import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from kava_trainer.config.layer_mapping import resolve_layer_pairs
from kava_trainer.models.hidden_states import HiddenStateCapture, run_decoder
from kava_trainer.models.layers import number_of_layers, truncated
from kava_trainer.utils.errors import BadRequest

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}
FAMILIES = {
    "llama": {**SMALL, "intermediate_size": 48},
    "qwen2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1},
    "qwen3": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16},
    "mistral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 99},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99,
            "word_embed_proj_dim": 32},
    "phi3": {**SMALL, "intermediate_size": 48, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_states_are_the_hidden_states_of_transformers(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    input_ids = torch.randint(3, 99, (2, 7))
    expected = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    assert number_of_layers(model) == 3
    with HiddenStateCapture(model, [1, 2, 3]) as states:
        model(input_ids=input_ids, use_cache=False)
    assert sorted(states) == [1, 2, 3]
    for layer, state in states.items():
        torch.testing.assert_close(state, expected[layer], rtol=0, atol=0)


def test_nothing_is_kept_outside_of_the_context():
    model = tiny_llama(32, 2)
    capture = HiddenStateCapture(model, [1, 2])
    with capture as states:
        pass
    model(input_ids=torch.tensor([[1, 2]]))
    assert states == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_captured_states(checkpointing):
    model = tiny_llama(32, 3).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with HiddenStateCapture(model, [1, 3]) as states:
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    (states[1].sum() + states[3].square().sum()).backward()
    plain = tiny_llama(32, 3).train()
    hidden = plain(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True, use_cache=False).hidden_states
    (hidden[1].sum() + hidden[3].square().sum()).backward()
    for ours, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (reference.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, reference.grad)


def test_a_truncated_model_runs_no_deeper_and_is_whole_again():
    model = tiny_llama(32, 4).eval()
    input_ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(input_ids=input_ids, output_hidden_states=True).hidden_states
    capture = HiddenStateCapture(model, [1, 2])
    handles = [block.register_forward_hook(lambda *_: pytest.fail("too deep")) for block in model.model.layers[2:]]
    with truncated(model, 2), capture as states:
        run_decoder(model, input_ids)
    assert torch.equal(states[1], expected[1])
    assert torch.equal(states[2], expected[2])
    for handle in handles:
        handle.remove()
    assert len(model.model.layers) == 4
    assert torch.equal(run_decoder(model, input_ids), expected[4])


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "pairs"),
    [
        ("last", 24, 28, [(24, 28)]),
        ("uniform:1", 24, 28, [(24, 28)]),
        ("uniform:2", 24, 28, [(1, 1), (24, 28)]),
        ("uniform:3", 24, 28, [(1, 1), (12, 14), (24, 28)]),
        ("all", 3, 4, [(1, 1), (2, 3), (3, 4)]),
        ("all", 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("[[1, 2], [3, 4]]", 3, 4, [(1, 2), (3, 4)]),
    ],
)
def test_layer_mapping(mapping, student, teacher, pairs):
    assert resolve_layer_pairs(mapping, student, teacher) == pairs


@pytest.mark.parametrize("mapping", ["uniform:5", "[[1, 9]]", "[[4, 1]]"])
def test_a_mapping_out_of_range_is_refused(mapping):
    with pytest.raises(BadRequest, match="layer"):
        resolve_layer_pairs(mapping, 3, 4)
