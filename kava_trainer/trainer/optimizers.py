"""What an optimizer does to weights in bfloat16, what those of torchao need, and whether a warm-up comes to its end."""

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


class OwnRounding(torch.optim.Optimizer):
    """Beside an optimizer of torchao: its step runs everywhere alike.

    - Its rounding is drawn from a seed of its own at each step. All ranks then round alike, whatever else they draw,
      and stay equal.
    - On a CPU its step runs as it is written. torchao would compile it for the shape of every weight, which needs a
      C++ compiler and takes seconds for each.
    """

    seed: Callable[[], int]
    """Called at each step; it must be the same on all ranks."""

    def step(self, closure: Any = None) -> Any:
        """The step of the optimizer beside this class."""
        device = self.param_groups[0]["params"][0].device
        eager = device.type == "cpu"
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with torch.random.fork_rng([] if eager else [device], device_type=device.type), stance:
            torch.manual_seed(self.seed())
            return super().step(closure)


def settled(kind: Any, options: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """An optimizer's class and arguments, as KAVA uses them; but for those of torchao they are what they were.

    A step of those is tried out on a small weight, so that what cannot work is found before training.

    Args:
        kind: the class, or anything else that makes an optimizer.
        options: its arguments but for the weights.
        device: where they are.

    Raises:
        BadRequest: if a step cannot be carried out here.
    """
    if not getattr(kind, "__module__", "").startswith("torchao."):
        return kind, options
    if "block_size" in options:  # Trainer hands over the text of optim_args (transformers 5.23.0)
        options = {**options, "block_size": int(options["block_size"])}
    own = type(kind.__name__, (OwnRounding, kind), {"seed": lambda self: 0})
    _try_out(own, {name: options[name] for name in ("block_size", "bf16_stochastic_round") if name in options}, device)
    return own, options


def _try_out(kind: Any, options: dict[str, Any], device: torch.device) -> None:
    """One step on a weight just large enough for small states."""
    weight = torch.zeros(64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    try:
        kind([weight], **options).step()
    except Exception as error:  # a compiler fails in many ways
        raise BadRequest(
            f"torchao's {kind.__name__} cannot take a step on this machine ({reason_of(error)}). On a GPU it is "
            "compiled: install a C++ compiler such as g++ and Python's headers, or write another optim."
        ) from error


def give_own_rate(optimizer: torch.optim.Optimizer, projectors: nn.Module, rate: float) -> None:
    """Split the projectors out of each group of an optimizer, into one with a learning rate of their own."""
    own = {id(parameter) for parameter in projectors.parameters()}
    for group in list(optimizer.param_groups):
        projector = [parameter for parameter in group["params"] if id(parameter) in own]
        if projector:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rest = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**rest, "params": projector, "lr": rate})


def weights_by_group(optimizer: torch.optim.Optimizer, drop_empty: bool = False) -> list[list[torch.Tensor]]:
    """The weights of each group of an optimizer.

    Args:
        optimizer: that was just made.
        drop_empty: take groups without weights from it. Those of sharded weights come back from a checkpoint without
            their options (torch 2.13.0), and the optimizer could take no step.
    """
    if drop_empty:
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return [list(group["params"]) for group in optimizer.param_groups]


def give_weights(optimizer: torch.optim.Optimizer, weights: list[list[torch.Tensor]]) -> None:
    """Let the groups of an optimizer hold these weights, see `weights_by_group`."""
    for group, own in zip(optimizer.param_groups, weights, strict=True):
        group["params"] = list(own)


def rate_of(optimizer: torch.optim.Optimizer | None, projectors: nn.Module) -> float:
    """The learning rate of the projectors; 0 where nothing trains them."""
    own = {id(parameter) for parameter in projectors.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [group["lr"] for group in groups if any(id(parameter) in own for parameter in group["params"])]
    return float(rates[0]) if rates else 0.0
