"""The tokenizers of teacher and student, and what follows where they differ."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config.alignment.teachers import other_teachers
from ...config.arguments import KavaArguments, KavaTrainingArguments
from ...config.model_arguments import ModelArguments
from ...data.formats import IGNORED
from ...data.token_alignment.pair_encoder import TeacherReading, tokenizers_agree
from ...data.token_alignment.ranges import KINDS
from ...data.token_alignment.spans import TokenSpans
from ...distillation.teachers.several import role_of
from ...models.loading import check_reads, load_config, load_tokenizer
from ...utils.console import Console
from ...utils.errors import BadRequest, Problem

FEW_ALIGNED = 0.5
"""Of fewer tokens of the student than this share, the alignment teaches little."""


_OF_LOGITS = ("mercator_weight", "kd_weight")
"""Defaults of a kind of student that were measured together, and with the same tokens."""


def load_tokenizers(arguments: KavaArguments) -> PreTrainedTokenizerBase:
    """The student's tokenizer; the teacher's own where the student has none.

    Where the two differ, a divergence that is there by default alone stands aside, as if `kd_weight` 0 were written.

    Raises:
        BadRequest: if there is none.
    """
    model = arguments.model
    teacher = load_tokenizer(model.teacher_name, "teacher", model.teacher_revision, model)
    student = teacher
    if model.student_model_name_or_path is not None:
        student = load_tokenizer(model.student_model_name_or_path, "student", model.student_revision, model)
    others = [
        load_tokenizer(own.teacher_name, role_of(number), own.teacher_revision, own)
        for number, own in enumerate(other_teachers(arguments), start=1)
    ]
    agree = all(tokenizers_agree(student, own) for own in (teacher, *others))
    if not agree and "kd_weight" in arguments.by_kind and not model.is_cut:
        for name in _OF_LOGITS:
            if name in arguments.by_kind:
                setattr(arguments.training, name, getattr(KavaTrainingArguments, name))
    return student


def weights_that_stand(arguments: KavaArguments) -> dict[str, float]:
    """What stands in the place of defaults of a kind of student where tokenizers differ; nothing where nothing does."""
    names = _OF_LOGITS if "kd_weight" in arguments.by_kind and not arguments.model.is_cut else ()
    return {name: getattr(arguments.training, name) for name in names if name in arguments.by_kind}


def teacher_reading(arguments: KavaArguments, student: PreTrainedTokenizerBase) -> TeacherReading | None:
    """How the teacher, of several the first one, reads the text; None where its tokens are the student's.

    Args:
        arguments: of the run.
        student: its tokenizer, of `load_tokenizers`.

    Raises:
        BadRequest: if the teacher's tokenizer cannot be had, a tokenizer has no offsets, or a term is asked for that
            other tokens do not allow.
    """
    if arguments.model.student_model_name_or_path is None:
        return None
    return _reading(arguments, arguments.model, student, "teacher")


def teacher_readings(arguments: KavaArguments, student: PreTrainedTokenizerBase) -> dict[int, TeacherReading]:
    """How each teacher whose tokens are others reads the text, by its number from 0. As `teacher_reading`."""
    found = {0: teacher_reading(arguments, student)}
    for number, model in enumerate(other_teachers(arguments), start=1):
        found[number] = _reading(arguments, model, student, role_of(number))
    readings = {number: own for number, own in found.items() if own is not None}
    training = arguments.training
    if readings and training.teachers and training.teacher_routing != "fixed" and training.kd_weight > 0:
        raise BadRequest(
            f"teacher_routing is {training.teacher_routing} and kd_weight above 0, but the tokens of "
            f"{' and '.join(map(role_of, readings))} are not the student's, so nobody knows how far their next tokens "
            "agree with its own;",
            "write teacher_routing fixed, or kd_weight 0.",
        )
    return readings


def _reading(
    arguments: KavaArguments, model: ModelArguments, student: PreTrainedTokenizerBase, role: str
) -> TeacherReading | None:
    teacher = load_tokenizer(model.teacher_name, role, model.teacher_revision, model)
    if tokenizers_agree(student, teacher):
        return None
    _check_terms(arguments, role)
    for name, tokenizer in (("student", student), (role, teacher)):
        TokenSpans(tokenizer, name)
    config = load_config(model.teacher_name, role, model.teacher_revision, model)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return TeacherReading(teacher, limit, arguments.data.is_causal)


def check_role_reads(
    model: PreTrainedModel,
    role: str,
    student: PreTrainedTokenizerBase,
    max_length: int,
    reading: TeacherReading | None,
) -> None:
    """Make sure that a model reads every token, and examples of the longest length. Raises `BadRequest` if not.

    Args:
        model: the teacher or the student.
        role: which of them.
        student: its tokenizer.
        max_length: longest example in its tokens.
        reading: of a teacher whose tokens are others; as long as it reads at most.
    """
    if reading is not None:
        check_reads(model, role, reading.tokenizer, 0)
    else:
        check_reads(model, role, student, max_length)


def _check_terms(arguments: KavaArguments, role: str) -> None:
    """Raise `BadRequest` for what is not to be had where a teacher, named by its role, reads other tokens."""
    training = arguments.training
    if arguments.model.is_cut and role == role_of(0):
        raise BadRequest(
            "student_init is teacher_layers, which takes the teacher's embeddings over, but the tokenizer of "
            f"{arguments.model.student_model_name_or_path} has other tokens;",
            "write student_init random, or leave student_model_name_or_path out.",
        )
    if training.aligns and training.alignment_target != "hidden":
        raise BadRequest(
            f"alignment_target is {training.alignment_target}, but the tokenizers of {role} and student differ, and "
            "only hidden states are aligned by their text;",
            "write alignment_target hidden, or name a student of the teacher's family.",
        )
    if training.aligns and training.layer_mapping == "cka":
        raise BadRequest(
            f"layer_mapping is cka, which compares the layers token by token, but the tokenizers of {role} and student "
            "differ;",
            "write last, uniform:2 or pairs of layers.",
        )
    if training.on_policy_fraction > 0:
        raise BadRequest(
            f"on_policy_fraction is {training.on_policy_fraction:g}, but the tokenizers of {role} and student differ, "
            "and the teacher cannot read what the student writes;",
            "write on_policy_fraction 0, or name a student of the teacher's family.",
        )


def check_teacher_answers(held_out: Dataset | None, reading: TeacherReading | None) -> None:
    """Make sure that the teacher reads every held-out prompt, and some answer behind one. Raises `BadRequest` if not.

    Args:
        held_out: examples.
        reading: of the teacher, where its tokens are others.
    """
    if reading is None or held_out is None:
        return
    longest = max(held_out["teacher_prompt_length"])
    if reading.max_length is not None and longest >= reading.max_length:
        raise BadRequest(
            f"The teacher reads {reading.max_length} tokens at most, and in these a held-out prompt takes {longest};",
            "choose data with shorter prompts, or a teacher that reads more.",
        )
    if all(label == IGNORED for labels in held_out["teacher_labels"] for label in labels[1:]):
        raise BadRequest(
            f"The teacher reads {reading.max_length} tokens at most, and in its tokens all held-out answers are behind "
            "these;",
            "choose data with shorter prompts, or a teacher that reads more.",
        )


def alignment_shares(counts: list[int]) -> dict[str, float]:
    """The shares of the student's tokens that are aligned in each of the `KINDS`, and of how many `tokens`."""
    total = sum(counts)
    return {**{kind: own / max(total, 1) for kind, own in zip(KINDS, counts, strict=True)}, "tokens": total}


