"""How a user names the layers that are aligned, before any model is known."""

import json
from collections.abc import Sequence
from typing import Literal

from ..utils.errors import BadRequest, Problem, WrongArguments

LayerMapping = Literal["last", "all", "inherited", "cka"] | int | list[tuple[int, int]]
"""A parsed `layer_mapping`: a whole number k stands for `uniform:k`, a list holds (student, teacher) pairs."""

_NAMED: dict[str, LayerMapping] = {"last": "last", "all": "all", "inherited": "inherited", "cka": "cka"}


def parse_layer_mapping(text: str) -> LayerMapping:
    """Read `layer_mapping` without knowing the models.

    Args:
        text: `last`, `all`, `inherited`, `cka`, `uniform:k`, or a JSON list of [student layer, teacher layer] pairs,
            counted from 1.

    Raises:
        WrongArguments: if the text is none of these. Layer 0, the embeddings, is never accepted.
    """
    if text in _NAMED:
        return _NAMED[text]
    kind, _, count = text.partition(":")
    if kind == "uniform" and count.isdigit() and int(count) > 0:
        return int(count)
    try:
        pairs = json.loads(text)
        if pairs and all(len(pair) == 2 and all(type(n) is int and n >= 1 for n in pair) for pair in pairs):
            return [tuple(pair) for pair in pairs]
    except (json.JSONDecodeError, TypeError):
        pass
    remedy = (
        "write last, all, inherited, cka, uniform:2 (any number of pairs), or pairs of a student and a teacher layer "
        "counted from 1, such as [[12, 14], [24, 28]]."
    )
    raise WrongArguments.of(Problem.of_value("layer_mapping", repr(text), remedy))


def _spread(count: int, depth: int) -> list[int]:
    """`count` layers of `depth`, evenly spaced, ending with the last; the first is block 1 where `count` > 1."""
    if count == 1:
        return [depth]
    return [round(1 + index * (depth - 1) / (count - 1)) for index in range(count)]


def resolve_layer_pairs(
    mapping: str, student_layers: int, teacher_layers: int, inherited: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Turn `layer_mapping` into (student layer, teacher layer) pairs for two models of known depth.

    Args:
        mapping: the argument as the user wrote it, see `layer_mapping.parse_layer_mapping`.
        student_layers: number of blocks of the student.
        teacher_layers: number of blocks of the teacher.
        inherited: for a student that was cut out of its teacher, the teacher layer that each student layer, from the
            first on, was cut from. With `cka` the one that was chosen for each; where none was yet, as without storage,
            the layers are those of `all`.

    Returns:
        Pairs of layer indices in the module's convention, 1 up to the depth of each model.

    Raises:
        BadRequest: if a layer does not exist, more pairs are asked for than the shallower model has blocks, or the
            inherited ones are asked for and not known, or not one for each student layer.
    """
    parsed = parse_layer_mapping(mapping)
    if parsed == "last":
        return [(student_layers, teacher_layers)]
    if parsed == "cka" and inherited is not None and len(inherited) == student_layers:
        return list(enumerate(inherited, start=1))
    if parsed == "all" or parsed == "cka":
        return [(k, max(1, round(k * teacher_layers / student_layers))) for k in range(1, student_layers + 1)]
    if parsed == "inherited":
        return _inherited_pairs(inherited, student_layers, teacher_layers)
    if isinstance(parsed, int):
        limit = min(student_layers, teacher_layers)
        if parsed > limit:
            raise BadRequest(
                f"layer_mapping asks for {parsed} pairs, but the shallower model has {limit} layers;",
                f"write uniform:{limit} or less.",
            )
        return list(zip(_spread(parsed, student_layers), _spread(parsed, teacher_layers), strict=True))
    for student, teacher in parsed:
        if student > student_layers or teacher > teacher_layers:
            raise BadRequest(
                f"layer_mapping names the pair [{student}, {teacher}], but the student has layers 1 to "
                f"{student_layers} and the teacher 1 to {teacher_layers};",
                "write pairs of these.",
            )
    return parsed


def _inherited_pairs(
    inherited: Sequence[int] | None, student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """Each student layer with the one it was cut from; the last with the last, since both follow the final norm."""
    if inherited is None:
        raise BadRequest(
            "layer_mapping inherited pairs each student layer with the teacher layer that it was cut from, but this "
            "student was not cut out of the teacher;",
            "write student_init teacher_layers, or layer_mapping all.",
        )
    if len(inherited) != student_layers or not all(1 <= layer <= teacher_layers for layer in inherited):
        raise BadRequest(
            f"The inherited layers are {list(inherited)}, but the student has {student_layers} layers and the teacher "
            f"layers 1 to {teacher_layers};",
            "give one teacher layer for each student layer.",
        )
    return list(enumerate([*inherited[:-1], teacher_layers], start=1))
