"""From `ARGS.json [--name value ...]` to checked arguments, with all mistakes in one message."""

import argparse
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..utils.errors import BadRequest, Problem, WrongArguments, problems_of
from ..utils.files import is_utf8, json_mistake
from ..utils.redaction import is_secret_name
from .alignment.teachers import first_teacher
from .arguments import KavaArguments, KavaTrainingArguments
from .data_arguments import DataArguments
from .help import short_help, unknown_argument
from .launcher import program
from .model_arguments import QUICKSTART, ModelArguments
from .recipes import find_recipe, recipe_names
from .student_kinds import defaults_for

LARGEST_WHOLE_NUMBER, LARGEST_NUMBER = 2**32 - 1, 1e30
"""The first is the highest seed there is. Nothing that is counted or weighed here comes near either."""

_GROUPS = (ModelArguments, DataArguments, KavaTrainingArguments)

_HINTS = {name: hint for group in _GROUPS for name, hint in get_type_hints(group).items()}

_NAMES = [f.name for group in _GROUPS for f in fields(group) if f.init]

_CHOICES: dict[str, type[Enum]] = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
"""Fields that `TrainingArguments` types as text and turns into these enums only later."""

_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    dict: "an object in braces",
    list: "a list in brackets",
}

_TWO_NAMES = {
    f"activation_checkpointing{end}": f"gradient_checkpointing{end}"
    for end in ("", "_kwargs")
    if f"activation_checkpointing{end}" in _NAMES
}
"""Newer transformers have two names for these, either of which sets both."""

_NOT_TAKEN = ("type", "choices", "required", "unit")
"""What of a field the command line leaves to the checks that follow, which name every mistake at once."""


class _Parser(HfArgumentParser):
    """The command line alone: only what was given, as it was given, and mistakes raised instead of printed."""

    def __init__(self) -> None:
        self.converters: dict[str, Callable[[str], Any] | None] = {}
        """What makes a value of the words of an argument, by its name."""
        super().__init__(cast(Any, _GROUPS), prog=program(), allow_abbrev=False)
        self.add_argument("json_file", nargs="?", metavar="ARGS.json", help="Arguments as one JSON object.")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add what HfArgumentParser makes of a field. It hands over all that this tells of itself, also its unit."""
        taken = {name: value for name, value in options.items() if name not in _NOT_TAKEN}
        action = super().add_argument(*names, **{**taken, "default": argparse.SUPPRESS})
        self.converters.setdefault(action.dest, options.get("type"))  # `--no_x` shares the name of `--x`
        return action

    def error(self, message: str) -> typing.NoReturn:
        raise BadRequest(f"On the command line: {message}.")

    def format_help(self) -> str:
        """KAVA's own arguments by group; the default would be hundreds of lines."""
        return short_help(self.prog)


def _explicit_arguments(argv: list[str], found: list[Problem]) -> dict[str, Any]:
    """The options given on the command line, converted one by one so that every bad value is named at once."""
    parser = _Parser()
    namespace, unknown = parser.parse_known_args(argv)
    names = [name.lstrip("-").split("=")[0] for name in unknown if name.startswith("--")]
    found += [_unknown(name) for name in names or unknown]
    given = {}
    for name, raw in vars(namespace).items():
        try:
            given[name] = None if _is_null(name, raw) else _convert(raw, parser.converters[name])
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            found.append(_wrong(name, raw, _expected(name)))
    return given


def _is_null(name: str, raw: Any) -> bool:
    """Whether the command line takes back what a file says, as `null` does in JSON, where an argument may be none."""
    return raw in ("null", ["null"]) and type(None) in get_args(_HINTS.get(name))


def _convert(raw: Any, converter: Callable[[str], Any] | None) -> Any:
    if converter is None or isinstance(raw, bool):
        return raw
    return [converter(item) for item in raw] if isinstance(raw, list) else converter(raw)


