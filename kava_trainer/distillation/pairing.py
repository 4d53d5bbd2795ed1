"""A teacher and a student that a trainer is given as plain models: where the states come from, and what is aligned."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..config.arguments import KavaTrainingArguments
from ..config.checks import alignment_weights
from ..config.launcher import is_fsdp_asked
from ..data.collators import DistillationCollator, check_rows
from ..data.token_alignment.pair_encoder import tokenizers_agree
from ..data.token_alignment.ranges import RANGES
from ..models.attention.capture import AttentionPart, Feature, check_features
from ..models.layers import number_of_layers, train_text_alone
from ..models.lm_head import check_head
from ..models.loading import on_device
from ..models.lora import has_adapter, unwrapped
from ..models.teacher import OnlineTeacher, TeacherSource
from .loss_terms import needed_teacher_layers
from .model import DistillationModel
from .targets import AlignmentTarget, build_target, no_target

_OWN_NAMES = {"model": "student", "teacher_model": "teacher", "ref_model": "teacher", "tokenizer": "processing_class"}
"""Parameters as other trainers call them, and as they are called here."""


def check_given(
    args: Any,
    student: PreTrainedModel | None,
    model_init: Callable[..., Any] | None,
    others: Sequence[Any],
    options: dict[str, Any],
) -> None:
    """Raise `ValueError` for what a `KavaTrainer` cannot be made of.

    Args:
        args: of the training.
        student: the model, if any.
        model_init: makes one, if any.
        others: what was given as the teacher and as the target.
        options: those that Trainer gets too.
    """
    for theirs, ours in ((name, _OWN_NAMES[name]) for name in options if name in _OWN_NAMES):
        raise ValueError(f"{theirs} is called {ours} here; write KavaTrainer({ours}=...).")
    if any(isinstance(given, TrainingArguments) for given in (student, *others)):
        raise ValueError("The arguments stand in another's place; write KavaTrainer(student, teacher, args=...).")
    for name in ("train_dataset", "eval_dataset") if options.get("data_collator") is None else ():
        check_rows(name, options.get(name))  # a collator may tokenise texts itself
    check_rollouts(args, options.get("train_dataset"))
    check_keeps_ranges(options.get("data_collator"), options)
    if not isinstance(args, KavaTrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}; write KavaTrainingArguments, which takes the same.")
    check_two_tokenizers(args, options)
    if options.get("compute_loss_func") is not None:
        raise ValueError("The loss is the sum of KAVA's terms; leave compute_loss_func out and set their weights.")
    if model_init is not None and options.get("optimizers", (None, None)) != (None, None):
        raise ValueError("model_init makes a new student for every training; give optimizer_cls_and_kwargs.")
    if student is None and model_init is None:
        raise ValueError("Give a student, or model_init, a function that makes one.")
    if student is not None and model_init is not None:
        raise ValueError("Give either a student or model_init, not both.")


def check_rollouts(args: Any, dataset: Any) -> None:
    """Raise `ValueError` where `rollouts_from` asks for rollouts and a data set holds none: only runs read the file."""
    columns = getattr(dataset, "column_names", None)
    if getattr(args, "rollouts_from", None) and columns is not None and "origins" not in columns:
        raise ValueError(
            "rollouts_from is read by python -m kava_trainer train; here leave it out, and give what "
            "kava_trainer.rollout_examples(file, tokenizer) reads as train_dataset."
        )


def check_two_tokenizers(args: KavaTrainingArguments, options: dict[str, Any]) -> None:
    """Raise `ValueError` for examples without what a teacher of other tokens reads, or what does not go with them."""
    own, other = options.get("processing_class"), options.get("teacher_tokenizer")
    differ = own is not None and other is not None and not tokenizers_agree(own, other)
    evaluated = options.get("eval_dataset")
    given = {"train_dataset": options.get("train_dataset")}
    given |= evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}
    for name, dataset in given.items():
        columns = getattr(dataset, "column_names", None)
        if not columns:
            continue
        if differ and RANGES not in columns:
            raise ValueError(
                f"{name} has no {RANGES}, but teacher_tokenizer has other tokens than processing_class; make it with "
                "kava_trainer.encode(dataset, tokenizer, teacher_tokenizer=...)."
            )
        if RANGES in columns and (refused := _refused_of_two(args)):
            raise ValueError(f"{name} holds {RANGES}, for a teacher of another tokenizer, which {refused}.")


def _refused_of_two(args: KavaTrainingArguments) -> str | None:
    """What cannot be done where the teacher reads other tokens, and what to write, as words that go on."""
    if args.aligns and args.alignment_target != "hidden":
        return f"alignment_target {args.alignment_target} does not go with; write hidden"
    if args.aligns and args.layer_mapping == "cka":
        return "layer_mapping cka does not go with; write last, uniform:2 or pairs of layers"
    if args.on_policy_fraction > 0:
        return "on_policy_fraction does not go with; write 0"
    return None


def check_keeps_ranges(collator: Any, options: dict[str, Any]) -> None:
    """Raise `ValueError` for a collator of the user's own that would lose what the teacher reads of the examples."""
    if collator is None or isinstance(collator, DistillationCollator):
        return
    for name in ("train_dataset", "eval_dataset"):
        if RANGES in (getattr(options.get(name), "column_names", None) or ()):
            raise ValueError(
                f"{name} holds {RANGES}, because the teacher reads other tokens, which DistillationCollator alone "
                "passes on; leave data_collator out."
            )


