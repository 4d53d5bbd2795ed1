"""What makes two runs the same, so that a checkpoint is never resumed by another run, or mixed with another's."""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import is_fsdp_asked, mixed_precision
from ..config.student_cut import CUT_ARGUMENTS
from ..data.streaming import ExampleStream
from ..data.token_alignment.ranges import PAIR_COLUMNS, is_pair_column
from ..distillation.teacher_cache import weights_digest
from ..distillation.teachers.several import role_of
from ..models.loading import model_folder
from ..reports.summary import SUMMARY_FILE
from ..trainer.checkpoint import list_checkpoints, read_manifest
from ..utils.errors import BadRequest
from ..utils.progress_bar import progress_bar

_SAME = {
    "sharded", "data", "teacher", "other_teachers", "student", "teacher_quantization", "teacher_dtype", "student_dtype",
    "student_init", "alignment_target", "kv_shape", "projector_sharing", "layer_mapping", "projector_direction",
    "projector_anchor", "projector_mlp_ratio", "projector_rank", "use_peft", "student_quantization", "lora_r",
    "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "dataloader_drop_last",
    "train_sampling_strategy", "seed", "data_seed", "optim", "optim_args", "bf16", "fp16", "streaming", *CUT_ARGUMENTS,
}  # fmt: skip
"""A checkpoint that differs in one of these holds weights or a position in the data that this run cannot go on from."""

_SAME_OF_A_STREAM = {"shuffle_buffer", "dataloader_num_workers", "max_length", "max_train_samples"}
"""So do these where examples are streamed: they decide which example is the next one."""

_SPLIT = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Their product is the number of examples of an optimizer step; where it agrees, the steps have the same examples."""

_HARMLESS = {
    "output_dir", "final_dir", "run_name", "plain_output", "disable_tqdm", "run_control", "evaluate_generation",
    "teacher_cache_dir", "per_device_eval_batch_size", "prediction_loss_only", "max_eval_samples", "max_train_samples",
    "max_length", "max_nonfinite_steps", "metric_for_best_model", "greater_is_better", "load_best_model_at_end",
    "teacher_model_name_or_path", "student_model_name_or_path", "student_config_name", "teacher_revision",
    "student_revision", "report_to", "project", "trust_remote_code", "push_to_hub", "shuffle_buffer",
    "merge_adapter", "assistant_turns", "token_alignment", "rollouts_from", "teacher_sharding",
}  # fmt: skip
"""Where things go and what is told, and names whose content is compared instead."""

_HARMLESS_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "hub_", "dataloader_", "dataset_", "trackio_", "generation_",
    "retention_",
)  # fmt: skip

_BEFORE = {
    "relative_mse_weight": 0.0, "kd_tokens": "answers", "lm_tokens": "answers", "alignment_target": "hidden",
    "projector_sharing": "none", "teachers": None, "other_teachers": [],
}  # fmt: skip
"""What a run did that was written before these arguments were there; by the kind of student they may be others now."""

_BY_CONTENT = ("data", "teacher", "other_teachers", "student")
"""Hashes, which tell people nothing."""

_NOT_COMPARED = ("resume_from_checkpoint", "hub_token", "local_rank", "logging_dir")


def data_digest(dataset: Dataset | ExampleStream) -> str:
    """A hash of the tokens and labels of all examples in their order; of a stream what is known without reading it.

    Where students wrote some, whose tokens they are counts too; where the teacher reads others, these and what
    they are aligned with count as well.
    """
    if isinstance(dataset, ExampleStream):
        return dataset.digest
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels", "origins", *PAIR_COLUMNS) if name in dataset.column_names]
    names += [name for name in dataset.column_names if is_pair_column(name) and name not in names]
    tables = dataset.select_columns(names).with_format("arrow").iter(batch_size=4096)
    with progress_bar(len(dataset), "Hashing the training data", "example") as bar:
        for table in tables:
            for column in table.columns:
                for part in column.chunks:
                    digest.update(part.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                    flat = part.flatten()
                    while pa.types.is_nested(flat.type):
                        flat = flat.flatten()
                    digest.update(flat.to_numpy(zero_copy_only=False).tobytes())
            bar.update(len(table))
    return digest.hexdigest()


def _model(name: str | None, role: str, revision: str | None) -> str | None:
    """What a name stands for: a local folder's content, wherever it lies, or a hub id with its revision."""
    if name is None:
        return None
    path = Path(name)
    if (folder := model_folder(name, role)) is not None:
        return weights_digest(folder)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else f"{name}@{revision or 'main'}"


def _teachers(arguments: KavaArguments) -> dict[str, Any]:
    """How several teachers are weighed, and what the others behind the first are; of one teacher nothing of both."""
    choices = arguments.training.choices
    others = [
        [_model(own.model, role_of(number), own.revision), own.quantization, own.dtype, own.layers]
        for number, own in enumerate(choices[1:], start=1)
    ]
    first = [[choice.layers] for choice in choices[:1]]
    return {"teachers": [choice.weight for choice in choices] or None, "other_teachers": [*first, *others]}


