"""The vocabulary head apart from its model, so that logits exist only where a term wants them."""

import torch
from transformers import PreTrainedModel

from ..utils.errors import BadRequest


def vocabulary_logits(model: PreTrainedModel, states: torch.Tensor, with_hooks: bool = True) -> torch.Tensor:
    """Logits [..., vocabulary] of last hidden states [..., d], as the model's own forward pass makes them.

    Besides the head itself these are the scalings that some families have in their config: a divisor (Granite), a
    factor (Cohere) and a soft cap (Gemma 2).

    Args:
        model: a causal language model.
        states: [..., d].
        with_hooks: whether the hooks on the head run, as they do in the model's own forward pass.
    """
    config = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    logits = head(states) if with_hooks else head.forward(states)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of one token."""
    return model.config.get_text_config(decoder=True).vocab_size


@torch.no_grad()
def check_head(model: PreTrainedModel, input_ids: torch.Tensor, role: str) -> None:
    """Make sure that a model's logits are what `vocabulary_logits` makes of its last state.

    Args:
        model: it is left in the mode it came in.
        input_ids: a real text [1, T]: capped logits differ only where they are large.
        role: `teacher` or `student`, for the message.

    Raises:
        BadRequest: if the model does more to its logits, so that a loss on them would be wrong.
    """
    training = model.training
    output = model.eval()(input_ids=input_ids.to(model.device), use_cache=False, output_hidden_states=True)
    model.train(training)
    own, logits = vocabulary_logits(model, output.hidden_states[-1]).float(), output.logits.float()
    if not torch.allclose(own, logits, rtol=1e-2, atol=1e-2 * logits.abs().max().item()):
        raise BadRequest(
            f"The {role}, a {type(model).__name__}, does more to its logits than KAVA knows of, so a loss on them "
            "cannot be computed from its hidden states.",
            "Use another model"
            + ("; or set kd_weight to 0." if role == "teacher" else ", or set lm_weight and kd_weight to 0."),
        )
