"""The target that the arguments ask for, of two models of known depth and width."""

from collections.abc import Sequence
from copy import copy
from typing import cast

from transformers import PreTrainedModel

from ...config.alignment.teachers import TeacherChoice
from ...config.arguments import KavaTrainingArguments
from ...config.layer_mapping import resolve_layer_pairs
from ...models.attention.capture import check_attention_is_seen, key_value_shape, query_heads, window_of
from ...models.layers import number_of_layers, state_width
from ...utils.errors import BadRequest
from ..projector import ProjectorConfig
from .attention import AttentionTarget, Heads
from .base import AlignmentTarget
from .hidden import HiddenStateTarget
from .kv import KeyValueTarget
from .relations import RelationsTarget
from .several import SeveralTargets

Pairs = list[tuple[int, int]]


def build_target(
    args: KavaTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inherited: Sequence[int] | None = None,
) -> AlignmentTarget:
    """The alignment that the arguments ask for, with random projectors.

    Args:
        args: what is aligned, layers, direction, anchor and shape.
        student: gives its depth and width.
        teacher: gives its depth and width.
        inherited: see `layer_mapping.resolve_layer_pairs`.

    Raises:
        BadRequest: if a layer does not exist, layers of one model differ in width, or those of both do and there is
            to be no projector, or there are not as many `layer_weights` as pairs, or a bridge is to have more
            dimensions than the states, or a model's keys and values cannot be seen.
    """
    pairs = resolve_layer_pairs(args.layer_mapping, number_of_layers(student), number_of_layers(teacher), inherited)
    if args.layer_weights is not None and len(args.layer_weights) != len(pairs):
        raise BadRequest(
            f"layer_weights has {len(args.layer_weights)} numbers, but layer_mapping {args.layer_mapping} gives "
            f"{len(pairs)} pairs: {', '.join(map(str, pairs))}."
        )
    if args.alignment_target == "relations":
        return RelationsTarget(pairs, args.layer_weights)
    if args.alignment_target == "attention":
        return _attention_target(args, student, teacher, pairs)
    if args.alignment_target == "kv":
        return _key_value_target(args, student, teacher, pairs)
    return _hidden_state_target(args, student, teacher, pairs)


def build_targets(
    args: KavaTrainingArguments,
    student: PreTrainedModel,
    teachers: Sequence[PreTrainedModel],
    inherited: Sequence[int] | None = None,
) -> AlignmentTarget:
    """The alignment with each of several teachers, or that of `build_target` with one.

    Args:
        args: as for `build_target`; `teachers` says the weight of each, and which layers.
        student: likewise.
        teachers: give their depth and width.
        inherited: the first teacher's, likewise.

    Raises:
        BadRequest: as `build_target`.
        ValueError: if `args.teachers` names another number of teachers.
    """
    choices = choices_for(args, len(teachers))
    if len(teachers) == 1:
        return build_target(args, student, teachers[0], inherited)
    if args.layer_weights is not None or args.projector_rank is not None:
        raise ValueError("layer_weights and projector_rank are for one teacher, and there are several; leave them out.")
    parts = []
    for number, (choice, teacher) in enumerate(zip(choices, teachers, strict=True)):
        own = copy(args)
        own.layer_mapping = choice.layers or args.layer_mapping
        try:
            parts.append(build_target(own, student, teacher, inherited if number == 0 else None))
        except BadRequest as error:
            raise BadRequest(f"Of number {number + 1} of the teachers: {error}") from error
    temperature = args.teacher_routing_temperature if args.teacher_routing == "agreement" else None
    return SeveralTargets(parts, [choice.weight for choice in choices], temperature)


def choices_for(args: KavaTrainingArguments, count: int) -> list[TeacherChoice]:
    """What the arguments say of each of so many teachers. Raises `ValueError` if that is of another number, or there is
    one and tokens are to choose among several."""
    choices = args.choices or [TeacherChoice()] * count
    if len(choices) != count:
        told = "is 1 teacher" if count == 1 else f"are {count} teachers"
        raise ValueError(f"There {told}, but teachers has {len(choices)} entries; give one for each.")
    if count == 1 and args.teacher_routing != "fixed":
        raise ValueError(f"teacher_routing {args.teacher_routing} chooses among several teachers, and there is one.")
    return choices


