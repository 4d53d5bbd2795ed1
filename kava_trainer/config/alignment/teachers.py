"""Several teachers: what the list of them says, and what does not go with it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...utils.errors import Problem, WrongArguments
from ...utils.files import missing_path
from ..layer_mapping import parse_layer_mapping

if TYPE_CHECKING:  # which asks here
    from ..arguments import KavaArguments, KavaTrainingArguments
    from ..model_arguments import ModelArguments

EXAMPLE = '[{"model": "org/first", "weight": 2}, {"model": "org/second", "layers": "uniform:2"}]'

LOWEST_TEMPERATURE = 1e-4
"""Of the router; at a lower one the agreements are no finite numbers any more."""

QUANTIZATIONS, DTYPES = ("none", "8bit", "4bit"), ("auto", "float32", "bfloat16")
"""Values of `teacher_quantization` and of `teacher_dtype`."""

OF_FIRST = {
    "model": "teacher_model_name_or_path",
    "revision": "teacher_revision",
    "quantization": "teacher_quantization",
    "dtype": "teacher_dtype",
}
"""What of the first of several teachers stands in the place of an argument that there is for one."""


@dataclass(frozen=True)
class TeacherChoice:
    """One of several teachers, as the list names it."""

    model: str | None = None
    """Hub id or local folder, or `quickstart`."""
    weight: float = 1.0
    """Against those of the others."""
    revision: str | None = None
    quantization: str = "none"
    dtype: str = "auto"
    layers: str | None = None
    """A `layer_mapping` of its own."""
    cached: bool = True
    """Whether `teacher_cache_dir`, where there is one, holds its states too."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What of it stands in the place of the arguments for one teacher."""
        return {name: getattr(self, own) for own, name in OF_FIRST.items()}


_KEYS = tuple(f.name for f in fields(TeacherChoice))
_TEXTS = ("model", "revision", "quantization", "dtype")


def list_as_text(given: Any) -> Any:
    """An argument as the text that it is kept as, which a JSON file may give as a list."""
    return json.dumps(given) if isinstance(given, list | tuple) else given


def read_teachers(given: Any) -> list[TeacherChoice]:
    """The teachers of the argument `teachers`, a list or its JSON text; none where it is not given.

    Raises:
        WrongArguments: if it is no list of at least two objects with the keys of `TeacherChoice`.
    """
    if given is None:
        return []
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(own, Mapping) for own in found):
        remedy = f"write a list of two or more, such as {EXAMPLE}."
        raise WrongArguments.of(Problem.of_value("teachers", _shown(given), remedy))
    found = [{name: value for name, value in own.items() if value is not None} for own in found]
    problems = [problem for number, own in enumerate(found, 1) for problem in _problems(number, own)]
    if problems:
        raise WrongArguments.of(*problems)
    return [TeacherChoice(**{**own, "layers": _layers(own.get("layers"))}) for own in found]


def _shown(given: Any) -> str:
    text = given if isinstance(given, str) else json.dumps(given)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _layers(given: Any) -> str | None:
    return json.dumps(given) if isinstance(given, list) else given


