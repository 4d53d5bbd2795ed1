"""How a user names the part of a teacher that a student is cut out of it, before any model is known."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

from ..utils.errors import Problem, WrongArguments

if TYPE_CHECKING:  # which asks here
    from .model_arguments import ModelArguments

LayerChoice = Literal["importance", "uniform"] | list[int]
"""A parsed `student_layers`; a list holds indices of teacher blocks, counted from 0 and rising."""

CUT_SIZES = ("student_num_layers", "student_intermediate_size", "student_num_attention_heads")
"""The arguments that say how large a student is that is cut out of its teacher."""

CUT_ARGUMENTS = (*CUT_SIZES, "student_layers", "student_layer_importance")
"""All arguments that tell of such a student."""

DEFAULT_LAYERS = "importance"


def parse_student_layers(text: str) -> LayerChoice:
    """Read `student_layers` without knowing the teacher.

    Args:
        text: `importance`, `uniform`, or teacher blocks counted from 0, as a JSON list or with commas between them.

    Raises:
        WrongArguments: if the text is none of these, or blocks do not rise.
    """
    if text in ("importance", "uniform"):
        return cast(LayerChoice, text)
    try:
        blocks = json.loads(text if text.startswith("[") else f"[{text}]")
    except (json.JSONDecodeError, RecursionError):
        blocks = None
    if not blocks or not all(type(block) is int and block >= 0 for block in blocks):
        remedy = "write importance, uniform, or blocks of the teacher counted from 0, such as [0, 1, 4]."
        raise WrongArguments.of(Problem.of_value("student_layers", repr(text), remedy))
    if blocks != sorted(set(blocks)):
        remedy = f"write each block once and in the teacher's order: {sorted(set(blocks))}."
        raise WrongArguments.of(Problem.of_value("student_layers", text, remedy))
    return cast(list[int], blocks)


def settle_student_layers(value: object) -> str:
    """A value of `student_layers` as the one text that stands for it; what cannot be read stays as it is."""
    text = json.dumps(value) if isinstance(value, (list, tuple)) else str(value).strip()
    try:
        parsed = parse_student_layers(text)
    except WrongArguments:
        return text
    return parsed if isinstance(parsed, str) else json.dumps(parsed)


def asked_to_cut(model: "ModelArguments") -> list[str]:
    """Those of the given arguments that make a student one that is cut out of its teacher."""
    given = [name for name in CUT_SIZES if getattr(model, name) is not None]
    is_list = model.student_layers not in ("importance", "uniform")
    return [*given, "student_layers"] if is_list else given


def cut_problems(model: "ModelArguments") -> Iterator[Problem]:
    """Every mistake in the arguments of a student that is cut out of its teacher."""
    yield from _wrong_sizes(model)
    try:
        layers = parse_student_layers(model.student_layers)
    except WrongArguments as error:
        yield from error.problems
        return
    if isinstance(layers, list) and model.student_num_layers not in (None, len(layers)):
        what = f"student_layers names {len(layers)} blocks, but student_num_layers is {model.student_num_layers};"
        yield Problem("student_layers", what, "leave out student_num_layers.")
    yield from _contradictions(model)


def _wrong_sizes(model: "ModelArguments") -> Iterator[Problem]:
    for name in CUT_SIZES:
        if (value := getattr(model, name)) is not None and value < 1:
            yield Problem.of_value(name, value, "write 1 or more.")


def _contradictions(model: "ModelArguments") -> Iterator[Problem]:
    given = asked_to_cut(model)
    named = next((n for n in ("student_model_name_or_path", "student_config_name") if getattr(model, n)), None)
    if named is not None and (sizes := [name for name in given if name != "student_layers"]):
        what = f"{sizes[0]} cuts the student out of the teacher, and {named} gives it another shape;"
        yield Problem(sizes[0], what, f"leave out {named} or {', '.join(sizes)}.")
        return
    if model.is_cut:
        if named is None and not given:
            what = "student_init is teacher_layers, but nothing says how many of them;"
            yield Problem("student_init", what, "write student_num_layers.")
        return
    defaults = {"student_layers": DEFAULT_LAYERS, "student_layer_importance": type(model).student_layer_importance}
    chosen = [name for name, default in defaults.items() if getattr(model, name) != default]
    if not (given or chosen):
        return
    first = [*given, *chosen][0]
    if named is None and model.student_init == "random":
        what = f"{first} cuts the student out of the teacher, but student_init is random;"
        yield Problem(first, what, "leave out student_init, or name a student_config_name for random weights.")
    elif named is not None:
        what = f"{first} is for a student that is cut out of its teacher, but {named} gives this one its own start;"
        yield Problem(first, what, f"leave it out, or write student_num_layers in place of {named}.")
    else:
        what = f"{first} is given, but nothing says how many layers of the teacher are kept;"
        yield Problem(first, what, "write student_num_layers.")
