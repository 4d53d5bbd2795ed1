"""Configs, tokenizers and weights by hub id or local folder, with one clear error where they cannot be had."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..config.model_arguments import QUICKSTART, ModelArguments
from ..quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from ..utils.errors import BadRequest, reason_of
from ..utils.files import folder_problem
from .adapters import SavedAdapter, find_adapter, put_on
from .layers import context_length

T = TypeVar("T")

_JSON_FILES = (
    "config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip


def _locate(name: str, role: str) -> str:
    """The folder behind the name `quickstart` or behind `~`; any other name is left as it is."""
    if name == QUICKSTART:
        return str(TEACHER_FOLDER if role.startswith("teacher") else STUDENT_FOLDER)  # there may be several
    return os.path.expanduser(name)


def model_folder(name: str, role: str) -> Path | None:
    """The local folder that a name means, also `quickstart`; None for a hub id."""
    folder = Path(_locate(name, role))
    return folder if folder.is_dir() else None


def on_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The same model, moved to a device."""
    return cast(PreTrainedModel, cast(Any, model).to(device))  # transformers gives `to` a type that fits no device


def _load(what: str, name: str, load: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return load(*args, **kwargs)
    except (torch.OutOfMemoryError, BadRequest):
        raise
    except Exception as error:  # broken files raise many kinds in transformers, tokenizers, safetensors and json
        reason, remedy = _reason(error, Path(name))
        raise BadRequest(f"The {what} {name!r} cannot be loaded: {reason}", remedy) from error


def _reason(error: Exception, folder: Path) -> tuple[str, str | None]:
    """Why a model cannot be loaded, and what to do about it if that is known."""
    if "trust_remote_code=True" in str(error):
        reason = "it brings code of its own, which only trust_remote_code true runs;"
        return reason, "set it if you trust the source."
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "the folder has no config.json;", "name one that a model was saved to."
    problem = folder_problem(folder, _JSON_FILES)
    return reason_of(error) if problem is None else f"{problem}.", None


def _from_pretrained(
    what: str, kind: Any, name: str, role: str, revision: str | None, arguments: ModelArguments, **kwargs: Any
) -> Any:
    """What an Auto class reads from the hub or a folder."""
    kwargs |= {"revision": revision, "trust_remote_code": arguments.trust_remote_code}
    return _load(what, name, kind.from_pretrained, _locate(name, role), **kwargs)


def saved_adapter(name: str, role: str, revision: str | None) -> SavedAdapter | None:
    """The adapter that a name means; None where it means a model. Raises `BadRequest` as `find_adapter`."""
    return find_adapter(_locate(name, role), role, revision)


def load_config(name: str, role: str, revision: str | None, arguments: ModelArguments) -> PreTrainedConfig:
    """The config of a model, or of what an adapter belongs on. Raises `BadRequest` where it cannot be had."""
    return _config(f"{role}'s config", name, role, revision, arguments)


def _config(what: str, name: str, role: str, revision: str | None, arguments: ModelArguments) -> PreTrainedConfig:
    if (adapter := saved_adapter(name, role, revision)) is not None:
        name, revision = adapter.base, adapter.base_revision
    return cast(PreTrainedConfig, _from_pretrained(what, AutoConfig, name, role, revision, arguments))


def load_generation_config(name: str, role: str, revision: str | None) -> GenerationConfig | None:
    """How a model answers; None where nothing is said of it. Raises `BadRequest` where it cannot be read."""
    if (adapter := saved_adapter(name, role, revision)) is not None:
        name, revision = adapter.base, adapter.base_revision
    folder = model_folder(name, role)
    if folder is not None and not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(_locate(name, role), revision=revision or "main")
    except (OSError, ValueError) as error:
        if folder is None and isinstance(error, OSError):  # on the hub it may be missing too
            return None
        raise BadRequest(f"The {role}'s {GENERATION_CONFIG_NAME} cannot be read: {reason_of(error)}") from error


def _is_of_tokenizer(file: str) -> bool:
    """Whether a file of this name is a tokenizer's."""
    return file.startswith(("tokenizer", "vocab", "merges", "spiece")) or file.endswith((".model", ".tiktoken"))


def load_tokenizer(name: str, role: str, revision: str | None, arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter without one, of what it belongs on.

    Raises `BadRequest` where it cannot be had or has no end-of-text token.
    """
    adapter = saved_adapter(name, role, revision)
    if adapter is not None and not adapter.has_tokenizer:
        name, revision = adapter.base, adapter.base_revision
    folder = model_folder(name, role)
    files = [] if folder is None else [path.name for path in folder.iterdir()]
    if CONFIG_NAME in files and not any(map(_is_of_tokenizer, files)):
        raise BadRequest(
            f"The {role}'s folder {name!r} holds no tokenizer, not even a tokenizer_config.json;",
            "save the one that the model was trained with there.",
        )
    tokenizer = _from_pretrained(f"{role}'s tokenizer", AutoTokenizer, name, role, revision, arguments)
    if tokenizer.eos_token_id is None:
        raise BadRequest(
            f"The {role}'s tokenizer {name!r} has no end-of-text token, so a student could never learn to stop;",
            "set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def _kind_of(config: PreTrainedConfig) -> Any:
    """The Auto class that makes a config's model; families that read images beside text have one of their own."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _whole(what: str, kind: Any, name: str, role: str, *where: Any, **kwargs: Any) -> PreTrainedModel:
    """A model as `_from_pretrained` reads it. Raises `BadRequest` where weights are missing: they would be random."""
    model, found = _from_pretrained(what, kind, name, role, *where, output_loading_info=True, **kwargs)
    missing = sorted(found["missing_keys"])
    if missing and not getattr(model, "is_quantized", False):
        raise missing_weights(what, name, missing)
    return cast(PreTrainedModel, model)


def missing_weights(what: str, name: str, missing: Sequence[str]) -> BadRequest:
    """The error for a model of whose weights some are nowhere."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return BadRequest(
        f"The {what} {name!r} cannot be loaded: {missing[0]}{more} of its weights are missing, and would be random.",
        "Name a causal language model with all its weights.",
    )


def load_causal_lm(
    name: str, role: str, revision: str | None, dtype: str, arguments: ModelArguments, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model with its trained weights; where the name means an adapter, with that too.

    Args:
        name: hub id, local folder or `quickstart`.
        role: `teacher` or `student`, for messages and for the meaning of `quickstart`.
        revision: hub revision, or None.
        dtype: `auto`, `float32` or `bfloat16`.
        arguments: attention implementation and trust in remote code.
        kwargs: passed on to `from_pretrained`.

    Raises:
        BadRequest: if the model cannot be found, read or built.
    """
    kwargs |= {
        "dtype": "auto" if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": arguments.attn_implementation,
    }
    adapter = saved_adapter(name, role, revision)
    kind = _kind_of(_config(role, name, role, revision, arguments))
    if adapter is None:
        return _whole(role, kind, name, role, revision, arguments, **kwargs)
    beneath = f"model beneath the {role}'s adapter {name!r},"
    base = _whole(beneath, kind, adapter.base, role, adapter.base_revision, arguments, **kwargs)
    return _load(f"{role}'s adapter", name, put_on, adapter, base, role)


def build_causal_lm(
    config: PreTrainedConfig, dtype: str, arguments: ModelArguments, role: str = "student"
) -> PreTrainedModel:
    """A causal language model with random weights, in the config's data type where `dtype` is `auto`.

    Raises `BadRequest`, which names the `role`, where that cannot be built.
    """
    chosen = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return _load(
        f"{role} of type",
        config.model_type,
        _kind_of(config).from_config,
        config,
        dtype=chosen,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )


def check_reads(model: PreTrainedModel, role: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Make sure that a model reads every token and examples of `max_length` of them. Raises `BadRequest` if not."""
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise BadRequest(
            f"The tokenizer has ids up to {highest}, but the {role} has embeddings for {rows} tokens only;",
            f"give the {role} a vocab_size of at least {highest + 1}.",
        )
    limit = context_length(model)
    if limit is not None and max_length > limit:
        raise BadRequest(
            f"max_length is {max_length}, but the {role} reads {limit} tokens at most;", f"write {limit} or less."
        )