def _attention_target(
    args: KavaTrainingArguments, student: PreTrainedModel, teacher: PreTrainedModel, pairs: Pairs
) -> AttentionTarget:
    for model, role in ((student, "student"), (teacher, "teacher")):
        check_attention_is_seen(model, role, "attention")
    heads = [(_heads(student, layer), _heads(teacher, of)) for layer, of in pairs]
    return AttentionTarget(pairs, heads, args.layer_weights)


def _heads(model: PreTrainedModel, layer: int) -> Heads:
    return Heads(query_heads(model), key_value_shape(model)[0], window_of(model, layer))


def _key_value_target(
    args: KavaTrainingArguments, student: PreTrainedModel, teacher: PreTrainedModel, pairs: Pairs
) -> KeyValueTarget:
    """`flat` with `layer_mapping` all takes every layer of both models, of which no pair has to be made."""
    for model, role in ((student, "student"), (teacher, "teacher")):
        check_attention_is_seen(model, role, "kv")
    (own_heads, own_width), (heads, width) = key_value_shape(student), key_value_shape(teacher)
    layers = [sorted(set(side)) for side in zip(*pairs, strict=True)]
    if args.kv_shape == "flat" and args.layer_mapping == "all":
        layers[1] = [*range(1, number_of_layers(teacher) + 1)]
    sizes = (width, own_width)
    if args.kv_shape == "flat":
        sizes = (width * heads * len(layers[1]), own_width * own_heads * len(layers[0]))
    if args.projector_direction == "none" and sizes[0] != sizes[1]:
        raise BadRequest(
            f"projector_direction none compares keys and values themselves, but the teacher's are {sizes[0]} wide and "
            f"the student's {sizes[1]} (kv_shape {args.kv_shape});",
            "write projector_direction student_to_teacher.",
        )
    if args.projector_direction == "student_to_teacher":
        sizes = sizes[::-1]
    config = ProjectorConfig(
        *sizes, args.projector_mlp_ratio, cast(float, args.projector_dropout), args.projector_anchor
    )
    shape = (args.mercator_alpha, args.mercator_beta, args.projector_direction, args.layer_weights)
    both, sharing = (layers[0], layers[1]), args.projector_sharing
    return KeyValueTarget(pairs, args.kv_shape, (own_heads, heads), config, *shape, layers=both, sharing=sharing)


def _hidden_state_target(
    args: KavaTrainingArguments, student: PreTrainedModel, teacher: PreTrainedModel, pairs: Pairs
) -> HiddenStateTarget:
    sizes = (state_width(teacher, (layer for _, layer in pairs)), state_width(student, (layer for layer, _ in pairs)))
    if args.projector_direction == "none" and sizes[0] != sizes[1]:
        raise BadRequest(
            f"projector_direction none compares the states themselves, but the teacher's are {sizes[0]} wide and the "
            f"student's {sizes[1]};",
            "write projector_direction student_to_teacher, or name a student as wide as its teacher.",
        )
    if args.projector_direction == "student_to_teacher":
        sizes = sizes[::-1]
    if isinstance(args.projector_rank, int) and args.projector_rank > min(sizes):
        raise BadRequest(
            f"projector_rank is {args.projector_rank}, but the teacher's states are {sizes[0]} wide and the student's "
            f"{sizes[1]};",
            f"write {min(sizes)} at most, or auto.",
        )
    dropout = cast(float, args.projector_dropout)
    config = ProjectorConfig(*sizes, args.projector_mlp_ratio, dropout, args.projector_anchor, args.projector_rank)
    shape = (args.mercator_alpha, args.mercator_beta, args.projector_direction, args.layer_weights)
    return HiddenStateTarget(pairs, config, *shape, sharing=args.projector_sharing)


def no_target(student: PreTrainedModel) -> HiddenStateTarget:
    """The alignment of nothing, for a student that learns from its next tokens alone."""
    width = state_width(student, [])
    return HiddenStateTarget([], ProjectorConfig(width, width))
