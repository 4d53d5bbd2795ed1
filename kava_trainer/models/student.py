"""The student: loading it, starting it from random weights or from the teacher's layers."""

from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..config.launcher import is_fsdp_asked
from ..config.model_arguments import ModelArguments
from ..config.recipes import accelerate_config
from ..utils.errors import BadRequest
from .layers import train_text_alone
from .loading import build_causal_lm, load_causal_lm, load_config, saved_adapter
from .lora import add_adapter
from .pruning.cut import Cut, CutRequest, cut_request, planned_cut
from .pruning.student import cut_config, fill_student
from .teacher import quantization_config
from .trial import can_run

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


def read_cut_request(arguments: ModelArguments) -> tuple[CutRequest, PreTrainedConfig]:
    """What a student that is cut out of the teacher shall keep, and the teacher's config.

    Raises:
        BadRequest: if a config cannot be had, the teacher is smaller, or its files hold no plain weights.
    """
    teacher = load_config(arguments.teacher_name, "teacher", arguments.teacher_revision, arguments)
    if (method := quantized_by(teacher)) is not None:
        raise BadRequest(
            f"A student is cut out of plain weights, but the teacher {arguments.teacher_name!r} is quantised by "
            f"{method} in its own files;",
            "name the model that it was made of, and write teacher_quantization 4bit where memory is short.",
        )
    named = arguments.student_model_name_or_path or arguments.student_config_name
    student = load_config(named, "student", arguments.student_revision, arguments) if named else None
    return cut_request(arguments, teacher, student), teacher


def foreseen_layers(arguments: ModelArguments) -> list[int] | None:
    """What stands for the teacher's layers that a student is cut from before that is decided, see `planned_cut`.

    None where it is not cut out of the teacher. Raises `BadRequest` as `read_cut_request`.
    """
    return planned_cut(*read_cut_request(arguments)).inherited_layers if arguments.is_cut else None


def student_config(arguments: ModelArguments, cut: Cut | None = None) -> PreTrainedConfig:
    """The student's config.

    Args:
        arguments: which student.
        cut: what it keeps of the teacher where it is cut out of it and no config is named; where that is not known yet,
            the config is one of the same size.

    Raises:
        BadRequest: if it cannot be had, or its weights cannot be quantised as asked, or trained as they are quantised.
    """
    if arguments.is_cut:
        request, teacher = read_cut_request(arguments)
        if not (arguments.student_model_name_or_path or arguments.student_config_name):
            return cut_config(teacher, cut or planned_cut(request, teacher))
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
    if is_fsdp_asked():
        raise BadRequest(
            f"The student {name!r} holds weights quantised by {method}, which FSDP2 cannot spread;",
            f"name one that is not quantised, or start with DDP ({accelerate_config('ddp.yaml')}).",
        )
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
    arguments: ModelArguments,
    teacher: PreTrainedModel | None,
    device: torch.device | str = "cpu",
    cut: Cut | None = None,
) -> PreTrainedModel:
    """Load or make the student, in training mode, with adapters where `use_peft` asks for them.

    Weights stored in float16 become float32, or bfloat16 where they are quantised: Adam's updates overflow in pure
    float16, and so may what passes through it.

    Args:
        arguments: which student, its start (`student_init`), data type and adapters.
        teacher: gives its weights where the student is cut out of it and they are whole; None for any other student.
        device: where quantised weights are put; any others are on the CPU.
        cut: what is kept of the teacher, see `choose_cut`; needed where text decides on it, unless the teacher is one
            without storage.

    Raises:
        BadRequest: if it cannot be found, read or quantised, or the cut or the adapters do not fit it.
    """
    config = student_config(arguments, cut)
    if arguments.student_init == "pretrained":
        student = _load_pretrained(arguments, config, device)
    else:
        student = build_causal_lm(config, arguments.student_dtype, arguments)
    if arguments.is_cut:
        _fill(student, arguments, cast(PreTrainedModel, teacher), cut)
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


def _fill(student: PreTrainedModel, arguments: ModelArguments, teacher: PreTrainedModel, cut: Cut | None) -> None:
    """Give a student its part of the teacher's weights, from the teacher or from its files."""
    if cut is None:
        request, config = read_cut_request(arguments)
        cut = planned_cut(request, config)
        if can_run(teacher) and request.reads_text(cut.teacher_layers):
            raise ValueError("text decides on what is kept of this teacher: choose the cut first")
    fill_student(_with_plain_weights(arguments, teacher, student.dtype), student, cut)


def _with_plain_weights(arguments: ModelArguments, teacher: PreTrainedModel, wanted: torch.dtype) -> PreTrainedModel:
    """The teacher where its weights are as they were stored, or as they are wanted; else the same, read once more."""
    name, revision = arguments.teacher_name, arguments.teacher_revision
    if not getattr(teacher, "is_quantized", False):
        exact = (torch.float32, wanted, load_config(name, "teacher", revision, arguments).dtype)
        if teacher.dtype in exact or not can_run(teacher):
            return teacher
    return load_causal_lm(name, "teacher", revision, arguments.student_dtype, arguments).eval()
