"""What every argument is for: default, unit and effect, read from the fields of the arguments themselves."""

import difflib
import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..utils.errors import BadRequest, Problem
from .argument_table import read_table

GROUPS = MODEL, DATA, DISTILLATION, PROJECTOR, TRAINING, INHERITED = (
    "Model", "Data", "Distillation", "Projector", "Training and output", "TrainingArguments",
)  # fmt: skip
"""The groups of arguments, in the order they are told in."""

_PREFIXES = {
    PROJECTOR: ("projector_", "calibration_", "anchor_"),
    DISTILLATION: (
        "mercator_",
        "lm_",
        "kd_",
        "mse_",
        "relative_mse_",
        "alignment_",
        "layer_",
        "teacher",
        "on_policy_",
        "rollouts_",
        "run_control",
    ),
}
"""What the names in a group begin with; any other argument of the training is in `TRAINING`."""

NOTES = {
    "learning_rate": (None, "Learning rate of the student; the projector has projector_learning_rate."),
    "max_steps": ("optimizer steps", "Length of the training where it is above 0, in place of num_train_epochs."),
    "warmup_steps": ("optimizer steps", "Steps over which both learning rates rise from 0; below 1 a share of all."),
    "lr_scheduler_type": (None, "What becomes of both learning rates after that: linear, cosine, constant, ..."),
    "optim": (None, "The optimizer; for bfloat16 weights adamw_torch_8bit, which rounds at random (see optim_args)."),
    "optim_args": (None, "Its options, such as bf16_stochastic_round=True,block_size=64."),
    "weight_decay": (None, "Of student and projector, but for biases and norms."),
    "max_grad_norm": (None, "Norm that the gradient of student and projectors together is clipped to; 0 never clips."),
    "bf16": (None, "Compute in bfloat16 and keep weights as they are, also under FSDP2."),
    "gradient_checkpointing": (None, "Compute activations again in the backward pass: less memory, more time."),
    "per_device_eval_batch_size": ("examples", "Examples that are evaluated at once, also by the teacher."),
    "eval_strategy": (None, "When the student is evaluated during the training: no, steps or epoch."),
    "eval_steps": ("optimizer steps", "Steps between two of these evaluations; logging_steps by default."),
    "save_strategy": (None, "When checkpoints are written: steps, epoch, best, or no for never."),
    "save_total_limit": ("checkpoints", "How many are kept; the oldest ones are deleted."),
    "save_only_model": (None, "Leave the optimizer out of checkpoints; they are small and cannot be resumed from."),
    "load_best_model_at_end": (None, "Export the student of the best checkpoint, by metric_for_best_model."),
    "seed": (None, "Of weights, order of the data, dropout and the calibration's examples."),
    "report_to": (None, "Trackers: none, tensorboard, trackio, wandb, ..."),
    "push_to_hub": (None, "Send the student, at the end and with each checkpoint (hub_strategy), to the hub."),
    "hub_model_id": (None, "The repository that is sent to, as owner/name."),
    "hub_strategy": (None, "What is sent before the end: every_save, checkpoint, all_checkpoints or end."),
    "hub_private_repo": (None, "Make that repository a private one."),
    "use_cpu": (None, "Train on the CPU, also where there is a GPU; where there is none, recipes with bf16 need it."),
    "dataloader_num_workers": ("processes", "Processes that prepare batches, and with streaming read and tokenise."),
}
"""Unit and effect of the fields of `TrainingArguments` of which KAVA has something to say."""

_TRAINING_ARGUMENTS_URL = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"


@dataclass(frozen=True)
class Argument:
    """One argument as it is told to the user."""

    name: str
    group: str
    default: str
    """As JSON writes it."""
    unit: str | None
    effect: str
    choices: tuple[str, ...] = ()


_GROUP_OF = attrgetter("group")

_GROUP_OF_CLASS = {"ModelArguments": MODEL, "DataArguments": DATA}


def own_classes(owner: type) -> list[type]:
    """A class of arguments and those of its parents that are KAVA's too."""
    return [part for part in owner.__mro__ if part.__module__.partition(".")[0] == __name__.partition(".")[0]]


def _group(name: str, owner: type) -> str:
    if (group := _GROUP_OF_CLASS.get(owner.__name__)) is not None:
        return group
    if not any(name in part.__annotations__ for part in own_classes(owner)):
        return INHERITED
    return next((group for group, prefixes in _PREFIXES.items() if name.startswith(prefixes)), TRAINING)


def _default(argument: Field[Any]) -> str:
    value = argument.default if argument.default_factory is MISSING else argument.default_factory()
    return json.dumps(value, default=str)


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


def _describe(argument: Field[Any], owner: type, hint: Any) -> Argument:
    from .student_kinds import BY_START

    group, unit = _group(argument.name, owner), getattr(argument.metadata.get("help"), "unit", None)
    effect = " ".join(str(argument.metadata.get("help") or "").replace("%%", "%").split())
    if group == INHERITED and argument.name in NOTES:
        unit, effect = NOTES[argument.name]
    for start, defaults in BY_START.items():
        if argument.name in defaults:
            effect += f" With student_init {start} the default is {json.dumps(defaults[argument.name])}."
    return Argument(argument.name, group, _default(argument), unit, effect, _choices(hint))


