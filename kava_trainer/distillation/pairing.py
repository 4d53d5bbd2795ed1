"""A teacher and a student that a trainer is given as plain models: where the states come from, and what is aligned."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.arguments import KavaTrainingArguments
from ..config.checks import alignment_weights
from ..config.launcher import is_fsdp_asked
from ..models.attention.capture import AttentionPart, Feature, check_features
from ..models.layers import number_of_layers, train_text_alone
from ..models.lm_head import check_head
from ..models.loading import on_device
from ..models.lora import unwrapped
from ..models.teacher import OnlineTeacher, TeacherSource
from ..utils.distributed import is_sharded
from .loss_terms import needed_teacher_layers
from .model import DistillationModel
from .targets import AlignmentTarget, build_targets, choices_for, no_target
from .teachers.several import SeveralTeachers, by_role, each_teacher, online_teachers, role_of


def check_student(student: PreTrainedModel) -> None:
    """Raise `ValueError` for a student that cannot be trained as it is."""
    if is_fsdp_asked() and getattr(student, "is_quantized", False):
        raise ValueError("The student's weights are quantised, which FSDP2 cannot spread; load them as they are.")
    check_causal("student", student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("No weight of the student needs a gradient, so it would not learn: student.requires_grad_().")
    kinds = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    if odd := kinds - {torch.float32, torch.bfloat16}:
        kind = str(odd.pop()).removeprefix("torch.")
        raise ValueError(f"The student's weights are {kind}, which is not trained in; write student.float().")


def check_causal(role: str, model: Any) -> None:
    """Raise `ValueError` for what is no causal language model of transformers, named by its role."""
    kind = type(model).__name__
    if isinstance(model, str):
        raise ValueError(f"The {role} is a name; load it: AutoModelForCausalLM.from_pretrained({model!r}).")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"The {role} is a {kind}, not a model of transformers; take it out of what wraps it.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"The {role} is a {kind}, which reads with an encoder; KAVA needs a decoder-only model.")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(f"The {role} is a {kind}, which predicts no next token; load AutoModelForCausalLM.")


def check_apart(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `ValueError` where student and teacher share weights, which would be frozen with the teacher."""
    if student is teacher:
        raise ValueError("Teacher and student are one model; give the student a copy: copy.deepcopy(teacher).")
    frozen = {parameter.data_ptr() for parameter in teacher.parameters()} - {0}
    shared = [name for name, weight in student.named_parameters() if weight.data_ptr() in frozen]
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise ValueError(
            f"The student shares {shared[0]}{more} with the teacher, which is frozen; copy.deepcopy the student."
        )


def _is_weighed(args: KavaTrainingArguments, target: AlignmentTarget) -> bool:
    return any(getattr(args, f"{name}_weight") > 0 for name in target.terms)


def features_given(args: KavaTrainingArguments, target: AlignmentTarget, source: TeacherSource) -> list[Feature]:
    """What the weighted terms read of the teacher, of several the first one, where a source gives it.

    A source of the user's own may give any hidden states; parts of attention it must name in `layers`, as
    `OnlineTeacher` does.

    Raises:
        ValueError: if the source, or one of several, does not give it.
    """
    sources = each_teacher(source)
    if len(sources) != len(target.parts):
        raise ValueError(f"There are {len(sources)} teachers, but the target is for {len(target.parts)}.")
    found = [_features_of(args, *own) for own in zip(target.parts, sources, strict=True)]
    return found[0]


def _features_of(args: KavaTrainingArguments, target: AlignmentTarget, source: TeacherSource) -> list[Feature]:
    needed = needed_teacher_layers(args, target, source.num_layers)
    layers = getattr(source, "layers", ())
    told = layers if isinstance(layers, list | tuple | set) else ()
    bound = [own for own in needed if isinstance(own, AttentionPart) or isinstance(source, OnlineTeacher)]
    if missing := [own for own in bound if own not in told]:
        own = missing[0]
        first = f"{own.part} of layer {own.layer}" if isinstance(own, AttentionPart) else f"state {own}"
        more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
        raise ValueError(
            f"The terms read the teacher's {first}{more} but the {type(source).__name__} does not name it in its "
            "layers; give the teacher as a model."
        )
    return needed


