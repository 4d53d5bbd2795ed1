"""The vocabulary head apart from its model, so that logits exist only where a term wants them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..utils.distributed import whole_weights
from ..utils.errors import BadRequest, reason_of
from .hidden_states import run_decoder
from .layers import evaluating, made_up_tokens
from .trial import can_run

_AGREE, _LARGE = 1e-3, 100.0
"""The difference that counts as none, as a share of the largest logit; how large logits are made to show a cap."""


def vocabulary_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] of last hidden states [..., d], as the model's own forward pass makes them.

    Besides the head itself these are the scalings that some families have in their config: a factor before the head
    (Inkling), a divisor (Granite), a factor (Cohere, Falcon-H1) and a soft cap (Gemma, RecurrentGemma).

    Args:
        model: a causal language model.
        states: [..., d].
    """
    config = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    if (width := getattr(config, "logits_mup_width_multiplier", None)) is not None:
        states = states / width
    # The hooks of a head whose weights are gathered already would free them with the first call.
    logits = head.forward(states) if _is_gathered(head) else head(states)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return logits


def _is_gathered(head: nn.Module) -> bool:
    """Whether a head's weights, which FSDP2 has spread over the ranks, are whole on this one now."""
    return isinstance(head, FSDPModule) and not any(isinstance(own, DTensor) for own in head.parameters())


@contextmanager
def whole_head(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` block the weights of a vocabulary head are whole on every rank.

    Where it is sharded they are gathered once then, and not with each of its calls, of which the ranks may make
    different numbers. Every rank must enter. Where they are whole already nothing happens.
    """
    head: Any = model.get_output_embeddings()
    with nullcontext() if _is_gathered(head) else whole_weights(head):
        yield


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of one token."""
    return model.config.get_text_config(decoder=True).vocab_size


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str) -> None:
    """Make sure that a model's logits are what `vocabulary_logits` makes of its last state.

    They are compared as they are and once more with a head that gives 100 times as much or so: capped logits differ
    only where they are large, which those of a new student become later.

    Args:
        model: it is left in the mode it came in.
        role: `teacher` or `student`, for the message.

    Raises:
        BadRequest: if the model does more to its logits, so that a loss on them would be wrong, or they are no numbers.
    """
    if not can_run(model):
        return
    ids = made_up_tokens(model)
    try:
        with evaluating(model):
            size, agree = _agrees(model, ids, 1.0)
            if math.isnan(size):
                what = f"The logits of the {role}, a {type(model).__name__}, are no numbers on a few plain tokens;"
                raise BadRequest(what, "look for weights that are NaN or infinite, and load it anew.")
            agree = agree and _agrees(model, ids, _LARGE / max(size, 1e-6))[1]
            reason = ""
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        agree, reason = False, f" ({reason_of(error)})"
    if not agree:
        raise BadRequest(
            f"The {role}, a {type(model).__name__}, does more to its logits than KAVA knows of, so a loss on them "
            f"cannot be computed from its hidden states{reason}.",
            "Use another model"
            + ("; or set kd_weight to 0." if role == "teacher" else ", or set lm_weight and kd_weight to 0."),
        )


def _agrees(model: PreTrainedModel, ids: torch.Tensor, factor: float) -> tuple[float, bool]:
    """The largest logit of a model whose head gives `factor` times as much, and whether ours are its own."""
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: output * factor)
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
        logits = vocabulary_logits(model, run_decoder(model, ids)).float()
    finally:
        handle.remove()
    size = own.abs().max().item()
    return size, not math.isnan(size) and own.shape == logits.shape and torch.allclose(
        logits, own, rtol=1e-2, atol=_AGREE * size
    )