def check_student(student: PreTrainedModel) -> None:
    """Raise `ValueError` for a student that cannot be trained as it is."""
    if is_fsdp_asked() and has_adapter(student):
        raise ValueError("Adapters are not supported under FSDP2; start without it.")
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
    """What the weighted terms read of the teacher, where a source gives it.

    A source of the user's own may give any hidden states; parts of attention it must name in `layers`, as
    `OnlineTeacher` does.

    Raises:
        ValueError: if the source does not give it.
    """
    needed = needed_teacher_layers(args, target, source.num_layers)
    layers = getattr(source, "layers", ())
    told = layers if isinstance(layers, list | tuple | set) else ()
    bound = [own for own in needed if isinstance(own, AttentionPart) or isinstance(source, OnlineTeacher)]
    if missing := [own for own in bound if own not in told]:
        own = missing[0]
        first = f"state {own}" if isinstance(own, int) else f"{own.part} of layer {own.layer}"
        more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
        raise ValueError(
            f"The terms read the teacher's {first}{more} but the {type(source).__name__} does not name it in its "
            "layers; give the teacher as a model."
        )
    return needed


def pair_up(
    args: KavaTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel | TeacherSource | None,
    target: AlignmentTarget | None,
    inherited: Sequence[int] | None = None,
) -> tuple[TeacherSource | None, AlignmentTarget]:
    """What a `KavaTrainer` takes the teacher's states from, and what it aligns.

    Args:
        args: say which layers are aligned, how, and which terms there are.
        student: the model to train.
        teacher: a model, which is frozen and put on the training's device, or any other source of states.
        target: what is aligned; made as the arguments ask where it is None, with a teacher, or without one where no
            term needs it.
        inherited: for a target that is made, see `layer_mapping.resolve_layer_pairs`.

    Returns:
        The source, which is None where no term reads the teacher, and the target.

    Raises:
        BadRequest: if the models do not have the layers that the arguments name.
        ValueError: if there is neither a target nor a model to make it for, or the target is of another kind than
            `args` ask for.
    """
    if target is not None and target.name != args.alignment_target and (args.aligns or _is_weighed(args, target)):
        raise ValueError(
            f"The target is a {type(target).__name__}, but alignment_target is {args.alignment_target}; write "
            f"alignment_target={target.name!r}."
        )
    teacher = unwrapped(teacher, "teacher")
    if isinstance(teacher, (str, nn.Module)):
        check_causal("teacher", teacher)
    if teacher is None and not args.reads_teacher:
        return None, no_target(student) if target is None else target
    if teacher is None:
        names = f"{', '.join(alignment_weights(vars(args)))} or kd_weight"
        raise ValueError(f"{names} is above 0; give a teacher, or set all of them to 0.")
    if not isinstance(teacher, PreTrainedModel):
        if target is None:
            raise ValueError("Give the teacher as a model, or say what is aligned: target=build_target(args, ...).")
        return teacher, target
    check_apart(student, teacher)
    target = build_target(args, student, teacher, inherited) if target is None else target
    layers = needed_teacher_layers(args, target, number_of_layers(teacher))
    if not layers:
        return None, target
    if not (
        getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None)
    ):  # it lies where it must
        on_device(teacher, args.device)
    return OnlineTeacher(teacher, layers), target


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
    if isinstance(source, OnlineTeacher):
        check_features(source.model, source.layers, "teacher")
        if args.kd_weight > 0:
            check_head(source.model, "teacher")


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
        teacher: PreTrainedModel | TeacherSource | None,
        target: AlignmentTarget | None,
        again: bool,
        inherited: Sequence[int] | None = None,
        choose: Callable[[PreTrainedModel, PreTrainedModel], list[int]] | None = None,
    ) -> None:
        self._args, self._teacher, self._again = args, unwrapped(teacher, "teacher"), again
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
            source, target = pair_up(self._args, student, self._teacher, target, inherited)
        _try_out(self._args, student, source, target)
        self._tried = self._read_parts()
        self._trained = [parameter for parameter in target.parameters() if parameter.requires_grad]
        self._train_projectors()
        if getattr(student, "is_quantized", False):
            target.to(student.device)  # Trainer moves no model that bitsandbytes has quantised
        return DistillationModel(student, target), source

    def _chosen(self, student: PreTrainedModel) -> Sequence[int] | None:
        """What `inherited` is for a target that is made."""
        wanted = self._args.layer_mapping == "cka" and self._args.aligns and self._inherited is None
        if not wanted or self._choose is None or not isinstance(self._teacher, PreTrainedModel):
            return self._inherited
        check_apart(student, self._teacher)
        return self._choose(student, self._teacher)

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
        self._train_projectors()
        teacher = self._teacher
        if isinstance(teacher, PreTrainedModel) and isinstance(source, OnlineTeacher | None):
            if source is not None:
                source.close()
            source, _ = pair_up(self._args, model.student, teacher, model.target)
        elif teacher is None:
            pair_up(self._args, model.student, None, model.target)
        _try_out(self._args, model.student, source, model.target)
        self._tried = self._read_parts()
        return source

    def _read_parts(self) -> tuple[bool, ...]:
        """What the terms read: states, logits of the student, and those of the teacher."""
        args = self._args
        return args.aligns, args.lm_weight > 0 or args.kd_weight > 0, args.kd_weight > 0

    def _train_projectors(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(self._args.aligns)
