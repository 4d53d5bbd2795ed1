"""Checks of what a run stands on: packages, device, quantisation, processes, trackers, hub."""

import math
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

from ...config.alignment.teachers import other_teachers
from ...config.arguments import KavaArguments, KavaTrainingArguments
from ...config.launcher import describe_engine
from ...distillation.teachers.several import role_of
from ...models.teacher import quantization_config
from ...trainer.callbacks.hub import no_repository
from ...trainer.callbacks.trackers import tracker_problem
from ...utils.environment import device_name
from ...utils.errors import BadRequest, reason_of
from ...utils.hub import in_time
from ...utils.memory import describe_memory
from ..advice import check_processes
from .findings import Checkup

DISTRIBUTION = "kava-trainer"

WHOAMI_SECONDS = 20
"""How long the hub may take to say whose token it is."""

_PRECISIONS = {
    "no": "bf16 is false, so each model computes in the type of its weights, named below",
    "bf16": "forward passes compute in bfloat16",
    "fp16": "forward passes compute in float16",
}
"""What a run computes in, by what accelerate is told."""


def check_packages(checkup: Checkup) -> None:
    """The versions of Python and of what KAVA requires."""
    try:
        required = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        checkup.ok(
            f"Python {sys.version.split()[0]}; KAVA is not installed as a package, so versions are not compared."
        )
        return
    found, wrong = [], []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing, and KAVA wants {requirement.specifier}")
            continue
        found.append(f"{requirement.name} {there}")
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} is {there}, and KAVA wants {requirement.specifier}")
    checkup.ok(f"Python {sys.version.split()[0]}, {', '.join(found)}.")
    for problem in wrong:
        name, wanted = problem.split()[0], problem.rsplit(" ", 1)[1]
        checkup.warn(f"{problem}.", f'Run pip install "{name}{wanted}".')


def check_device(checkup: Checkup, arguments: KavaArguments) -> None:
    """The device, its memory, what the run computes in on it, and whether it is made for that."""
    device, model = arguments.training.device, arguments.model
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    mixed = arguments.training.mixed_precision
    precision = _PRECISIONS.get(mixed, f"forward passes compute in {mixed}")
    words = "" if able else "; it does not compute in bfloat16"
    checkup.ok(f"{device_name(device)}, memory {describe_memory(device)}{words}; {precision}.")
    asked = [name for name in ("teacher_dtype", "student_dtype") if getattr(model, name) == "bfloat16"]
    if asked and not able:
        checkup.warn(
            f"{' and '.join(asked)} bfloat16 would be slow on this device, which only imitates it.",
            f"Write float32 for {' and '.join(asked)}.",
        )


def check_quantization(checkup: Checkup, arguments: KavaArguments) -> None:
    """Whether bitsandbytes can hold a layer as asked on this device, tried out on a tiny one."""
    asked = {role: getattr(arguments.model, f"{role}_quantization") for role in ("teacher", "student")}
    others = enumerate(other_teachers(arguments), start=1)
    asked |= {role_of(number): model.teacher_quantization for number, model in others}
    tried = {role: kind for role, kind in asked.items() if kind != "none"}
    for role, kind in tried.items():
        quantization_config(kind, role)
        try:
            _try_layer(kind, arguments.training.device)
        except Exception as error:  # a library that was built for other devices fails in many ways
            raise BadRequest(
                f"{role.replace(' ', '_')}_quantization {kind} does not work on this device ({reason_of(error)});",
                "install a bitsandbytes that supports it, or write none.",
            ) from error
    shown = ", ".join(f"{role} {kind}" for role, kind in tried.items())
    checkup.ok(f"{shown}, by bitsandbytes {version('bitsandbytes')}.")


def quantizes(arguments: KavaArguments) -> bool:
    """Whether bitsandbytes is asked for."""
    asked = [arguments.model, *other_teachers(arguments)]
    return {own.teacher_quantization for own in asked} | {arguments.model.student_quantization} != {"none"}


def _try_layer(kind: str, device: torch.device) -> None:
    nn: Any = import_module("bitsandbytes.nn")  # only where it is asked for, see `quantization_config`
    if kind == "8bit":
        layer = nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    with torch.no_grad():
        layer.to(device)(torch.ones(2, 64, dtype=torch.bfloat16, device=device))


def expected_processes(training: KavaTrainingArguments) -> int:
    """How many processes a run will have: one for each GPU where this one has not been started as one of several."""
    return max(training.world_size, training.n_gpu)


def check_parallelism(checkup: Checkup, arguments: KavaArguments) -> None:
    """Processes, GPUs, what they share, and the effective batch."""
    training = arguments.training
    processes = expected_processes(training)
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, processes)
    gpus = f"GPUs seen: {torch.cuda.device_count()}"
    checkup.ok(
        f"processes: {describe_engine(processes)}; {gpus}; effective batch {math.prod(batch)} "
        f"({batch[0]} examples x {batch[1]} micro-batches x {batch[2]} processes).{_accelerate_default()}"
    )
    try:
        check_processes(training)
    except BadRequest as error:  # of this process; the command that doctor prints starts enough of them
        checkup.warn_of(*error.problems)


def _accelerate_default() -> str:
    """What `accelerate launch` without options would do beside that, as a sentence with a space before it."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or not os.path.isfile(default_config_file):
        return ""
    config = load_config_from_file(None)
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    precision = config.mixed_precision or "no"
    return (
        f" accelerate launch would read {default_config_file}: {config.num_processes} processes, {kind}, "
        f"mixed_precision {precision}."
    )


def check_trackers(checkup: Checkup, arguments: KavaArguments) -> None:
    """Whether all of `report_to` can be set up."""
    names = [name for name in cast(list[str], arguments.training.report_to) if name != "none"]
    if problem := tracker_problem(names):
        raise BadRequest.of(problem)
    checkup.ok(f"{', '.join(names) or 'none'}.")


def check_hub(checkup: Checkup, arguments: KavaArguments) -> None:
    """Whether the hub takes the token, and the name of the repository is one. The token is not shown."""
    training = arguments.training
    try:
        if training.hub_model_id is not None:
            validate_repo_id(training.hub_model_id)
        user = in_time(lambda: HfApi(token=training.hub_token).whoami(), WHOAMI_SECONDS)
    except Exception as error:  # the network fails in many ways
        raise BadRequest.of(no_repository(error, training)) from error
    name = training.hub_model_id or Path(training.output_dir).absolute().name
    owner, _, _ = name.rpartition("/")
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if owner and owner not in owners:
        checkup.warn(
            f"hub_model_id is {name}, but the token is of {user['name']}, who may not write there.",
            f"Write a hub_model_id that begins with {' or '.join(f'{one}/' for one in owners)}.",
        )
    else:
        checkup.ok(f"the token is of {user['name']}; the student goes to {name if owner else f'{owners[0]}/{name}'}.")
