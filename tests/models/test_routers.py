import pytest
import torch
from helpers.models import model_of, tiny_llama

from kava_trainer.models.hidden_states import decoder_output
from kava_trainer.models.routers import router_losses, router_note
from kava_trainer.utils.errors import BadRequest

IDS = torch.randint(1, 512, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0


def mixture(kind="qwen3_moe", asks=True, coefficient=0.5, **changes):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    return model_of(
        kind, **sizes, router_aux_loss_coef=coefficient, output_router_logits=asks, **changes
    ).train()  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe", "granitemoe"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_auxiliary_loss_and_its_gradient_are_the_models_own(kind, mask):
    model = mixture(kind)
    own = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    weighted, loss = router_losses(model, decoder_output(model, IDS, mask), mask)
    torch.testing.assert_close(loss, own.aux_loss.detach())
    torch.testing.assert_close(weighted.detach(), 0.5 * own.aux_loss.detach())
    routers = [weight for name, weight in model.named_parameters() if "gate.weight" in name or "router" in name]
    assert routers
    for left, right in zip(
        torch.autograd.grad(weighted, routers), torch.autograd.grad(0.5 * own.aux_loss, routers), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_none_is_added_where_the_config_asks_for_none_and_that_is_told():
    silent = mixture(asks=False)
    assert router_losses(silent, decoder_output(silent, IDS), None) is None
    assert "output_router_logits false; with true 0.5 times it would be added" in router_note(silent)
    assert router_note(mixture()) == "Routers: 0.5 times their auxiliary loss is added, as the student's config says."
    assert router_note(mixture(coefficient=0.0)) is None
    assert router_note(tiny_llama(32, 1)) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_that_loses_the_routers_gradient_is_refused(reentrant):
    model = mixture()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    output = decoder_output(model, IDS)
    if reentrant:
        with pytest.raises(BadRequest, match='"use_reentrant": false'):
            router_losses(model, output, None)
    else:
        assert router_losses(model, output, None)[0].requires_grad
