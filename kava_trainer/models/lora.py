"""LoRA adapters on a student whose own weights are frozen: which there are, and how they are put in.

They are transformers' own (`PreTrainedModel.add_adapter`, on peft's layers), not a `PeftModel` around the student: the
student stays the `PreTrainedModel` that hidden states are captured from, whose vocabulary head is run apart, and that
Trainer makes checkpoint its activations.
"""

from importlib.metadata import version
from typing import Any, cast

import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel
from transformers.integrations import peft as peft_integration

from ..config.model_arguments import ModelArguments
from ..utils.errors import BadRequest, reason_of
from .loading import model_folder

ADAPTER = "default"
"""The name that peft gives to an adapter when it is given none."""

_TAKES_RELEASED_PEFT = "5.23.0"
"""The newest transformers that was tried with a released peft; 5.24.0 refused all there were."""


def has_adapter(student: PreTrainedModel) -> bool:
    """Whether a student is trained through adapters."""
    return bool(getattr(student, "peft_config", None))


def unwrapped(model: Any, role: str) -> Any:
    """The model inside a `PeftModel`, with its adapters as they are; anything else as it is.

    Raises:
        ValueError: if its adapters are no part of it, or a student has any but one of the usual name.
    """
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"The {role} is a PeftModel that learns a prompt, which its hidden states would need too.")
    inner: Any = model.get_base_model()
    if role == "student":
        if list(model.peft_config) != [ADAPTER]:
            names = ", ".join(model.peft_config)
            raise ValueError(f"The student has the adapters {names}; give it one alone, named {ADAPTER}.")
        inner.peft_config = model.peft_config
        keep_differentiable(inner)
    return inner


def trained_parameters(student: PreTrainedModel) -> int:
    """Number of the student's weights that are trained."""
    return sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)


def add_adapter(student: PreTrainedModel, arguments: ModelArguments) -> None:
    """Freeze a student and put LoRA adapters into it, as the arguments ask.

    The adapters are float32 whatever the student is: bfloat16 would round most of their small updates away. Random
    numbers are drawn for them.

    Args:
        student: without adapters; its weights may be quantised or fake.
        arguments: `lora_*`, and which student it is.

    Raises:
        BadRequest: if the student lacks a module that they name or cannot be adapted there, or transformers refuses
            the installed peft.
    """
    targets, saved = arguments.lora_target_modules, cast(list[str], arguments.lora_modules_to_save)
    _check_versions()
    if isinstance(targets, list):
        _check_names("lora_target_modules", targets, student)
    _check_names("lora_modules_to_save", saved, student)
    if arguments.merge_adapter and isinstance(targets, list):
        _check_can_be_merged(student, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        revision=arguments.student_revision,
    )
    try:
        student.add_adapter(config, ADAPTER)
    except ValueError as error:
        raise BadRequest(f"LoRA adapters cannot be put into the student: {reason_of(error)}") from error
    # peft makes it a set, whose order differs from run to run
    config.target_modules = sorted(cast(set[str], config.target_modules))
    config.base_model_name_or_path = _base_name(arguments)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    keep_differentiable(student)


def _check_versions() -> None:
    """Say what to install where transformers refuses the installed peft: it may want one that is not released yet."""
    # Read in transformers 5.24.0, where it is undocumented; without it transformers' own message stands.
    wanted, there = getattr(peft_integration, "MIN_PEFT_VERSION", None), version("peft")
    if wanted is not None and Version(there) < Version(wanted):
        raise BadRequest(
            f"LoRA adapters need peft {wanted} or later with transformers {transformers.__version__}, and peft {there} "
            "is installed.",
            f'Run pip install -U "peft>={wanted}", or, where pip finds none, pip install '
            f'"transformers=={_TAKES_RELEASED_PEFT}".',
        )


def _base_name(arguments: ModelArguments) -> str | None:
    """Where whoever loads the adapter finds what is beneath it: a hub id, or a folder wherever they work."""
    name = arguments.student_model_name_or_path
    folder = None if name is None else model_folder(name, "student")
    return name if folder is None else str(folder.resolve())


def keep_differentiable(student: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for inference.

    On CPUs with bfloat16 instructions it does so at the first forward pass in evaluation mode, for good, and what runs
    on packed weights has no gradient (read in bitsandbytes 0.50.2).
    """
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _is_named(module: str, names: list[str]) -> bool:
    """Whether a list of names, as peft reads it, means the module with this full name."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _check_names(argument: str, names: list[str], student: PreTrainedModel) -> None:
    modules = dict(student.named_modules())
    missing = [name for name in names if not any(_is_named(module, [name]) for module in modules)]
    if missing:
        matrices = {
            name.rpartition(".")[2] for name, module in modules.items() if getattr(module, "weight", None) is not None
            and module.weight.dim() == 2
        }  # fmt: skip
        raise BadRequest(
            f"{argument} names {', '.join(missing)}, which the student, a {type(student).__name__}, does not have. "
            f"It has {', '.join(sorted(matrices))}."
        )


def _check_can_be_merged(student: PreTrainedModel, targets: list[str]) -> None:
    """An adapter beside a weight that stands in two places cannot be added to one of them alone."""
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    tied = [name for name, module in student.named_modules() if module is head or module is embeddings]
    if found := [name.rpartition(".")[2] for name in tied if _is_named(name, targets)]:
        raise BadRequest(
            f"lora_target_modules names {', '.join(found)}, but the student's vocabulary head and its "
            "embeddings are one weight, which cannot take the adapter of one of them.",
            "Leave it out, name it in lora_modules_to_save instead, or write merge_adapter false.",
        )
