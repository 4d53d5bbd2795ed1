"""Checks of the pair: configs, weight files, tokenizers, and whether the two fit each other and the arguments.

The models are built without storage, so that their size does not matter; of weight files only the headers are read.
"""

import copy
import dataclasses
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ...config.alignment.teachers import other_teachers
from ...config.arguments import KavaArguments
from ...config.model_arguments import ModelArguments
from ...config.optimizer_names import optimizer_name
from ...data.collators import DistillationCollator
from ...data.token_alignment.ranges import read_by_the_teacher
from ...distillation.calibration import check_enough_tokens
from ...distillation.targets import AlignmentTarget, build_targets
from ...distillation.teachers.several import role_of
from ...models.attention.capture import layer_of
from ...models.layers import find_blocks, hidden_size, number_of_layers
from ...models.loading import (
    load_generation_config,
    missing_weights,
    model_folder,
    saved_adapter,
)
from ...models.routers import router_note
from ...models.sharding.choice import choose_holding
from ...models.student import foreseen_layers, load_student, mend_generation_config, quantized_by, student_config
from ...models.teacher import freeze, load_teacher
from ...trainer.trainer import KavaTrainer
from ...utils.console import size_text
from ...utils.errors import BadRequest, reason_of
from ...utils.files import existing_folder
from ...utils.hub import hub_reason
from ..advice import long_warmup, loose_projector, planned_steps, precision_problems
from ..pair.held import meta_teacher
from ..pair.models import Models
from ..pair.tokenizers import check_role_reads, load_tokenizers, teacher_reading, teacher_readings
from ..setup import Data, make_trainer, measure_teacher
from .data import Examples
from .findings import Checkup
from .machine import expected_processes

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Names of a model's file of weights, or of the list of several, in the order that transformers looks for them."""

HUB_SECONDS = 20
"""How long the hub may take to list the files of a model."""


@dataclass
class Pair:
    """Teachers and student without storage, and what is aligned of them."""

    teachers: list[PreTrainedModel]
    student: PreTrainedModel
    target: AlignmentTarget


def check_tokenizers(checkup: Checkup, arguments: KavaArguments) -> PreTrainedTokenizerBase:
    """Whether both tokenizers can be had, and whether they agree or can be aligned."""
    tokenizer = load_tokenizers(arguments)
    own = "the teacher's is used" if arguments.model.student_model_name_or_path is None else "the same ids for both"
    if (reading := teacher_reading(arguments, tokenizer)) is not None:
        own = f"others than the teacher's {len(reading.tokenizer.get_vocab())}, aligned by their text"
    template = "with" if tokenizer.chat_template else "without"
    checkup.ok(f"{len(tokenizer.get_vocab())} tokens, {own}; {template} a chat template.")
    return tokenizer


def check_teacher_model(checkup: Checkup, arguments: KavaArguments) -> PreTrainedModel:
    """Whether the teacher's config makes a model and its weights are there; the model without storage."""
    return _check_teacher(checkup, arguments, arguments.model, role_of(0))


def check_other_teachers(checkup: Checkup, arguments: KavaArguments) -> list[PreTrainedModel]:
    """The same of the others, where there are several."""
    found = enumerate(other_teachers(arguments), start=1)
    return [_check_teacher(checkup, arguments, model, role_of(number)) for number, model in found]


def _check_teacher(checkup: Checkup, arguments: KavaArguments, model: ModelArguments, role: str) -> PreTrainedModel:
    teacher = meta_teacher(model, role)
    name, revision = model.teacher_name, model.teacher_revision
    weights = _check_weights(name, role, revision, teacher)
    device, processes = arguments.training.device, expected_processes(arguments.training)
    holding = choose_holding(model, device, processes, role)
    spread = f", spread over {processes} processes" if holding.sharded else ""
    checkup.ok(f"{_describe(teacher, name, revision)}, {weights}{spread}.")
    if holding.note is not None:
        checkup.ok(holding.note)
    return teacher


