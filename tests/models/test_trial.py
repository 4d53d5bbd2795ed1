import pytest
import torch
from helpers.models import model_of, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from kava_trainer.models.hidden_states import HiddenStateCapture, run_decoder
from kava_trainer.models.layers import evaluating, find_decoder, state_width
from kava_trainer.models.lm_head import check_head, vocabulary_logits
from kava_trainer.models.trial import check_states
from kava_trainer.utils.errors import BadRequest

IDS = torch.arange(1, 9).unsqueeze(0)


def narrow_opt():
    """OPT-350m in small: its last state is projected to the width of its embeddings."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", vocab_size=512, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=2,
        word_embed_proj_dim=16, do_layer_norm_before=False, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_last_state_that_is_narrower_than_the_others_has_its_own_width():
    model = narrow_opt()
    check_states(model, [1, 3], "student")
    check_head(model, "student")
    with HiddenStateCapture(model, [2, 3]) as states:
        own = model(IDS)
    assert (
        [state_width(model, [layer]) for layer in (2, 3)] == [states[layer].shape[-1] for layer in (2, 3)] == [32, 16]
    )
    torch.testing.assert_close(vocabulary_logits(model, states[3]), own.logits)
    assert state_width(tiny_llama(32, 2), [1, 2]) == 32
    with pytest.raises(BadRequest, match="is 16 wide and its others 32"):
        state_width(model, [1, 3])


@pytest.mark.parametrize("kind", ["llama4_text", "qwen2", "gpt_neox"])
def test_the_decoder_is_found_without_its_head(kind):
    model = model_of(kind, head_dim=16, intermediate_size_mlp=64, num_local_experts=2)
    assert not any(module is model.get_output_embeddings() for module in find_decoder(model).modules())
    assert run_decoder(model, IDS).shape == (1, 8, 32)
    check_states(model, [1, 2], "student")
    check_head(model, "student")


def test_blocks_and_heads_of_another_kind_are_refused_in_one_sentence():
    model = model_of("xlm", None, emb_dim=32, n_layers=2, n_heads=2)
    with pytest.raises(BadRequest, match="of layer 1 of the student, a XLMWithLMHeadModel, is no hidden state of it"):
        check_states(model, [1], "student")
    with pytest.raises(BadRequest, match="The teacher, a BertLMHeadModel, does more to its logits"):
        check_head(model_of("bert", None, is_decoder=True), "teacher")
    with pytest.raises(BadRequest, match=r"its hidden states \(mat1 and mat2 shapes cannot be multiplied"):
        check_head(model_of("rembert", None, is_decoder=True, output_embedding_size=48), "student")


def test_each_module_is_in_the_mode_it_was_in():
    model = tiny_llama(32, 2).train()
    model.model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.model.layers[1].training
    assert not model.model.layers[0].self_attn.training


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told_as_such(role, value):
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    check_states(model, [1, 2], role)  # it gives its own states, whatever these are
    with pytest.raises(BadRequest, match=f"The logits of the {role}, a LlamaForCausalLM, are no numbers"):
        check_head(model, role)


@pytest.mark.parametrize("positions", [4, 8])
def test_a_model_that_reads_few_tokens_is_tried_out_on_as_many(positions):
    model = model_of("gpt2", n_positions=positions)
    check_states(model, [1, 2], "student")
    check_head(model, "student")
