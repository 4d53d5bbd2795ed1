"""The routers of a mixture of experts: the loss that keeps these in balance, as the model's own forward adds it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils.errors import BadRequest

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(model: PreTrainedModel) -> float:
    """What a model's own forward multiplies its routers' auxiliary loss by; 0 where it has none."""
    owners: tuple[Any, ...] = (model, model.config.get_text_config(decoder=True))
    found = (getattr(owner, name, None) for owner in owners for name in _COEFFICIENTS)
    return float(next((value for value in found if value is not None), 0.0)) if _balance(model) is not None else 0.0


def balances_routers(model: PreTrainedModel) -> bool:
    """Whether the config asks for the routers' logits, with which a model adds their auxiliary loss to its own."""
    config = model.config.get_text_config(decoder=True)
    return bool(getattr(config, "output_router_logits", False)) and router_coefficient(model) != 0


def router_note(model: PreTrainedModel) -> str | None:
    """What becomes of a mixture's auxiliary loss, in a sentence; None for a model without one."""
    coefficient = router_coefficient(model)
    if coefficient == 0:
        return None
    if balances_routers(model):
        return f"Routers: {coefficient:g} times their auxiliary loss is added, as the student's config says."
    return (
        "Routers: no auxiliary loss keeps the student's experts in balance, because its config says "
        f"output_router_logits false; with true {coefficient:g} times it would be added."
    )


def router_losses(
    model: PreTrainedModel, output: Any, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The auxiliary loss of one batch: with its coefficient and gradient, and without both; None where none is asked.

    Args:
        model: a causal language model.
        output: what its decoder gave.
        attention_mask: 1 at real tokens [B, T]; None where all are.

    Raises:
        BadRequest: if gradient checkpointing keeps the routers from getting a gradient.
    """
    logits = getattr(output, "router_logits", None) if balances_routers(model) else None
    if not logits:
        return None
    learns = any(layer.requires_grad for layer in logits)
    if torch.is_grad_enabled() and not learns and _recomputes(model):
        raise BadRequest(
            "Under reentrant gradient checkpointing the student's routers get no gradient of their auxiliary loss;",
            'write gradient_checkpointing_kwargs {"use_reentrant": false}.',
        )
    balance: Any = _balance(model)
    loss = balance(tuple(logits), *_experts(model), attention_mask)
    return router_coefficient(model) * loss, loss.detach()


def _recomputes(model: PreTrainedModel) -> bool:
    """Whether a block's states are computed anew in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _balance(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The function of the auxiliary loss that the model's own code brings."""
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    return next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)


def _experts(model: PreTrainedModel) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token goes to."""
    config = model.config.get_text_config(decoder=True)
    owners: tuple[Any, ...] = (model, config)
    count = next(getattr(o, n) for n in ("num_experts", "num_local_experts") for o in owners if hasattr(o, n))
    return count, next(o.num_experts_per_tok for o in owners if hasattr(o, "num_experts_per_tok"))
