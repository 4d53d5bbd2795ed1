"""The student: loading it, starting it from random weights or from the teacher's layers."""

import re
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..config.model_arguments import ModelArguments
from ..utils.errors import BadRequest
from .layers import number_of_layers, train_text_alone
from .loading import build_causal_lm, load_causal_lm, load_config, saved_adapter
from .lora import add_adapter
from .teacher import quantization_config

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
"""What a generation config may set only beside `do_sample`."""


def mend_generation_config(student: PreTrainedModel) -> str | None:
    """Make of a student's generation config one that can be saved: transformers loads others, and writes none of them.

    Returns:
        What was changed, in a sentence; None where nothing was.

    Raises:
        BadRequest: if there is more to mend than sampling that is not asked for.
    """
    if student.generation_config is None:
        student.generation_config = GenerationConfig.from_model_config(student.config)
    config, plain = student.generation_config, GenerationConfig()
    if _generation_problem(config) is None:
        return None
    kept = [name for name in _SAMPLING if getattr(config, name, None) != getattr(plain, name, None)]
    for name in kept:
        setattr(config, name, getattr(plain, name, None))
    if (problem := _generation_problem(config)) is not None:
        raise BadRequest(
            f"The student's generation config cannot be saved ({problem});", "mend generation_config.json."
        )
    return (
        f"The student's generation config sets {', '.join(kept)} without do_sample, which cannot be saved; the student "
        "is saved without them, as one that answers greedily."
    )


def _generation_problem(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error).strip().splitlines()[-1].lstrip("- ")
    return None


def student_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The student's config.

    Raises:
        BadRequest: if it cannot be had, or its weights cannot be quantised as asked, or trained as they are quantised.
    """
    name = cast(str, arguments.student_model_name_or_path or arguments.student_config_name)
    config = load_config(name, "student", arguments.student_revision, arguments)
    if arguments.student_init == "pretrained" and saved_adapter(name, "student", arguments.student_revision):
        _check_merging(name, arguments, quantized_by(config) is not None)
    quantization_config(arguments.student_quantization, "student")  # refused before anything is loaded
    if (method := quantized_by(config)) is None:
        return config
    if arguments.student_init != "pretrained":
        del config.quantization_config  # it tells of weights that are not loaded
        return config
    if not arguments.use_peft:
        raise BadRequest(
            f"The student {name!r} holds weights quantised by {method}, which cannot be trained themselves;",
            "write use_peft true to train adapters on them, or name a student that is not quantised.",
        )
    if arguments.student_quantization != "none":
        raise BadRequest(f"The student {name!r} is quantised by {method} already;", "write student_quantization none.")
    if arguments.merge_adapter and method != "bitsandbytes":
        raise BadRequest(
            f"Adapters cannot be merged into the student {name!r}, whose weights are quantised by {method};",
            "write merge_adapter false.",
        )
    return config


def _check_merging(name: str, arguments: ModelArguments, is_quantized: bool) -> None:
    """Make sure that a student that is an adapter can become part of the model beneath it."""
    what = f"The student {name!r} is an adapter, which is merged into the model beneath it before the training"
    if is_quantized or arguments.student_quantization != "none":
        raise BadRequest(f"{what}, and quantised weights take none;", "merge it first, or use weights as they are.")
    if arguments.exports_adapter:
        raise BadRequest(f"{what}, so nobody could load what merge_adapter false exports;", "write merge_adapter true.")


def quantized_by(config: PreTrainedConfig) -> str | None:
    """What a checkpoint's weights are quantised by, from its config; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def load_student(
    arguments: ModelArguments, teacher: PreTrainedModel, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load or make the student, in training mode, with adapters where `use_peft` asks for them.

    Weights stored in float16 become float32, or bfloat16 where they are quantised: Adam's updates overflow in pure
    float16, and so may what passes through it.

    Args:
        arguments: which student, its start (`student_init`), data type and adapters.
        teacher: gives its layers where `student_init` is `teacher_layers`.
        device: where quantised weights are put; any others are on the CPU.

    Raises:
        BadRequest: if it cannot be found, read or quantised, or the teacher's layers or the adapters do not fit it.
    """
    config = student_config(arguments)
    if arguments.student_init == "pretrained":
        student = _load_pretrained(arguments, config, device)
    else:
        student = build_causal_lm(config, arguments.student_dtype, arguments)
    if arguments.student_init == "teacher_layers":
        copy_teacher_layers(teacher, student)
    if student.dtype == torch.float16:
        student = student.float()
    if arguments.use_peft:
        add_adapter(student, arguments)
    train_text_alone(student)
    return student.train()


def _load_pretrained(
    arguments: ModelArguments, config: PreTrainedConfig, device: torch.device | str
) -> PreTrainedModel:
    """The student with its own weights, quantised as they are or as asked."""
    name = cast(str, arguments.student_model_name_or_path)
    revision, dtype = arguments.student_revision, arguments.student_dtype
    placement: dict[str, Any] = {}
    if (quantization := quantization_config(arguments.student_quantization, "student")) is not None:
        placement["quantization_config"] = quantization
    if quantization is not None or quantized_by(config) is not None:
        placement["device_map"] = {"": str(device)}
        dtype = "bfloat16" if dtype == "auto" and config.dtype == torch.float16 else dtype
    return load_causal_lm(name, "student", revision, dtype, arguments, **placement)


@torch.no_grad()
def copy_teacher_layers(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Fill a student with the teacher's embeddings, norm and head, and with evenly spaced teacher blocks.

    The first student block is the teacher's first, the last one its last.

    Raises:
        BadRequest: if the teacher is quantised, the student is deeper, or any width differs.
    """
    if getattr(teacher, "is_quantized", False):
        raise BadRequest(
            "student_init teacher_layers needs the teacher's own weights;", "set teacher_quantization none."
        )
    depth, teacher_depth = number_of_layers(student), number_of_layers(teacher)
    if depth > teacher_depth:
        raise BadRequest(
            f"student_init teacher_layers: the student has {depth} layers and the teacher only {teacher_depth}."
        )
    source_of = [round(index * (teacher_depth - 1) / max(depth - 1, 1)) for index in range(depth)]
    numbered_block = re.compile(r"((?:^|\.)(?:layers|h|blocks)\.)(\d+)(?=\.)")
    weights = teacher.state_dict()
    for name, parameter in student.state_dict().items():
        source = numbered_block.sub(lambda found: f"{found[1]}{source_of[int(found[2])]}", name, count=1)
        if source not in weights or weights[source].shape != parameter.shape:
            shape = tuple(weights[source].shape) if source in weights else "missing"
            raise BadRequest(
                f"student_init teacher_layers: {source} is {shape} in the teacher and "
                f"{tuple(parameter.shape)} in the student. All widths must agree;",
                "choose a student that differs in the number of layers alone.",
            )
        parameter.copy_(weights[source])
