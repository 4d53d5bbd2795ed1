"""The arguments a run was asked for, as the JSON file that asks for them again."""

import json
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from ..config.arguments import KavaTrainingArguments
from ..config.checks import usual_dropout
from ..config.data_arguments import DataArguments
from ..config.model_arguments import QUICKSTART, ModelArguments
from ..config.student_cut import CUT_SIZES
from ..config.student_kinds import BY_START
from ..utils.redaction import is_secret_name
from .summary import Summary

RECIPE_FILE = "recipe.json"

_GROUPS = (ModelArguments, DataArguments, KavaTrainingArguments)

_OF_ONE_RUN = {
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
    "resume_from_checkpoint", "run_name",
}  # fmt: skip
"""What a run was called, where it was sent and what it went on from: whoever repeats it has another name and place, and
begins at the beginning."""

_BECOMES = {
    "disable_tqdm": False, "report_to": [], "debug": [], "gradient_checkpointing": False,
    "activation_checkpointing": False,
}  # fmt: skip
"""What `TrainingArguments` makes of the defaults of some fields."""


def recipe_of(summary: Summary) -> dict[str, Any]:
    """What differs from the defaults in the arguments of a run, without secrets.

    Returns:
        Arguments as `run_kava.py` reads them from a JSON file. Local paths are as they were. What the run was called,
        where it was sent on the hub and which checkpoint it went on from are left out.
    """
    given = summary.arguments
    of_the_kind = BY_START.get(str(given.get("student_init")), {})  # they would stand in for what is left out
    found = {}
    for field in (field for group in _GROUPS for field in fields(group) if field.init and field.name in given):
        name, value = field.name, given[field.name]
        told = name in of_the_kind or not _is_default(name, value, _default(field))
        if told and name not in _OF_ONE_RUN and not is_secret_name(name):
            found[name] = value
    found = {name: value for name, value in found.items() if not _follows(name, value, given, summary.environment)}
    if "accelerator_config" in found:
        usual = AcceleratorConfig(dispatch_batches=False).to_dict()  # as the arguments set it
        own = {key: value for key, value in found.pop("accelerator_config").items() if value != usual.get(key)}
        found |= {"accelerator_config": own} if own else {}
    return found


def recipe_text(summary: Summary) -> str:
    """`recipe_of` as the text of a JSON file."""
    return json.dumps(recipe_of(summary), indent=2, ensure_ascii=False) + "\n"


def with_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a summary, with the defaults of those that it does not know."""
    return {field.name: _default(field) for group in _GROUPS for field in fields(group) if field.init} | arguments


def _default(field: Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return value.value if isinstance(value, Enum) else value


def _is_default(name: str, value: Any, default: Any) -> bool:
    return value == default or (name in _BECOMES and value == _BECOMES[name])


def _is_cut_by_size(given: dict[str, Any]) -> bool:
    """Whether a student that is cut out of its teacher needs no more than its size to be asked for."""
    named = given["student_config_name"] or given["student_model_name_or_path"]
    return not named and any(given.get(name) is not None for name in CUT_SIZES)


def _follows(name: str, value: Any, given: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Whether a value follows from other arguments, so that it need not be asked for."""
    if name == "final_dir":
        return value == given["output_dir"]
    if name == "max_tokens_per_batch":
        return value == given["per_device_train_batch_size"] * given["max_length"]
    if name == "student_init":
        return (
            value == "random"
            and bool(given["student_config_name"] or given["student_model_name_or_path"] == QUICKSTART)
        ) or (value == "teacher_layers" and _is_cut_by_size(given))
    if name == "projector_dropout":
        return value == usual_dropout(given["projector_anchor"], given["projector_init"])
    if name == "dataloader_pin_memory":
        return str(environment.get("device")).startswith("cpu")
    if name == "disable_tqdm":
        return given["plain_output"]
    return name.startswith("activation_checkpointing") and value == given[name.replace("activation", "gradient")]
