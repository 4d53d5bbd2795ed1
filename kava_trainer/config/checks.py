"""Every check of the training's own arguments that needs no model."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from torch import cuda
from torch.backends import cpu
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..utils.errors import Problem, WrongArguments
from .alignment.target_checks import (
    ALIGNMENT_WEIGHTS,
    PROJECTED_TARGETS,
    VECTOR_WEIGHTS,
    WEIGHTS_OF_TARGETS,
    attention_problems,
    sharing_problems,
    target_problems,
)
from .alignment.teachers import several_problems
from .launcher import engine_problems
from .layer_mapping import parse_layer_mapping
from .optimizer_names import missing_package, other_missing_packages, steps_in_backward

if TYPE_CHECKING:  # which asks here
    from .arguments import KavaTrainingArguments

LARGEST_MLP_RATIO = 1024
"""Beyond it no device has the memory, and working out how much is missing would take all of this machine's."""

TEACHER_WEIGHTS = (*ALIGNMENT_WEIGHTS, "kd_weight")
"""Of the terms that need a teacher."""

_NOT_NEGATIVE = (
    "mercator_alpha", "mercator_beta", *TEACHER_WEIGHTS, "lm_weight", "anchor_weight", "projector_learning_rate",
    "learning_rate", "seed", "max_tokens_per_batch",
)  # fmt: skip

_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "calibration_tokens",
    "max_nonfinite_steps", "on_policy_max_new_tokens", "rollouts_every",
)  # fmt: skip

_UNWANTED = {"dispatch_batches": True, "split_batches": True, "even_batches": False}
"""What of `accelerator_config` is not supported."""

_UNREPEATABLE = {"lr_scheduler_type": "reduce_lr_on_plateau", "train_sampling_strategy": "group_by_length"}
"""What a control could not do over again."""


def is_fit(projector_anchor: str, projector_init: str) -> bool:
    """Whether projectors of these two arguments start from a fit, and not from random weights."""
    return projector_anchor == "pca" or projector_init == "least_squares"


def usual_dropout(projector_anchor: str, projector_init: str) -> float:
    """The default of `projector_dropout`: none after a fit, which it would disturb at once."""
    return 0.0 if is_fit(projector_anchor, projector_init) else 0.1


AUTO = "auto"
"""The `projector_rank` that the fit decides."""


def settle_rank(rank: int | str | None) -> int | str | None:
    """A `projector_rank` as the number it is, which a command line can only give as text."""
    return int(rank) if isinstance(rank, str) and rank.isdecimal() else rank


