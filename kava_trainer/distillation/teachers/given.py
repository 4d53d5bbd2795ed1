"""What a `KavaTrainer` is given, checked before anything is made of it."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ...config.arguments import KavaTrainingArguments
from ...data.collators import DistillationCollator, check_rows
from ...data.token_alignment.pair_encoder import of_other_tokens, tokenizers_given
from ...data.token_alignment.ranges import of_teacher, readers
from ...models.teacher import TeacherSource
from ..teacher_cache import CachedTeacher, is_released
from .several import each_teacher

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
    check_tokenizers(args, options, _count(others[0]))
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


def _count(teacher: Any) -> int:
    return len(teacher) if isinstance(teacher, list | tuple) else len(each_teacher(teacher))


def check_tokenizers(args: KavaTrainingArguments, options: dict[str, Any], teachers: int) -> None:
    """Raise `ValueError` for examples without what a teacher of other tokens reads, or what does not go with them.

    Args:
        args: of the training.
        options: hold the data sets and the tokenizers.
        teachers: how many there are; 0 where no term reads any.
    """
    tokenizers = options.get("teacher_tokenizer")
    count = len(tokenizers_given(tokenizers))
    if tokenizers is not None and teachers and count != teachers:
        raise ValueError(
            f"teacher_tokenizer is {count} for {teachers} teachers; give a list with one for each, here and to encode."
        )
    own = options.get("processing_class")
    differing = {} if own is None else of_other_tokens(own, tokenizers)
    evaluated = options.get("eval_dataset")
    given = {"train_dataset": options.get("train_dataset")}
    given |= evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}
    for name, dataset in given.items():
        columns = getattr(dataset, "column_names", None)
        if not columns:
            continue
        lacking = [f"{of_teacher(number)}ranges" for number in differing]
        if lacking := [column for column in lacking if column not in columns]:
            raise ValueError(
                f"{name} has no {lacking[0]}, but teacher_tokenizer has other tokens than processing_class; make it "
                "with kava_trainer.encode(dataset, tokenizer, teacher_tokenizer=...)."
            )
        found = [f"{of_teacher(number)}ranges" for number in readers(dict.fromkeys(columns))]
        if found and (refused := _refused_of_two(args)):
            raise ValueError(f"{name} holds {found[0]}, for a teacher of another tokenizer, which {refused}.")
    if differing and (refused := _refused_of_two(args)):
        raise ValueError(f"teacher_tokenizer has other tokens than processing_class, which {refused}.")


def _refused_of_two(args: KavaTrainingArguments) -> str | None:
    """What cannot be done where the teacher reads other tokens, and what to write, as words that go on."""
    if args.aligns and args.alignment_target != "hidden":
        return f"alignment_target {args.alignment_target} does not go with; write hidden"
    if args.aligns and args.layer_mapping == "cka":
        return "layer_mapping cka does not go with; write last, uniform:2 or pairs of layers"
    if args.on_policy_fraction > 0:
        return "on_policy_fraction does not go with; write 0"
    if args.teacher_routing != "fixed" and args.kd_weight > 0:
        return f"teacher_routing {args.teacher_routing} beside kd_weight does not go with; write fixed"
    return None


def check_keeps_ranges(collator: Any, options: dict[str, Any]) -> None:
    """Raise `ValueError` for a collator of the user's own that would lose what the teacher reads of the examples."""
    if collator is None or isinstance(collator, DistillationCollator):
        return
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(options.get(name), "column_names", None) or ()
        if numbers := readers(dict.fromkeys(columns)):
            raise ValueError(
                f"{name} holds {of_teacher(numbers[0])}ranges, because the teacher reads other tokens, which "
                "DistillationCollator alone passes on; leave data_collator out."
            )


def check_cache(args: KavaTrainingArguments, teacher: TeacherSource, collator: Any) -> DistillationCollator:
    """The collator of a training whose teacher's states come from a cache.

    Args:
        args: of the training.
        teacher: reads them.
        collator: only KAVA's puts the states into the batches.

    Raises:
        ValueError: if the collator is another one, the student writes all that is learned itself, or the teacher cannot
            read what it writes.
    """
    if args.samples and not isinstance(teacher, CachedTeacher):
        raise ValueError("on_policy_fraction is above 0, which a cache of several teachers does not go with; set it 0.")
    released = isinstance(teacher, CachedTeacher) and is_released(teacher.model)
    if args.samples and (args.on_policy_fraction == 1 or released):
        raise ValueError(
            "A cached teacher has no states of the student's own answers; leave the teacher its weights, and set "
            "on_policy_fraction below 1."
        )
    if not isinstance(collator, DistillationCollator):
        raise ValueError("A cached teacher needs DistillationCollator as data_collator: it reads the states.")
    return collator