def check_embedded_teacher(
    checkup: Checkup, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> None:
    """Whether the embedded teacher knows more of the answers than chance; it is small enough to be asked."""
    batch = examples.sample[: arguments.training.per_device_eval_batch_size]
    if not batch:
        return
    teacher = load_teacher(dataclasses.replace(arguments.model, teacher_quantization="none"), torch.device("cpu"))
    reading = teacher_reading(arguments, tokenizer)
    collator = DistillationCollator(tokenizer if reading is None else reading.tokenizer)
    loss, chance, at_chance = measure_teacher(teacher, Dataset.from_list(read_by_the_teacher(batch)), collator)
    told = f"on the first {len(batch)} answers (cross-entropy {loss:.2f} nats, chance {chance:.2f})"
    if at_chance:
        checkup.warn(
            f"no better than chance {told}: it knows the quickstart's arithmetic problems and nothing else.",
            "Name a teacher_model_name_or_path that knows your data.",
        )
    else:
        checkup.ok(f"better than chance {told}.")


def check_student_model(checkup: Checkup, arguments: KavaArguments, teacher: PreTrainedModel) -> PreTrainedModel:
    """Whether the student can be made as asked; the student without storage, with its adapters."""
    model = arguments.model
    student_config(model)  # its checks depend on where the student starts from
    shape = model if model.is_cut else dataclasses.replace(model, student_init="random")
    with torch.device("meta"):
        student = load_student(shape, teacher)
    name, revision = model.student_name, model.student_revision
    cut_out = f"{number_of_layers(student)} of the teacher's {number_of_layers(teacher)} layers"
    starts = {"random": "random weights", "teacher_layers": f"{cut_out} ({model.student_layers})"}
    told = None
    if model.student_init == "pretrained":
        weights = _check_weights(name, "student", revision, student)
        cast(Any, student).generation_config = load_generation_config(name, "student", revision)
        told = mend_generation_config(student)
    else:
        weights = f"starts from {starts[model.student_init]}"
    checkup.ok(f"{_describe(student, name, revision)}, {weights}{', LoRA adapters' if model.use_peft else ''}.")
    if told:
        checkup.warn(told, "Mend generation_config.json of the student, if it shall sample.")
    if note := router_note(student):
        checkup.ok(note)
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    for problem in precision_problems(arguments, teacher, student, trained):
        checkup.warn_of(problem)
    return student


def _describe(model: PreTrainedModel, name: str, revision: str | None) -> str:
    version = f"@{revision}" if revision else ""
    return (
        f"{name}{version}, {type(model).__name__}, {number_of_layers(model)} layers of width {hidden_size(model)}, "
        f"{model.num_parameters() / 1e6:.2f} M parameters, {str(model.dtype).removeprefix('torch.')}"
    )


def _check_weights(name: str, role: str, revision: str | None, model: PreTrainedModel) -> str:
    """How large the weights of a model are and where they lie, in a few words. Raises `BadRequest` if they are not."""
    if (adapter := saved_adapter(name, role, revision)) is not None:
        beneath = _check_weights(adapter.base, role, adapter.base_revision, model)
        return f"{beneath}, with the adapter beside"
    if (folder := model_folder(name, role)) is not None:
        return f"weights {size_text(_check_files(folder, name, role, model))}"
    for file in _WEIGHTS:
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return f"weights {size_text(_check_files(Path(cached).parent, name, role, model))}, downloaded"
    return _weights_on_hub(name, role, revision)


def _weights_on_hub(name: str, role: str, revision: str | None) -> str:
    try:
        found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
    except Exception as error:  # the network fails in many ways
        raise BadRequest(
            f"The weights of the {role} {name!r} are not on this machine, and the hub does not tell of them "
            f"({hub_reason(error)}).",
            f"Download them with hf download {name}, or name a local folder.",
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    for ending in (".safetensors", ".bin"):
        needed = sum(size for file, size in sizes.items() if file.endswith(ending) and "/" not in file)
        if needed:
            free = shutil.disk_usage(existing_folder(HF_HUB_CACHE)).free
            if needed > free:
                raise BadRequest(
                    f"The weights of the {role} {name!r} take {size_text(needed)}, and {HF_HUB_CACHE} has "
                    f"{size_text(free)} free.",
                    "Make room there, or set HF_HOME to a folder on a larger disk.",
                )
            return f"weights {size_text(needed)}, still to be downloaded"
    raise BadRequest(f"The {role} {name!r} cannot be loaded: the hub has no weights of it.", "Name another model.")


def _check_files(folder: Path, name: str, role: str, model: PreTrainedModel) -> int:
    """The size of a folder's weight files, whose headers must tell of this model's weights."""
    files = _weight_files(folder, name, role)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if missing := _missing(folder, files, model):
        raise missing_weights(role, name, missing)
    for file in files:
        reason = _broken_weights(folder / file, {} if quantized_by(model.config) else shapes)
        if reason is not None:
            raise BadRequest(f"The {role} {name!r} cannot be loaded: {file} {reason}.", "Download or copy it again.")
    return sum((folder / file).stat().st_size for file in files)


def _weight_files(folder: Path, name: str, role: str) -> list[str]:
    file = next((file for file in _WEIGHTS if (folder / file).is_file()), None)
    if file is None:
        raise BadRequest(
            f"The {role} {name!r} cannot be loaded: it has no {SAFE_WEIGHTS_NAME}.",
            "Name a folder that holds a model's weights too.",
        )
    if not file.endswith(".json"):
        return [file]
    try:
        files = sorted(set(json.loads((folder / file).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(
            f"The {role} {name!r} cannot be loaded: {file} cannot be read ({reason_of(error)}).",
            "Download or copy it again.",
        ) from error
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise BadRequest(
            f"The {role} {name!r} cannot be loaded: of its {len(files)} files of weights "
            f"{', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} missing.",
            "Download or copy them again.",
        )
    return files


def _missing(folder: Path, files: list[str], model: PreTrainedModel) -> list[str]:
    """The weights of a model that are in none of its files; none where these name weights in another way."""
    if quantized_by(model.config) or any(not file.endswith(".safetensors") for file in files):
        return []
    found: set[str] = set()
    for file in files:
        with suppress(Exception), safe_open(folder / file, framework="pt") as opened:  # broken ones are told of below
            found |= set(opened.keys())
    wanted = model.state_dict().keys()
    tied = getattr(model, "all_tied_weights_keys", {})
    return [] if not found or found - wanted else sorted(wanted - found - tied.keys())


def _broken_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Why a file of weights is not whole, or not of a model with weights of these shapes; None if neither is so."""
    if path.suffix != ".safetensors":
        return None if path.stat().st_size else "is empty"
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if key in shapes}  # noqa: SIM118
    except Exception as error:  # safetensors has no kind of its own for each
        return f"is broken ({reason_of(error)})"
    wrong = next((key for key, shape in found.items() if shape != shapes[key]), None)
    return None if wrong is None else f"holds {wrong} as {found[wrong]}, where its config wants {shapes[wrong]}"


def check_fit(
    checkup: Checkup,
    arguments: KavaArguments,
    teacher: PreTrainedModel,
    others: list[PreTrainedModel],
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Pair:
    """Whether both models read the text, and have the layers that the arguments name."""
    training, teachers = arguments.training, [teacher, *others]
    readings = teacher_readings(arguments, tokenizer)
    check_role_reads(student, "student", tokenizer, arguments.data.max_length, None)
    for number, model in enumerate(teachers):
        check_role_reads(model, role_of(number), tokenizer, arguments.data.max_length, readings.get(number))
    inherited = foreseen_layers(arguments.model)
    target = build_targets(training, student, teachers, inherited)
    of_teachers = [(model, part.teacher_features) for model, part in zip(teachers, target.parts, strict=True)]
    for model, features in ((student, target.student_features), *of_teachers):
        if min(map(layer_of, features)) < number_of_layers(model):
            find_blocks(model)
    if training.aligns:
        projected = f"projector {target.widths}" if target.projectors else f"{target.widths}, no projector"
        layers = f"layers {target.told_layers} (student, teacher)"
        if training.layer_mapping == "cka":
            layers = "the run chooses the teacher's layer for each of the student's by CKA"
        checkup.ok(f"{layers}, {projected}.")
    else:
        checkup.ok("no hidden states are aligned.")
    if problem := loose_projector(training):
        checkup.warn_of(problem)
    return Pair(teachers, student, target)


def check_start(checkup: Checkup, arguments: KavaArguments, pair: Pair, examples: Examples) -> None:
    """Whether there are enough tokens for the projector's first fit."""
    if not examples.sample:
        checkup.ok("how many tokens there are to start from is not known.")
        return
    tokens = min(examples.tokens(), arguments.training.calibration_tokens)
    check_enough_tokens(pair.target, tokens)
    checkup.ok(f"the projectors start from a fit to {tokens} tokens.")


def check_trainer(
    checkup: Checkup, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase, examples: Examples | None
) -> KavaTrainer:
    """Whether a trainer and its optimizer can be set up with these arguments: tried out around two tiny models."""
    training = copy.copy(arguments.training)
    held_out = examples is None or examples.held_out > 0
    training.push_to_hub, training.report_to = False, []  # both have a check of their own
    training.layer_mapping, training.layer_weights = "last", None
    training.teachers, training.teacher_routing = None, "fixed"  # of two tiny models one is the teacher
    if training.rollouts_from is not None:  # which has a check with the data
        training.rollouts_from, training.on_policy_fraction = None, 0.0
    training.projector_rank = None if training.projector_rank is None else 1
    highest = max(tokenizer.get_vocab().values())
    config = LlamaConfig(
        vocab_size=highest + 1, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    tiny = Models(freeze(LlamaForCausalLM(config)), LlamaForCausalLM(config), tokenizer)
    ids = tokenizer("Question: 1 + 1? Answer: 2")["input_ids"]
    rows: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids, "prompt_length": 0} for _ in range(4)]
    data = Dataset.from_list(rows)
    with TemporaryDirectory() as folder:
        training.output_dir = training.final_dir = folder
        trainer = make_trainer(training, tiny, Data(data, data if held_out else None, DistillationCollator(tokenizer)))
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    checkup.ok(
        f"optim {optimizer_name(training.optim)}, {schedule} schedule, learning rate {training.learning_rate:g}."
    )
    count = examples.count if examples is not None else 0
    if training.max_steps > 0 or count > 0:
        steps = planned_steps(training, count, expected_processes(training))
        if problem := long_warmup(training, steps):
            checkup.warn_of(problem)
    return trainer