def all_arguments() -> list[Argument]:
    """Every argument there is, KAVA's own before those that are as in `TrainingArguments`, group by group."""
    rows = read_table()
    return read_fields() if rows is None else [Argument(**{**row, "choices": tuple(row["choices"])}) for row in rows]


def read_fields() -> list[Argument]:
    """`all_arguments` from the definitions of the arguments themselves, which import torch and transformers."""
    from .arguments import KavaTrainingArguments
    from .data_arguments import DataArguments
    from .model_arguments import ModelArguments

    found = []
    for owner in (ModelArguments, DataArguments, KavaTrainingArguments):
        hints = get_type_hints(owner)
        found += [_describe(argument, owner, hints[argument.name]) for argument in fields(owner) if argument.init]
    return sorted(found, key=lambda argument: GROUPS.index(argument.group))


def unknown_argument(word: str, name: str, known: Sequence[str]) -> Problem:
    """What is wrong with a word, a name as the user wrote it, that is no name of an argument; with the nearest one."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return Problem(None, f"There is no argument {word!r};", f"did you mean {near[0]!r}?")
    return Problem(None, f"There is no argument {word!r}.")


def find_arguments(words: Iterable[str]) -> list[Argument]:
    """The arguments that some words mean: a whole name, or a part of one or more names.

    Args:
        words: with `_` or `-` in them.

    Raises:
        BadRequest: for words in no name, with the nearest name.
    """
    arguments = all_arguments()
    found: list[Argument] = []
    missing = []
    for word in words:
        name = word.strip().lstrip("-").replace("-", "_").lower()
        whole = [argument for argument in arguments if argument.name == name]
        matching = whole or [argument for argument in arguments if name and name in argument.name]
        if not matching:
            missing.append(unknown_argument(word, name, [argument.name for argument in arguments]))
        found += [argument for argument in matching if argument not in found]
    if missing:
        raise BadRequest.of(*missing)
    return found


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size((120, 24)).columns))


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".") + "."


def explain_in_full(arguments: Iterable[Argument]) -> str:
    """Name, default, unit and effect of each argument, group by group.

    Of those that are as in `TrainingArguments` only the first sentence.
    """
    lines: list[str] = []
    for group, members in groupby(arguments, _GROUP_OF):
        lines += ["", f"== {group}"]
        for argument in members:
            unit = f" {argument.unit}" if argument.unit else ""
            choices = f" (one of {', '.join(argument.choices)})" if argument.choices else ""
            lines.append(f"{argument.name} = {argument.default}{unit}{choices}")
            short = group == INHERITED and argument.name not in NOTES
            effect = _first_sentence(argument.effect) if short else argument.effect
            lines += textwrap.wrap(effect, _width(), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).strip()


def short_help(program: str) -> str:
    """What `--help` of a program, such as `run_kava.py`, says: a line for each of KAVA's own arguments, by group."""
    lines = [
        f"usage: {program} ARGS.json [--name value ...]",
        "",
        "Distil a teacher language model into a student. Arguments stand in one JSON object; those on the command line",
        "win over it.",
    ]
    own = [argument for argument in all_arguments() if argument.group != INHERITED]
    width = max(len(argument.name) for argument in own) + 6
    for group, members in groupby(own, _GROUP_OF):
        lines += ["", f"{group}:"]
        for argument in members:
            start = f"  --{argument.name}".ljust(width)
            lines.append(start + textwrap.shorten(argument.effect, max(_width() - width, 30), placeholder=" ..."))
    lines += [
        "",
        "Every field of transformers.TrainingArguments works too, such as --learning_rate or --push_to_hub.",
        "python -m kava_trainer explain [NAME ...] tells default, unit and effect of each of them.",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def as_markdown() -> str:
    """The text of `docs/arguments.md`. It does not depend on the version of transformers."""
    lines = [
        "# Arguments",
        "",
        "Made by `python -m kava_trainer explain --markdown` from the arguments' own definitions. A run is one JSON",
        "object of these; `--name value` on the command line wins over it. `null` stands for nothing given.",
    ]
    own = (argument for argument in all_arguments() if argument.group != INHERITED)
    for group, members in groupby(own, _GROUP_OF):
        lines += ["", f"## {group}", "", _row(("argument", "default", "unit", "effect")), "|---|---|---|---|"]
        for argument in members:
            choices = f" One of {', '.join(f'`{choice}`' for choice in argument.choices)}." if argument.choices else ""
            default = f"`{argument.default}`"
            lines.append(_row((f"`{argument.name}`", default, argument.unit or "", argument.effect + choices)))
    lines += [
        "",
        "## The rest of `TrainingArguments`",
        "",
        f"Every other field of [`transformers.TrainingArguments`]({_TRAINING_ARGUMENTS_URL}) works as it is described",
        "there, with its own default; `python -m kava_trainer explain NAME` shows it. These matter most:",
        "",
        _row(("argument", "unit", "effect")),
        "|---|---|---|",
        *(_row((f"`{name}`", unit or "", effect)) for name, (unit, effect) in NOTES.items()),
    ]
    return "\n".join(lines) + "\n"