def describe_shares(shares: dict[str, float]) -> str:
    """The shares of `alignment_shares` as a clause."""
    one, merged, left = (f"{100 * shares[kind]:.1f} %" for kind in KINDS)
    return f"of {shares['tokens']} tokens of the student {one} are aligned one to one, {merged} merged, {left} left out"


def few_aligned(shares: dict[str, float], causal: bool = False) -> Problem | None:
    """A warning where fewer than half of the student's tokens are aligned with any of the teacher's; else None."""
    aligned = 1 - shares["left_out"]
    if aligned >= FEW_ALIGNED:
        return None
    if causal:
        return Problem(
            "token_alignment",
            f"Only {100 * aligned:.1f} % of the student's tokens are aligned; of causal ones those that end inside a "
            "token of the teacher's are left out.",
            "That is as it should be where the student's tokens are so much finer; else look at both chat templates.",
        )
    return Problem(
        None,
        f"Only {100 * aligned:.1f} % of the student's tokens have text that the teacher reads too, so the alignment "
        "teaches little.",
        "Look at both chat templates, or name a teacher that reads all of the text.",
    )


def tell_tokenizers(
    console: Console,
    counts: Mapping[int, list[int]],
    weights: Mapping[str, float] | None = None,
    causal: bool = False,
) -> dict[int, dict[str, float]]:
    """Say how the tokens of each teacher and the student belong together.

    Args:
        console: prints.
        counts: of `count_kinds`, by the number of the teacher; of those whose tokens are others.
        weights: of `weights_that_stand`.
        causal: whether `token_alignment` is.

    Returns:
        The shares of each of these teachers.
    """
    shares = {number: alignment_shares(own) for number, own in sorted(counts.items())}
    if shares and weights:
        told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        console.print(
            f"No divergence was measured between next tokens of two tokenizers, so the defaults here are {told}"
        )
    for number, own in shares.items():
        role = role_of(number)
        console.print(f"The tokenizers of {role} and student differ; by their text, {describe_shares(own)}.")
        if problem := few_aligned(own, causal):
            console.warn(str(problem))
    return shares
