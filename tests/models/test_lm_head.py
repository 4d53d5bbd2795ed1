import pytest
import torch
from helpers.models import model_of

from kava_trainer.models.lm_head import check_head, vocabulary_logits
from kava_trainer.utils.errors import BadRequest

IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "attention": "eager"}),
    ],
)
def test_logits_from_the_last_state_are_the_models_own(kind, changes):
    model = model_of(kind, **changes)
    output = model(input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(vocabulary_logits(model, output.hidden_states[-1]), output.logits)
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