def _problems(number: int, given: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with one entry of the list."""
    which = f"Number {number} of teachers"
    for name in (name for name in given if name not in _KEYS):
        yield Problem("teachers", f"{which} has the unknown key {name};", f"write one of {', '.join(_KEYS)}.")
    for name in (name for name in _TEXTS if not isinstance(given.get(name, ""), str)):
        yield Problem("teachers", f"{which} has the {name} {json.dumps(given[name])};", "write it in quotes.")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        remedy = "write a number above 0, such as 1, or leave the teacher out."
        yield Problem("teachers", f"{which} has the weight {json.dumps(weight)};", remedy)
    for name, known in (("quantization", QUANTIZATIONS), ("dtype", DTYPES)):
        if isinstance(own := given.get(name), str) and own not in known:
            yield Problem("teachers", f"{which} has the {name} {own};", f"write one of {', '.join(known)}.")
    if not isinstance(cached := given.get("cached", True), bool):
        yield Problem("teachers", f"{which} has cached {json.dumps(cached)};", "write true or false.")
    yield from _layer_problems(which, given.get("layers"))


def _layer_problems(which: str, given: Any) -> Iterator[Problem]:
    text = _layers(given)
    if text is None:
        return
    try:
        mapping = parse_layer_mapping(text) if isinstance(text, str) else None
    except WrongArguments:
        mapping = None
    if mapping is None or mapping in ("inherited", "cka"):
        remedy = "write last, all, uniform:2 or pairs of a student and a teacher layer, such as [[12, 14], [24, 28]]."
        yield Problem("teachers", f"{which} has the layers {json.dumps(given)};", remedy)


def first_teacher(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the first of several teachers puts in the place of the arguments for one; nothing where there is one.

    Args:
        values: arguments by name, as somebody wrote them.

    Raises:
        WrongArguments: as `read_teachers`, where one of them has no model or one of these arguments is written too, and
            where tokens are to choose among several and there is one.
    """
    found = read_teachers(values.get("teachers"))
    routing = values.get("teacher_routing", "fixed")
    if not found and routing != "fixed":
        what = f"teacher_routing {routing} chooses among several teachers, and there is one;"
        raise WrongArguments.of(Problem("teacher_routing", what, "write teachers, or leave it out."))
    if not found:
        return {}
    if nameless := [number for number, own in enumerate(found, 1) if not own.model]:
        what = f"Number {nameless[0]} of teachers names no model;"
        raise WrongArguments.of(Problem("teachers", what, "write a hub id, a local folder or 'quickstart'."))
    first = found[0].arguments  # the record of a run has both
    written = [name for name in first if values.get(name) is not None and values[name] != first[name]]
    if written:
        what = f"{written[0]} is for one teacher, and teachers names several;"
        raise WrongArguments.of(Problem(written[0], what, "leave it out, and write it in the list of teachers."))
    return first


def teacher_names(arguments: Mapping[str, Any]) -> list[str]:
    """What the teachers are loaded from, of arguments by name, as a run records them; one where there is one."""
    found = [choice.model for choice in read_teachers(arguments.get("teachers")) if choice.model]
    return found or [name for name in [arguments.get("teacher_model_name_or_path")] if name is not None]


def other_teachers(arguments: "KavaArguments") -> "list[ModelArguments]":
    """The arguments for models as they would be with each of the other teachers, where there are several."""
    return [replace(arguments.model, **choice.arguments) for choice in arguments.training.choices[1:]]


def cache_folders(training: "KavaTrainingArguments") -> dict[int, Path]:
    """Where the states of each teacher are, by its number: of several those that are not to be left out, in folders of
    their own."""
    folder = Path(training.teacher_cache_dir or "")
    if not training.teachers:
        return {0: folder}
    return {n: folder / f"teacher{n + 1}" for n, choice in enumerate(training.choices) if choice.cached}


def several_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """What does not go with several teachers."""
    if training.teacher_routing_temperature < LOWEST_TEMPERATURE:
        remedy = f"write {LOWEST_TEMPERATURE} or more, such as 0.1."
        yield Problem.of_value("teacher_routing_temperature", training.teacher_routing_temperature, remedy)
    if not training.teachers:
        return
    for choice in training.choices[1:]:
        if problem := missing_path("teachers", choice.model):
            yield problem
    if training.teacher_cache_dir and not cache_folders(training):
        what = "teacher_cache_dir is given, but all of the teachers have cached false;"
        yield Problem("teacher_cache_dir", what, "leave it out, or let one of them be cached.")
    if training.layer_mapping == "cka":
        what = "layer_mapping cka chooses the layers of one teacher, and teachers names several;"
        yield Problem("layer_mapping", what, "write last, all or uniform:2, or pairs for each as its layers.")
    if training.layer_mapping == "inherited" and any(own.layers is None for own in training.choices[1:]):
        what = "layer_mapping inherited pairs a student with the first teacher alone, that it was cut out of;"
        yield Problem("layer_mapping", what, "write layers for each of the other teachers.")
    if training.layer_weights is not None:
        what = "layer_weights weighs the pairs of one teacher, and teachers names several;"
        yield Problem("layer_weights", what, "leave it out, and weigh the teachers.")
    if training.projector_rank is not None:
        what = "projector_rank fits a bridge between a student and one teacher, and teachers names several;"
        yield Problem("projector_rank", what, "leave it out.")
    if training.on_policy_fraction > 0 and training.teacher_cache_dir and training.rollouts_from is None:
        what = "teacher_cache_dir holds no states of what the student writes, and with several teachers none of data;"
        yield Problem("teacher_cache_dir", what, "leave it out, or write on_policy_fraction 0.")