def _read_json(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    repeated: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in dict.fromkeys(names) if names.count(name) > 1 and name not in repeated)
        return dict(pairs)

    try:
        file = path if Path(path).is_file() else find_recipe(path) or path
        text = Path(file).read_text(encoding="utf-8-sig")  # some editors begin UTF-8 with a mark
        content = json.loads(text, object_pairs_hook=members)
    except FileNotFoundError as error:
        recipes = ", ".join(recipe_names())
        raise BadRequest(
            f"There is no arguments file {path};", f"write the path of yours, or the name of a recipe: {recipes}."
        ) from error
    except OSError as error:
        raise BadRequest(f"The arguments file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"The arguments file {path} is not UTF-8 text;", "save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"{path} is not valid JSON: {json_mistake(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BadRequest(f'{path} must hold one JSON object, such as {{"dataset_name": "quickstart"}}.')
    if repeated:
        raise BadRequest(f"{path} names {', '.join(repeated)} more than once;", "keep one of each.")
    return content


def _alternatives(hint: Any) -> list[Any]:
    """The member types of a union without None and without bare enums, which JSON writes as text."""
    parts = get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [p for p in parts if p is not type(None) and not (isinstance(p, type) and issubclass(p, Enum))]


def _expected(name: str) -> str:
    """The type of an argument, in words."""
    words = []
    for part in _alternatives(_HINTS[name]):
        if typing.get_origin(part) is typing.Literal:
            words.append("one of " + ", ".join(str(choice) for choice in get_args(part)))
        else:
            words.append(_TYPE_WORDS.get(typing.get_origin(part) or part, str(part)))
    return " or ".join(words)


def _fits(name: str, value: Any, hint: Any) -> bool:
    parts = _alternatives(hint)
    if isinstance(value, bool) and bool not in parts:  # to Python a bool is an int
        return False
    if type(value) is int and float in parts:
        return True
    if isinstance(value, list) and list[float] in parts and all(type(number) in (int, float) for number in value):
        return True
    try:
        type_validator(name, value, hint)
    except TypeError:
        return False
    return True


def fits_type(name: str, value: Any) -> bool:
    """Whether a value has a type that an argument takes; any has where there is no such argument."""
    is_layers = name in ("layer_mapping", "student_layers", "teachers") and isinstance(value, list)
    return name not in _HINTS or is_layers or _fits(name, value, _HINTS[name])


def _shown(name: str, value: Any) -> str:
    """A wrong value as it stands in a message: a secret is not shown, and no value fills the screen."""
    if is_secret_name(name):
        return "of the wrong kind"
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _numbers(value: Any) -> list[int | float]:
    """All numbers in a value, however deep in lists and objects."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def _wrong(name: str, value: Any, wanted: str) -> Problem:
    return Problem.of_value(name, _shown(name, value), f"write {wanted}.")


def _number_problem(name: str, value: Any) -> Problem | None:
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            return _wrong(name, value, "a finite number")
        largest = LARGEST_NUMBER if isinstance(number, float) else LARGEST_WHOLE_NUMBER
        if abs(number) > largest:
            return _wrong(name, value, f"a number up to {largest}")
    return None


def _type_problem(name: str, value: Any) -> Problem | None:
    if problem := _number_problem(name, value):
        return problem
    if name == "resume_from_checkpoint" and isinstance(value, bool):
        return None
    if not is_utf8(value):
        what = f"{name} is {_shown(name, value)}, which is not UTF-8 text, so no file could tell of it;"
        return Problem(name, what, "write it anew.")
    if not fits_type(name, value):
        return _wrong(name, value, _expected(name))
    choices = _choices(name)
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=3) or choices[:8]
        more = ", ..." if len(choices) > 8 else ""
        return Problem.of_value(name, json.dumps(value), f"write one of {', '.join(near)}{more}.")
    return None


def _choices(name: str) -> list[str]:
    """The values a text argument may have, or nothing where any text will do."""
    if name in _CHOICES:
        return [str(choice.value) for choice in _CHOICES[name]]
    metadata = next(f.metadata for group in _GROUPS for f in fields(group) if f.name == name)
    return list(metadata.get("choices", ()))


def _unknown(name: str) -> Problem:
    return unknown_argument(name, name.replace("-", "_"), _NAMES)


def _construct(group: type, values: dict[str, Any], found: list[Problem]) -> Any:
    """Build one dataclass of those values that are its own; its complaint about one joins the list of mistakes."""
    own = {f.name for f in fields(group) if f.init}
    try:
        return group(**{name: value for name, value in values.items() if name in own})
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        found += problems_of(error)
        return None


def _names_given(values: Mapping[str, Any]) -> frozenset[str]:
    """The names of what was given, and the other name of what has two."""
    pairs = [{*pair} for pair in _TWO_NAMES.items()]
    return frozenset(values).union(*(pair for pair in pairs if pair & values.keys()))


def _beside_rollouts(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a file of rollouts where nobody has written it: nothing but the file is trained on."""
    return {"on_policy_fraction": 1.0} if values.get("rollouts_from") else {}


def _first_teacher(values: dict[str, Any], found: list[Problem]) -> dict[str, Any]:
    """What the first of several teachers stands for; a list that is none is left out, and joins the mistakes."""
    try:
        return first_teacher(values)
    except WrongArguments as error:
        found += problems_of(error)
        values.pop("teachers", None)
        values.setdefault("teacher_model_name_or_path", QUICKSTART)  # that it is missing too says nothing
        return {}


def parse_arguments(argv: list[str], defaults: Mapping[str, Any] | None = None) -> KavaArguments:
    """Read a JSON file of arguments and command-line overrides.

    Args:
        argv: the command line without the program: at most one JSON file, or the name of a recipe, then `--name value`
            pairs, which win.
        defaults: values of what neither names, as JSON has them.

    Returns:
        The checked arguments; their `given` has every name of the three sources.

    Raises:
        BadRequest: with one sentence for each mistake: unknown names (with the nearest right one), wrong types and
            values, missing arguments. Nothing has been loaded by then.
    """
    if not is_utf8(argv):  # which word it is is not shown: it may be a token
        raise BadRequest("The command line holds text that is not UTF-8, so no file could tell of the run.")
    found: list[Problem] = []
    given = _explicit_arguments(argv, found)
    values = {**(defaults or {}), **_read_json(given.pop("json_file", None)), **given}
    found += [_unknown(name) for name in values if name not in _NAMES]
    values = {name: value for name, value in values.items() if name in _NAMES}
    wrong = {name: problem for name, value in values.items() if (problem := _type_problem(name, value))}
    found += wrong.values()
    values = {name: value for name, value in values.items() if name not in wrong}
    if isinstance(values.get("resume_from_checkpoint"), bool):
        values["resume_from_checkpoint"] = str(values["resume_from_checkpoint"]).lower()
    first = _first_teacher(values, found)
    model, data = (_construct(group, {**values, **first}, found) for group in (ModelArguments, DataArguments))
    found += [problem for part in (model, data) for problem in part.problems() if problem.argument not in wrong]
    by_kind = defaults_for(getattr(model, "student_init", ""), values)
    training = _construct(KavaTrainingArguments, {**by_kind, **_beside_rollouts(values), **values}, found)
    if not found:
        arguments = KavaArguments(model, data, training, _names_given(values), by_kind)
        if not (found := arguments.problems()):
            return arguments
    raise BadRequest.of(*found)
