"""What an optimizer does to weights in bfloat16, what those of torchao need, and whether a warm-up comes to its end."""

import math
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torchao_available

from .errors import BadRequest, reason_of

TORCHAO_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optim` that Trainer takes from torchao."""

REMEDY = "optim adamw_torch_8bit with optim_args bf16_stochastic_round=True,block_size=64"
"""What to write for weights in bfloat16; measured in `docs/numbers.md`."""

_SWITCHES = {
    **dict.fromkeys(TORCHAO_OPTIMIZERS, "bf16_stochastic_round"),
    "adamw_anyprecision": "use_kahan_summation",
}
"""The word in `optim_args` that makes an optimizer keep small updates of bfloat16 weights."""

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` that have none (read in transformers 5.23.0)."""


def optimizer_name(optim: Any) -> str:
    """The name of an optimizer as it is written in the arguments; `TrainingArguments` makes it an enum."""
    return str(getattr(optim, "value", optim))


def parse_optim_args(optim_args: str | None) -> dict[str, str]:
    """The words of `optim_args`; what Trainer will refuse is left out."""
    words = (optim_args or "").replace(" ", "").split(",")
    return dict(word.split("=", 1) for word in words if "=" in word)


def missing_package(optim: Any) -> str | None:
    """The sentence for an `optim` whose package is not installed; None where there is nothing to say."""
    if optimizer_name(optim) not in TORCHAO_OPTIMIZERS or is_torchao_available():
        return None
    checkout = Path(__file__).parents[1]  # its constraints name the version that was tried
    pinned = (checkout / "constraints.txt").is_file()
    command = 'pip install -c constraints.txt -e ".[bf16]"' if pinned else "pip install torchao"
    return (
        f"optim is {optimizer_name(optim)}, which needs torchao; run {command}, or write another optim, such as "
        "adamw_torch_fused."
    )


def rounding_problem(optim: Any, optim_args: str | None, dtypes: Iterable[torch.dtype]) -> str | None:
    """Whether small updates of the weights will be lost.

    A bfloat16 holds 8 significant bits. A step smaller than about 1/512 of a weight is rounded away, unless the
    optimizer rounds at random (torchao) or carries what was lost (Kahan: `stable_adamw`, which does so of itself, and
    `adamw_anyprecision`).

    Args:
        optim: as in the arguments.
        optim_args: as in the arguments.
        dtypes: of the weights that are trained.

    Returns:
        The sentence for the user; None where nothing is lost.
    """
    name = optimizer_name(optim)
    switched_on = parse_optim_args(optim_args).get(_SWITCHES.get(name, ""), "false").lower() in (
        "true",
        "1",
        "yes",
        "y",
        "on",
        "t",
    )
    if torch.bfloat16 not in set(dtypes) or switched_on or name == "stable_adamw":
        return None
    return (
        f"The student's weights are bfloat16, and optim {name} rounds away most updates at a low learning rate. Write "
        f"{REMEDY}, or student_dtype float32 with bf16 true."
    )


def planned_steps(training: TrainingArguments, examples: int, processes: int) -> int:
    """The optimizer steps of a training.

    Args:
        training: whose `max_steps` decides where it is above 0.
        examples: of the training data.
        processes: that share them.
    """
    if training.max_steps > 0:
        return training.max_steps
    batches = examples / (training.per_device_train_batch_size * processes)
    whole = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    return math.ceil(training.num_train_epochs * max(math.ceil(whole / training.gradient_accumulation_steps), 1))


def long_warmup(training: TrainingArguments, steps: int) -> str | None:
    """The sentence for a warm-up that a training of so many steps does not come out of; None where it does."""
    warmup = training.get_warmup_steps(steps)
    if warmup < steps or training.lr_scheduler_type in _WITHOUT_WARMUP:
        return None
    share_helps = training.warmup_steps >= 1 and steps > 1
    remedy = ", or write a share of all steps, such as 0.1" if share_helps else "; 0 leaves the warm-up out"
    return (
        f"warmup_steps comes to {warmup} and the whole training to {steps} (optimizer steps), so the learning rates "
        f"reach their full values only when it ends, or never. Lower warmup_steps{remedy}."
    )


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