GivenTeacher = PreTrainedModel | TeacherSource | Sequence[PreTrainedModel | TeacherSource] | None
"""What a teacher, or several, are given as."""


def teachers_given(teacher: GivenTeacher) -> list[Any]:
    """The teachers one by one, without what peft or a compiler wraps around a model."""
    if teacher is None:
        return []
    given = teacher if isinstance(teacher, list | tuple) else [teacher]
    return [unwrapped(own, role_of(number)) for number, own in enumerate(given)]


def pair_up(
    args: KavaTrainingArguments,
    student: PreTrainedModel,
    teacher: GivenTeacher,
    target: AlignmentTarget | None,
    inherited: Sequence[int] | None = None,
) -> tuple[TeacherSource | None, AlignmentTarget]:
    """What a `KavaTrainer` takes the teacher's states from, and what it aligns.

    Args:
        args: say which layers are aligned, how, and which terms there are.
        student: the model to train.
        teacher: a model, which is frozen and put on the training's device, or any other source of states; or several.
        target: what is aligned; made as the arguments ask where it is None, with a teacher, or without one where no
            term needs it.
        inherited: for a target that is made, see `layer_mapping.resolve_layer_pairs`.

    Returns:
        The source, which is None where no term reads the teacher, and the target.

    Raises:
        BadRequest: if the models do not have the layers that the arguments name.
        ValueError: if there is neither a target nor a model to make it for, or the target is of another kind or for
            other teachers than `args` ask for.
    """
    if target is not None and target.name != args.alignment_target and (args.aligns or _is_weighed(args, target)):
        raise ValueError(
            f"The target is a {type(target).__name__}, but alignment_target is {args.alignment_target}; write "
            f"alignment_target={target.name!r}."
        )
    teachers = teachers_given(teacher)
    for number, own in enumerate(teachers):
        if isinstance(own, (str, nn.Module)):
            check_causal(role_of(number), own)
    if not teachers and not args.reads_teacher:
        return None, no_target(student) if target is None else target
    if not teachers:
        names = f"{', '.join(alignment_weights(vars(args)))} or kd_weight"
        raise ValueError(f"{names} is above 0; give a teacher, or set all of them to 0.")
    models = [own for own in teachers if isinstance(own, PreTrainedModel)]
    if target is None and len(models) < len(teachers):
        raise ValueError("Give the teacher as a model, or say what is aligned: target=build_target(args, ...).")
    for own in models:
        check_apart(student, own)
    target = build_targets(args, student, models, inherited) if target is None else target
    if len(teachers) == 1 and not models:
        return teachers[0], target
    if len(target.parts) != len(teachers):
        raise ValueError(f"There are {len(teachers)} teachers, but the target is for {len(target.parts)}.")
    sources = [_source_of(args, own, part) for own, part in zip(teachers, target.parts, strict=True)]
    found = [own for own in sources if own is not None]  # terms that read any teacher read all of them
    if len(teachers) == 1 or not found:
        return sources[0], target
    return SeveralTeachers(found, [choice.weight for choice in choices_for(args, len(found))]), target


def _source_of(
    args: KavaTrainingArguments, teacher: PreTrainedModel | TeacherSource, target: AlignmentTarget
) -> TeacherSource | None:
    """What gives a teacher's states; None for a model that no term reads."""
    if not isinstance(teacher, PreTrainedModel):
        return teacher
    layers = needed_teacher_layers(args, target, number_of_layers(teacher))
    if not layers:
        return None
    if not (
        getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None) or is_sharded(teacher)
    ):  # it lies where it must
        on_device(teacher, args.device)
    return OnlineTeacher(teacher, layers)


def _try_out(
    args: KavaTrainingArguments, student: PreTrainedModel, source: TeacherSource | None, target: AlignmentTarget
) -> None:
    """Make sure that what the terms read of the models is what these have. Raises `BadRequest` if it is not, or
    `ValueError` where the teacher is a source that does not give it."""
    if source is not None:
        features_given(args, target, source)
    if args.aligns:
        check_features(student, target.student_features, "student")
    if args.lm_weight > 0 or args.kd_weight > 0:
        check_head(student, "student")
    for role, own in by_role(source):
        if isinstance(own, OnlineTeacher):
            check_features(own.model, own.layers, role)
            if args.kd_weight > 0:
                check_head(own.model, role)


