"""A student's weights on disk: a plain model, its adapters alone, or a plain model with the adapters merged into it."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .lora import ADAPTER, has_adapter

_PREFIX = "base_model.model."
"""What names of weights begin with in an adapter's file, and in a `PeftModel`."""


def adapter_weights(
    student: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The trained weights of a student with adapters, by their names in the student without the adapter's own.

    Where it does not hold them itself, `state_dict` has those of `trained_names`.
    """
    return get_peft_model_state_dict(student, state_dict, adapter_name=ADAPTER, save_embedding_layers=False)


def trained_names(student: PreTrainedModel) -> set[str]:
    """The names, in a student with adapters, of the adapters' weights and of what is trained beside them."""
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    return trained | {name for name in student.state_dict() if not _is_beneath(name)}


def _is_beneath(name: str) -> bool:
    """Whether a name is that of a weight beneath the adapters."""
    return not any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def save_weights(
    student: PreTrainedModel,
    folder: str | Path,
    merge_adapter: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a student as `from_pretrained` expects it.

    Where it has adapters these alone are written, as peft does; transformers would ask the hub for the base model's
    config each time.

    Args:
        student: it is left as it is.
        folder: an existing folder.
        merge_adapter: write a plain model with the adapters merged into it instead.
        state_dict: the weights of a student that does not hold them itself: all of them, or those of `trained_names`
            where adapters are written alone.
    """
    if not has_adapter(student):
        student.save_pretrained(folder, state_dict=state_dict)
        return
    if merge_adapter:
        merged_student(student, state_dict).save_pretrained(folder)
        return
    own = adapter_weights(student, state_dict)
    weights = {f"{_PREFIX}{name}": weight.contiguous() for name, weight in own.items()}
    student.peft_config[ADAPTER].save_pretrained(str(folder))
    save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    student.generation_config.save_pretrained(folder)


def load_weights(folder: str | Path, student: PreTrainedModel) -> None:
    """Put the weights of a saved student without adapters into one like it.

    Transformers writes many families (mixtures of experts, models that read images) as their first checkpoints were
    named and laid out, and only `from_pretrained` reads that: Trainer would leave their weights as they are.

    Raises:
        OSError, SafetensorError: if they cannot be read.
        RuntimeError, ValueError: if they are another model's.
    """
    kinds = {weight.dtype for weight in student.parameters()}
    exact = kinds.pop() if len(kinds) == 1 else torch.float32
    kind: Any = type(student)
    with torch.random.fork_rng([]):
        saved, found = kind.from_pretrained(str(folder), dtype=exact, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more} of the student's weights are not in it")
    student.load_state_dict(saved.state_dict())


def load_adapter(folder: str | Path, student: PreTrainedModel) -> None:
    """Put the weights of a saved adapter into a student's adapters.

    Raises:
        OSError: if there is none.
        ValueError: if it has other weights than the student's.
    """
    saved = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    weights = {name.removeprefix(_PREFIX): weight for name, weight in saved.items()}
    if weights.keys() != adapter_weights(student).keys():
        raise ValueError("its adapter is of other modules than this run's")
    set_peft_model_state_dict(student, weights, ADAPTER)


def reload_problem(student: PreTrainedModel) -> str | None:
    """Why a saved student would not be loaded as it is, in a clause; None where it would be.

    Somebody may have put other modules into it, of which its config does not know.
    """
    if has_adapter(student) or getattr(student, "is_quantized", False):
        return None
    with torch.device("meta"), torch.random.fork_rng([]):
        plain = {
            name: weight.shape for name, weight in type(student)(copy.deepcopy(student.config)).state_dict().items()
        }
    own = {name: weight.shape for name, weight in student.state_dict().items()}
    odd = sorted(name for name in own.keys() | plain.keys() if own.get(name) != plain.get(name))
    if not odd:
        return None
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"{odd[0]}{more} of its weights are not what its config describes, so nobody could load them again"


def merged_student(student: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """A plain model on the CPU that computes what a student with adapters does, up to rounding.

    Quantised weights are dequantised: the adapters were trained, and the student was measured, on what these hold, and
    not on the weights that they were quantised from. The student is left as it is.

    Args:
        student: has adapters.
        state_dict: all its weights, where it does not hold them itself.
    """
    config = copy.deepcopy(student.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(student)(config)
    base = base_weights(student, state_dict)
    plain.load_state_dict({name: base[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(student.generation_config)
    adapter = cast(LoraConfig, copy.deepcopy(student.peft_config[ADAPTER]))
    adapter.base_model_name_or_path = None
    adapted = get_peft_model(plain, adapter, ADAPTER)
    weights = {f"{_PREFIX}{name}": weight for name, weight in adapter_weights(student, state_dict).items()}
    set_peft_model_state_dict(adapted, weights, ADAPTER)
    return cast(PreTrainedModel, adapted.merge_and_unload())


def base_weights(
    student: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Copies on the CPU of the weights beneath a student's adapters, dequantised, by their names in a plain model.

    Where weights are quantised, the parts of their quantisation are among them too.

    Args:
        student: has adapters.
        state_dict: all its weights, where it does not hold them itself.
    """
    modules, found = dict(student.named_modules()), {}
    for name, weight in (student.state_dict() if state_dict is None else state_dict).items():
        owner, _, kind = name.rpartition(".")
        if not _is_beneath(name):
            continue
        if kind == "weight" and not weight.is_floating_point():
            weight = _dequantised(modules[owner])
        if weight.is_floating_point() and getattr(student, "is_quantized", False):
            weight = weight.to(student.dtype)  # bitsandbytes turns biases into what it computes in
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = weight.detach().to("cpu", copy=True)
    return found


def _dequantised(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer that bitsandbytes has quantised."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # it imports bitsandbytes, if need be

    return dequantize_bnb_weight(cast(nn.Parameter, layer.weight), getattr(layer, "state", None))
