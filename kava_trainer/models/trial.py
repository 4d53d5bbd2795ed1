"""What is tried out of a model on a few tokens before it is trained, or learned from."""

import torch
from transformers import PreTrainedModel

from ..utils.errors import BadRequest
from .hidden_states import HiddenStateCapture, run_decoder
from .layers import evaluating, made_up_tokens, number_of_layers, state_width


def can_run(model: PreTrainedModel) -> bool:
    """Whether a model holds its weights, or knows from where they come."""
    return bool(getattr(model, "hf_device_map", None)) or not any(own.is_meta for own in model.parameters())


@torch.no_grad()
def check_states(model: PreTrainedModel, layers: list[int], role: str) -> None:
    """Make sure that what is captured of some layers are a model's hidden states, as wide as its config says.

    Args:
        model: it is left in the mode it came in.
        layers: that are aligned.
        role: `teacher` or `student`, for the message.

    Raises:
        BadRequest: if they are not.
    """
    if not can_run(model):
        return
    ids, capture = made_up_tokens(model), HiddenStateCapture(model, layers)
    try:
        with evaluating(model), capture as states:
            run_decoder(model, ids)
            found = dict(states)
            own = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        capture.remove()
    whose = f"the {role}, a {type(model).__name__},"
    for layer in layers:
        expected, state = [*ids.shape, state_width(model, [layer])], found.get(layer)
        if state is None or list(state.shape) != expected:
            shape = "no state" if state is None else f"a state of {list(state.shape)}"
            raise BadRequest(
                f"Layer {layer} of {whose} gives {shape} where {expected} is due;",
                "name other layers in layer_mapping, or another model.",
            )
        if layer < number_of_layers(model) and own and not any(are_same(state, one) for one in own):
            what = f"What can be read of layer {layer} of {whose} is no hidden state of it;"
            raise BadRequest(what, "use layer_mapping last.")


def are_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors, which may be on two devices, hold the same but for rounding."""
    if left.shape != right.shape:
        return False
    return torch.allclose(left, right.to(left.device), rtol=1e-2, atol=1e-3, equal_nan=True)
