import pytest
import torch
from helpers.models import model_of

from kava_trainer.models.lm_head import check_head, vocabulary_logits
from kava_trainer.utils.errors import BadRequest

FALCON_H1 = {
    "lm_head_multiplier": 0.02, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip

IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "attention": "eager"}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "attention_window_size": 8}),
        ("falcon_h1", FALCON_H1),
    ],
)
def test_logits_from_the_last_state_are_the_models_own(kind, changes):
    model = model_of(kind, **changes)
    output = model(input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(vocabulary_logits(model, output.hidden_states[-1]), output.logits)
    check_head(model, "student")


def test_a_cap_that_small_logits_do_not_reach_is_found_all_the_same():
    model = model_of("llama")
    model.lm_head.weight.data *= 1e-3
    whole = model.forward

    def forward(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    check_head(model, "student")
    model.forward = forward
    with pytest.raises(BadRequest, match="does more to its logits"):
        check_head(model, "student")


@pytest.mark.parametrize(("role", "advice"), [("teacher", "set kd_weight to 0"), ("student", "set lm_weight and")])
def test_a_model_that_does_more_to_its_logits_is_refused(role, advice):
    model = model_of("llama")
    whole = model.forward

    def forward(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits)
        return output

    model.forward = forward
    with pytest.raises(BadRequest, match=advice):
        check_head(model, role)
