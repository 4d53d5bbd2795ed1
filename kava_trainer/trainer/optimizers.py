"""What an optimizer does to weights in bfloat16, what those of torchao need, and whether a warm-up comes to its end."""

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..utils.errors import BadRequest, reason_of


def check_holds_projectors(optimizer: torch.optim.Optimizer, projectors: nn.Module) -> None:
    """Make sure that an optimizer that the user made trains the projectors.

    Raises:
        ValueError: if it holds none of their parameters although they need gradients.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in projectors.parameters() if parameter.requires_grad]
    if trained and not any(id(parameter) in held for parameter in trained):
        raise ValueError(
            "The optimizer leaves the projectors out. Make target = build_target(args, student, teacher), pass "
            'target=target, and add {"params": target.parameters(), "lr": args.projector_learning_rate} to the '
            "optimizer's groups; or call target.requires_grad_(False), so that they stay as they are."
        )


def settle_torchao(optimizer: torch.optim.Optimizer, device: torch.device, seed: Callable[[], int]) -> None:
    """Make an optimizer of torchao run everywhere alike; any other is left as it is.

    - Its rounding is drawn from a seed of its own at each step. All ranks then round alike, whatever else they draw,
      and stay equal.
    - On a CPU its step runs as it is written. torchao would compile it for the shape of every weight, which needs a
      C++ compiler and takes seconds for each.
    - A step is tried out on a small weight, so that what cannot work is found before training.

    Args:
        optimizer: whose `step` is replaced.
        device: where its weights are.
        seed: called at each step; it must be the same on all ranks.

    Raises:
        BadRequest: if the step cannot be carried out here.
    """
    kind, eager = type(optimizer), device.type == "cpu"
    if not kind.__module__.startswith("torchao."):
        return

    changed: Any = optimizer
    changed.block_size = int(changed.block_size)  # Trainer hands over the text of optim_args (transformers 5.23.0)

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with torch.random.fork_rng([] if eager else [device], device_type=device.type), stance:
            torch.manual_seed(seed())
            return kind.step(self, closure)

    changed.step = types.MethodType(step, optimizer)  # a bound method, which schedulers wrap
    _try_out(optimizer, device, step)


def _try_out(optimizer: torch.optim.Optimizer, device: torch.device, step: Callable[..., Any]) -> None:
    """One step of an optimizer of the same kind on a weight just large enough for its small states."""
    weight = torch.zeros(64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    options = {name: getattr(optimizer, name) for name in ("block_size", "bf16_stochastic_round")}
    try:
        step(type(optimizer)([weight], **options))
    except Exception as error:  # a compiler fails in many ways
        raise BadRequest(
            f"torchao's {type(optimizer).__name__} cannot take a step on this machine ({reason_of(error)}). On a GPU "
            "it is compiled: install a C++ compiler such as g++ and Python's headers, or write another optim."
        ) from error