def alignment_weights(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the weights that count for what is aligned, of arguments by name."""
    return WEIGHTS_OF_TARGETS.get(asked.get("alignment_target") or "hidden", VECTOR_WEIGHTS)


def is_aligned(asked: Mapping[str, Any]) -> bool:
    """Whether any term compares what both models have inside, of arguments by name."""
    return any((asked.get(name) or 0) > 0 for name in alignment_weights(asked))


def is_projected(asked: Mapping[str, Any]) -> bool:
    """Whether what is aligned has projectors, of arguments by name."""
    projects = (asked.get("alignment_target") or "hidden") in PROJECTED_TARGETS
    return projects and asked.get("projector_direction") != "none" and is_aligned(asked)


def heaviest_alignment(weights: Mapping[str, Any]) -> str:
    """The name of the heaviest weight of those that count for what is aligned, the first one where all are 0."""
    return max(alignment_weights(weights), key=lambda name: weights.get(name) or 0.0)


def settle_numbers(training: "KavaTrainingArguments") -> None:
    """Make floats of whole numbers where an argument takes a float: a tensor of 1 is none that a loss can be.

    Numbers of steps stay as they are: Trainer, which takes shares of a training there too, sees to them.
    """
    for name, hint in get_type_hints(type(training)).items():
        value, kinds = getattr(training, name, None), {hint, *get_args(hint)}
        if name.endswith("_steps") or int in kinds:
            continue
        if float in kinds and type(value) is int:
            setattr(training, name, float(value))
        elif list[float] in kinds and isinstance(value, list):
            setattr(training, name, [float(number) for number in value])


def precision_problem(training: "KavaTrainingArguments") -> Problem | None:
    """What to write where `bf16` asks for a GPU that is not there; None where it can be had."""
    asked = next((name for name in ("bf16", "bf16_full_eval") if getattr(training, name)), None)
    if asked is None or training.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available():
        return None
    if cuda.is_available():
        what = f"{asked} is true, and this GPU does not compute in bfloat16;"
        return Problem(asked, what, f"write {asked} false, or {asked.replace('bf16', 'fp16')} true in its place.")
    what = f"{asked} is true, and there is no GPU here, where it would be of use;"
    if cpu.get_cpu_capability() == "AVX2":  # where a run advises against it
        return Problem(asked, what, f"write {asked} false.")
    return Problem(asked, what, f"write {asked} false, or use_cpu true to compute so on the CPU.")


def training_problems(training: "KavaTrainingArguments") -> list[Problem]:
    """Every mistake in the distillation's own arguments."""
    found = [
        Problem(name, f"{name} is {getattr(training, name)}; it cannot be negative.")
        for name in _NOT_NEGATIVE
        if (getattr(training, name) or 0) < 0
    ]
    found += [*engine_problems(training.fsdp, training.deepspeed), *_optimizer_problems(training.optim)]
    found += other_missing_packages(training)
    found += [*_wrong_values(training), *_projector_problems(training), *_rollout_problems(training)]
    found += [*target_problems(training), *attention_problems(training), *sharing_problems(training)]
    found += _teacher_problems(training)
    return [*found, *_contradictions(training)]


def _teacher_problems(training: "KavaTrainingArguments") -> list[Problem]:
    try:
        return [*several_problems(training)]
    except WrongArguments as error:  # of the list itself
        return [*error.problems]


def _optimizer_problems(optim: Any) -> list[Problem]:
    problem = steps_in_backward(optim) or missing_package(optim)
    return [problem] if problem else []


def accelerator_problems(config: AcceleratorConfig) -> list[Problem]:
    """What of an `accelerator_config`, however it was given, is not supported."""
    return [
        Problem(
            "accelerator_config", f"accelerator_config.{name} {str(value).lower()} is not supported;", "leave it out."
        )
        for name, value in _UNWANTED.items()
        if getattr(config, name) == value
    ]


def _wrong_values(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """Values that cannot be, whatever else is asked for."""
    for name in (name for name in _AT_LEAST_ONE if getattr(training, name) < 1):
        yield Problem.of_value(name, getattr(training, name), "write 1 or more.")
    if training.max_steps == 0:
        yield Problem.of_value("max_steps", 0, "write a number above 0, or -1 to go by num_train_epochs.")
    if training.kd_temperature <= 0:
        yield Problem.of_value("kd_temperature", training.kd_temperature, "write a number above 0, such as 1.0.")
    if not 0 <= training.kd_beta <= 1:
        yield Problem.of_value("kd_beta", training.kd_beta, "write a number from 0 to 1.")
    if (length := training.generation_max_new_tokens) is not None and length < 1:
        yield Problem.of_value("generation_max_new_tokens", length, "write 1 or more.")
    if training.ddp_static_graph:
        what = "ddp_static_graph is true, but KAVA's steps differ in their passes, which a static graph does not allow;"
        yield Problem("ddp_static_graph", what, "leave it out.")
    if training.label_names not in (None, ["labels"]):
        what = f"label_names is {training.label_names}; KAVA reads the column labels alone."
        yield Problem("label_names", what, "Rename the column, and leave label_names out.")


def _projector_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    if not 0 < (ratio := training.projector_mlp_ratio) <= LARGEST_MLP_RATIO:
        remedy = f"write a number above 0, such as 1.0, up to {LARGEST_MLP_RATIO}."
        yield Problem.of_value("projector_mlp_ratio", ratio, remedy)
    if training.projector_dropout is not None and not 0 <= training.projector_dropout < 1:
        yield Problem.of_value("projector_dropout", training.projector_dropout, "write a number from 0 to below 1.")
    if training.projector_rank is not None and training.alignment_target != "hidden":
        what = f"projector_rank is for hidden states, but alignment_target is {training.alignment_target};"
        yield Problem("projector_rank", what, "leave it out.")
    elif training.projector_rank is not None:
        yield from _rank_problems(training)
    elif training.projector_direction != "teacher_to_student" and training.projector_anchor != "none":
        what = (
            f"projector_anchor {training.projector_anchor} holds a projector of the teacher's states, but "
            f"projector_direction {training.projector_direction} has none; its target cannot collapse."
        )
        yield Problem("projector_anchor", what, "Write none.")
    if training.projector_anchor == "reconstruction" and training.anchor_weight == 0:
        what = "anchor_weight is 0, so projector_anchor reconstruction would hold nothing;"
        yield Problem("anchor_weight", what, "raise it.")
    if (weights := training.layer_weights) is not None and not (weights and min(weights) > 0):
        yield Problem.of_value("layer_weights", weights, "write one number above 0 for each pair of layers.")
    try:
        parse_layer_mapping(training.layer_mapping)
    except WrongArguments as error:
        yield from error.problems


def _rank_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    rank, anchor, direction = training.projector_rank, training.projector_anchor, training.projector_direction
    if rank != AUTO and (type(rank) is not int or rank < 1):
        yield Problem.of_value("projector_rank", rank, f"write a whole number above 0, or {AUTO}.")
    if (anchor, direction) != ("pca", "teacher_to_student"):
        what = (
            "projector_rank is for the frozen bridge of projector_anchor pca and projector_direction "
            f"teacher_to_student, but they are {anchor} and {direction};"
        )
        yield Problem("projector_rank", what, "write these two, or leave projector_rank out.")
    elif training.projector_init == "random":
        what = "projector_rank fits the student's side by least squares, but projector_init is random;"
        yield Problem("projector_rank", what, "write projector_init least_squares, or leave projector_rank out.")


def _rollout_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """What is wrong with the answers that the student writes itself."""
    fraction = training.on_policy_fraction
    if not 0 <= fraction <= 1:
        yield Problem.of_value("on_policy_fraction", fraction, "write a number from 0 to 1.")
    if not 0 < training.on_policy_temperature < math.inf:
        remedy = "write a number above 0, such as 1.0."
        yield Problem.of_value("on_policy_temperature", training.on_policy_temperature, remedy)
    if not 0 < training.on_policy_top_p <= 1:
        yield Problem.of_value("on_policy_top_p", training.on_policy_top_p, "write a number above 0, up to 1.")
    if training.rollouts_from is not None and fraction == 0:
        what = f"on_policy_fraction is 0, so nothing of rollouts_from {training.rollouts_from} would be read;"
        yield Problem("on_policy_fraction", what, "write the share that it shall have, 1 for all.")
    if not fraction > 0:
        return
    asked = f"on_policy_fraction is {fraction:g}, but"
    if not training.reads_teacher:
        what = f"{asked} no term asks the teacher, and nothing else is learned from a student's own answers;"
        yield Problem("on_policy_fraction", what, "raise kd_weight, or write on_policy_fraction 0.")
    if not training.samples:
        return
    if training.teacher_cache_dir and fraction == 1:
        what = f"{asked} teacher_cache_dir holds no states of answers that are yet to be sampled;"
        remedy = "leave teacher_cache_dir out, or name a file of answers that are sampled already in rollouts_from."
        yield Problem("teacher_cache_dir", what, remedy)


def _schedule_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """Schedules that leave a part of the run, or the student's own answers in it, without any term."""
    plain, or_lm = training.learns_next_tokens, "" if training.on_policy_fraction == 1 else "lm_weight or "
    rises = training.kd_weight > 0 and training.kd_schedule != "constant"
    held_back = training.alignment_schedule == "stage" and training.kd_weight == 0
    own, aligning = training.on_policy_fraction > 0, alignment_weights(vars(training))[0]
    if rises and not plain and not training.aligns:
        what = f"kd_schedule {training.kd_schedule} begins with a divergence of weight 0, and no other term has any;"
        yield Problem("kd_schedule", what, f"write constant, or raise {or_lm}{aligning}.")
    elif own and rises and training.kd_schedule == "stage" and not training.aligns:
        what = "kd_schedule stage leaves the student's own answers without a term in the first half of the run;"
        yield Problem("kd_schedule", what, f"write constant or linear, or raise {aligning}.")
    if training.aligns and held_back and not plain:
        what = "alignment_schedule stage ends with the first half of the run, and no other term goes on then;"
        yield Problem("alignment_schedule", what, f"write constant, or raise {or_lm}kd_weight.")
    elif own and training.aligns and held_back:
        what = "alignment_schedule stage leaves the student's own answers without a term in the second half of the run;"
        yield Problem("alignment_schedule", what, "write constant or linear, or raise kd_weight.")


def _contradictions(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """Values that do not go together."""
    if training.max_steps < 0 and training.num_train_epochs <= 0:
        remedy = "write a number above 0, or set max_steps."
        yield Problem.of_value("num_train_epochs", training.num_train_epochs, remedy)
    if not training.reads_teacher and training.lm_weight == 0:
        names = ", ".join([*alignment_weights(vars(training)), "kd_weight"])
        what = f"{names} and lm_weight are all 0: nothing would be trained."
        yield Problem(None, what)
    yield from _schedule_problems(training)
    if training.run_control and not training.reads_teacher:
        what = "run_control is true, but the run itself has the next-token loss alone;"
        yield Problem("run_control", what, "write false.")
    for name, value in _UNREPEATABLE.items() if training.run_control else ():
        if getattr(training, name) == value:
            remedy = "write another, or run_control false."
            yield Problem("run_control", f"run_control cannot repeat {name} {value};", remedy)