def run_identity(arguments: KavaArguments, data: str) -> dict[str, Any]:
    """All that a run was asked for, and what models and data (their `data_digest`), of plain JSON types."""
    model = arguments.model
    asked = json.loads(json.dumps(arguments.to_dict(), default=str))
    if arguments.data.streaming:  # how it mixes rows is a matter of its version
        asked["datasets_version"] = datasets.__version__
    return {
        **{name: value for name, value in asked.items() if name not in _NOT_COMPARED and not name.startswith("_")},
        "data": data,
        "teacher": _model(model.teacher_model_name_or_path, "teacher", model.teacher_revision),
        "student": _model(
            model.student_model_name_or_path or model.student_config_name, "student", model.student_revision
        ),
        **_teachers(arguments),
        "world_size": arguments.training.world_size,
        "sharded": is_fsdp_asked(),
        "mixed_precision": mixed_precision(arguments.training),
    }


def name_run(training: KavaTrainingArguments, checkpoint: Path | None) -> str:
    """What trackers call a run: `run_name`, else as it was called when it wrote the checkpoint, else a new name.

    A new name holds the output folder's and the time, so that no two runs have one name and go into one curve.
    """
    there = read_manifest(checkpoint)["run"] if checkpoint is not None else None
    kept = training.run_name or (there or {}).get("run_name")
    return kept or f"{Path(training.output_dir).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"


@dataclass(frozen=True)
class Differences:
    """In what one run differs from another, each as a clause."""

    incompatible: list[str]
    """Weights or data positions that do not fit."""
    training: list[str]
    """What the training goes on with."""
    harmless: list[str]
    """What has no effect on the training."""


def _step_examples(run: dict[str, Any]) -> int | None:
    """Examples of an optimizer step, where it is the same ones however they are split; else None.

    Batches of like lengths are made for the split, what is left over for a last batch is dropped by it, and of a stream
    each rank reads a share of its own.
    """
    counts = run.get("train_sampling_strategy") == "group_by_length" or run.get("dataloader_drop_last")
    if counts or run.get("streaming") or not run.keys() >= set(_SPLIT):
        return None
    return math.prod(run[name] for name in _SPLIT)


def _with_precision(run: dict[str, Any]) -> dict[str, Any]:
    """An identity in which `bf16` and `fp16` are what the run computed in, whoever asked for it."""
    asked = run["mixed_precision"]
    kept = {name: value for name, value in run.items() if name != "mixed_precision"}
    return {**kept, "bf16": asked == "bf16", "fp16": asked == "fp16"}


def compare(there: dict[str, Any], here: dict[str, Any]) -> Differences:
    """Compare the run that wrote a checkpoint with this one, each as `run_identity`, by the names that both know."""
    there = {**_BEFORE, **there} if there else there
    same = _SAME | (_SAME_OF_A_STREAM if here.get("streaming") else set())
    found: dict[str, list[str]] = {"incompatible": [], "training": [], "harmless": []}
    examples = _step_examples(there)
    split_alike = examples is not None and examples == _step_examples(here)
    if "mixed_precision" in there.keys() & here.keys():
        there, here = _with_precision(there), _with_precision(here)
    for name in sorted(there.keys() & here.keys()):
        if there[name] == here[name]:
            continue
        kind = "harmless" if name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES) else "training"
        kind = "incompatible" if name in same or (name in _SPLIT and not split_alike) else kind
        shown = "differs" if name in _BY_CONTENT else f"was {there[name]}, is {here[name]}"
        if name == "data" and here.get("streaming"):
            shown += " (of a stream the names, the sizes and both ends of its files are compared)"
        found[kind].append(f"{name} {shown}")
    return Differences(**found)


def check_resumable(checkpoint: Path, here: dict[str, Any]) -> Differences:
    """In what this run differs from the one that wrote a checkpoint.

    Raises:
        BadRequest: naming what keeps it from being resumed.
    """
    found = compare(read_manifest(checkpoint)["run"] or {}, here)
    if found.incompatible:
        raise BadRequest(
            f"The checkpoint {checkpoint} was written by another run: {'; '.join(found.incompatible)}.",
            "Resume with the arguments, models, data and effective batch it was written with, or start "
            "afresh in another output_dir.",
        )
    return found


def earlier_run(output_dir: str | Path) -> str | None:
    """What an output folder holds of an earlier run, in a clause; None where there is none."""
    names = ", ".join(folder.name for folder in list_checkpoints(output_dir))
    if not names and not (Path(output_dir) / SUMMARY_FILE).exists():
        return None
    return f"{output_dir} holds an earlier run ({names or 'no checkpoints'})"


def check_output_dir(output_dir: str | Path, here: dict[str, Any], resuming: bool) -> None:
    """Make sure that an output folder holds no checkpoints of a different run. Raises `BadRequest` if it does.

    A run that is resuming, from whichever checkpoint, may train with other values than those were written with.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            there = read_manifest(folder)["run"]
        except ValueError:
            continue
        found = compare(there or {}, here)
        differing = found.incompatible if resuming else found.incompatible + found.training
        if differing:
            raise BadRequest(
                f"output_dir {output_dir} holds {folder.name} of a different run: {'; '.join(differing)}.",
                "Name another output_dir, or delete that folder's checkpoints.",
            )
