"""Adapters in folders of their own: what they belong on, and how they become part of it."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..utils.errors import BadRequest, reason_of
from ..utils.files import missing_path

_CONFIG, _TOKENIZER_CONFIG = "adapter_config.json", "tokenizer_config.json"

_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk or on the hub, and the model that it belongs on."""

    name: str
    """Its folder, or hub id."""
    revision: str | None
    base: str
    """Folder or hub id of what is beneath it."""
    base_revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer stands beside it; on the hub that is looked for when it is loaded."""
        return not Path(self.name).is_dir() or (Path(self.name) / _TOKENIZER_CONFIG).is_file()


def find_adapter(name: str, role: str, revision: str | None = None) -> SavedAdapter | None:
    """The adapter that a folder or hub id holds; None where it holds a model.

    Args:
        name: a folder, as it is on this machine, or a hub id.
        role: `teacher` or `student`, for messages.
        revision: on the hub.

    Raises:
        BadRequest: if it has no weights, or does not say what it belongs on, or that is not there.
    """
    file = _config_file(name, revision)
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        base, base_revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise BadRequest(f"The {role}'s adapter {name!r} cannot be read: {reason_of(error)}") from error
    if Path(name).is_dir() and not any((Path(name) / weights).is_file() for weights in _WEIGHTS):
        raise BadRequest(f"The {role} {name!r} is an adapter without its {_WEIGHTS[0]};", "copy or download it again.")
    what = f"The {role} {name!r} is an adapter, and its {_CONFIG}"
    if not base:
        raise BadRequest(f"{what} does not name the model beneath it;", "write it there as base_model_name_or_path.")
    if missing_path("base_model_name_or_path", base) is not None:
        raise BadRequest(f"{what} names {base}, which does not exist;", "write where it is as base_model_name_or_path.")
    return SavedAdapter(name, revision, base, base_revision)


@lru_cache
def _hub_config(name: str, revision: str | None) -> str | None:
    try:
        return find_adapter_config_file(name, revision=revision)
    except Exception:  # what cannot be reached is told of by whatever loads it next
        return None


def _config_file(name: str, revision: str | None) -> str | None:
    folder = Path(name)
    if folder.exists():
        return str(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
    return _hub_config(name, revision)


def put_on(adapter: SavedAdapter, base: PreTrainedModel, role: str) -> PreTrainedModel:
    """A model with an adapter merged into it; where it is quantised, with the adapter in it.

    Args:
        adapter: of `find_adapter`.
        base: what it belongs on; it is changed.
        role: `teacher` or `student`; the weights of a quantised student would not be its own.

    Raises:
        BadRequest: if the adapter cannot be merged.
    """
    is_quantized = bool(getattr(base, "is_quantized", False))
    if is_quantized and role == "student":
        raise BadRequest(
            f"The student {adapter.name!r} is an adapter, which cannot be merged into quantised weights;",
            "merge it first, or write student_quantization none.",
        )
    adapted = PeftModel.from_pretrained(base, adapter.name, revision=adapter.revision)
    kind = getattr(adapted.active_peft_config.peft_type, "value", adapted.active_peft_config.peft_type)
    if adapted.active_peft_config.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise BadRequest(
            f"The {role} {adapter.name!r} is an adapter of kind {kind}, which does not become part of a model;",
            "name a model, or a LoRA adapter.",
        )
    if is_quantized:
        return cast(PreTrainedModel, adapted.get_base_model())
    plain = cast(Any, adapted.base_model).merge_and_unload().requires_grad_(True)  # peft has frozen it
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return cast(PreTrainedModel, plain)