class Pairing:
    """Makes the model that a `KavaTrainer` trains of a student, a teacher and what is aligned.

    Args:
        args: of the run.
        teacher: see `pair_up`.
        target: see `pair_up`.
        again: whether there will be more than one student, each of which needs projectors of its own.
        inherited: see `pair_up`.
        choose: gives what `inherited` is of a student and a teacher where `layer_mapping` cka is to choose, and nobody
            has chosen yet.
    """

    def __init__(
        self,
        args: KavaTrainingArguments,
        teacher: GivenTeacher,
        target: AlignmentTarget | None,
        again: bool,
        inherited: Sequence[int] | None = None,
        choose: Callable[[PreTrainedModel, PreTrainedModel], list[int]] | None = None,
    ) -> None:
        self._args, self._teachers, self._again = args, teachers_given(teacher), again
        self._inherited, self._choose = inherited, choose
        self._target = deepcopy(target) if again else target

    def pair(self, student: PreTrainedModel) -> tuple[DistillationModel, TeacherSource | None]:
        """Student and projectors in one module, and the source of the teacher's states.

        Raises:
            BadRequest, ValueError: as `check_student` and `pair_up`.
        """
        student = unwrapped(student, "student")
        check_student(student)
        train_text_alone(student)
        target = deepcopy(self._target) if self._again else self._target
        inherited = self._chosen(student) if target is None else None
        with torch.random.fork_rng([]):  # new projectors depend on the seed alone, and nothing else on them
            torch.manual_seed(self._args.seed)
            source, target = pair_up(self._args, student, self._teachers, target, inherited)
        _try_out(self._args, student, source, target)
        self._tried = self._read_parts()
        self._trained = {name for name, parameter in target.named_parameters() if parameter.requires_grad}
        self._train_projectors(target)
        if getattr(student, "is_quantized", False):
            target.to(student.device)  # Trainer moves no model that bitsandbytes has quantised
        return DistillationModel(student, target), source

    def _chosen(self, student: PreTrainedModel) -> Sequence[int] | None:
        """What `inherited` is for a target that is made."""
        wanted = self._args.layer_mapping == "cka" and self._args.aligns and self._inherited is None
        if not wanted or self._choose is None or not self._all_run():
            return self._inherited
        if len(self._teachers) > 1:
            raise ValueError("layer_mapping cka chooses the layers of one teacher; give each of several its layers.")
        check_apart(student, self._teachers[0])
        return self._choose(student, self._teachers[0])

    def _all_run(self) -> bool:
        """Whether there are teachers, and all of them as models."""
        return bool(self._teachers) and all(isinstance(own, PreTrainedModel) for own in self._teachers)

    def source_now(self, model: DistillationModel, source: TeacherSource | None) -> TeacherSource | None:
        """The source that the weights ask for as they are now: the one that there is, or one of other layers.

        Projectors learn from now on where something is aligned, and nowhere else.

        Args:
            model: of `pair`.
            source: that it has had so far.

        Raises:
            BadRequest, ValueError: as `pair`.
        """
        if self._tried == self._read_parts():
            return source
        self._train_projectors(model.target)
        running = online_teachers(source)
        if self._all_run() and len(running) == len(each_teacher(source)):
            for own in running:
                own.close()
            source, _ = pair_up(self._args, model.student, self._teachers, model.target)
        elif not self._teachers:
            pair_up(self._args, model.student, None, model.target)
        model.read(lambda: _try_out(self._args, model.student, source, model.target))
        self._tried = self._read_parts()
        return source

    def _read_parts(self) -> tuple[bool, ...]:
        """What the terms read: states, logits of the student, and those of the teacher."""
        args = self._args
        return args.aligns, args.lm_weight > 0 or args.kd_weight > 0, args.kd_weight > 0

    def _train_projectors(self, target: AlignmentTarget) -> None:
        for name, parameter in target.named_parameters():  # which are others once they are sharded
            if name in self._trained:
                parameter.requires_grad_(self._args.aligns)
