"""What to try after a run, by what its verdict rests on; `docs/troubleshooting.md` has the measurements behind it."""

from collections.abc import Iterator
from typing import Any

from ..config.checks import heaviest_alignment, is_projected
from ..evaluation.diagnostics import STATUSES, Circumstances, collapse_remedy, is_early, too_early
from .findings.alignment import below_start, worst_first
from .findings.language import Language
from .summary import Summary, Verdict

WITHOUT_CONTROL = "Set run_control to true: only a student trained without the teacher tells whether it helped."

NOTHING_HELD_OUT = "Name a dataset_test_split, or data with more rows, so that something is held out to measure on."

FROM_RANDOM = (
    "Train longer (max_steps or num_train_epochs, with warmup_steps that leave most of them): a few steps from random "
    "weights tell little."
)

_ON_ALL_TOKENS = "the teacher's predictions of every token hold the language that the answers alone do not."

IN_A_SCRIPT = {
    WITHOUT_CONTROL: (
        "Train a second student from the same start with kd_weight and all weights of the alignment 0: only one "
        "without the teacher tells whether it helped."
    ),
    NOTHING_HELD_OUT: "Give the trainer an eval_dataset, so that something is held out to measure on.",
}
"""What to write in a script, which has no arguments of the command line, in place of a sentence."""


def next_steps(
    summary: Summary, verdict: Verdict, supervised: bool, broken: bool, taught: bool, wanted: int | None = None
) -> list[str]:
    """What to change or to do next, as sentences; the most pressing first.

    Args:
        summary: of the run, its figures filled in.
        verdict: on it; whether it succeeded and whether the alignment collapsed.
        supervised: whether a term trained the student's next-token predictions.
        broken: whether a checkpoint is not whole.
        taught: whether a term read the teacher.
        wanted: how many held-out examples would tell something, where there are fewer.
    """
    found = [
        *_against_failures(summary, verdict, supervised, broken),
        *_towards_language(summary),
        *_towards_evidence(summary, taught, wanted),
    ]
    if any(step.startswith(too_early(summary.global_step)) for step in found):
        found = [step for step in found if step != FROM_RANDOM]  # which says the same
    if not found and verdict.success and taught:
        found.append("Do it again with other seeds, to see how much of the difference is chance.")
    return list(dict.fromkeys(found))


def _against_failures(summary: Summary, verdict: Verdict, supervised: bool, broken: bool) -> Iterator[str]:
    asked, kinds = summary.arguments, {problem["kind"] for problem in summary.problems}
    if "teacher_at_chance" in kinds:
        yield "Look at the teacher's weights, its tokenizer and the data: it should know more than chance."
    if verdict.collapsed:
        yield _after_a_collapse(summary, supervised)
    elif not supervised:
        term = "kd_weight" if asked.get("on_policy_fraction") == 1 else "lm_weight"
        yield f"Set {term} to 1, so that the student learns to answer."
    if "nan" in kinds:
        precision = ", and write bf16 in place of fp16" if asked.get("fp16") else ""
        yield f"Lower {_rates(asked)}{precision}."
    if not verdict.collapsed and _is_low(summary.final.cos_sim):
        yield _towards_alignment(summary)
    before, after = summary.evaluation.student_before, summary.evaluation.student_after
    if before and after and _more(after.cross_entropy, before.cross_entropy):
        weight = heaviest_alignment(asked)
        heavy = f" or {weight}" if asked.get(weight) != 0 else ""
        yield f"Lower learning_rate{heavy}: the student forgot more than it learned."
    if broken:
        yield "Delete the checkpoints that are not whole; nothing can be resumed from them."


def _after_a_collapse(summary: Summary, supervised: bool) -> str:
    asked, start, final = summary.arguments, summary.alignment.start, summary.final
    collapsed = worst_first(pair for pair in final.pairs or [] if pair.collapsed)
    return collapse_remedy(
        Circumstances(
            direction=asked.get("projector_direction") if is_projected(asked) else "none",
            anchor=asked.get("projector_anchor"),
            supervised=supervised,
            step=summary.global_step,
            whole_before=start is not None and start.collapsed is False,
            cos_sim=collapsed[0].cos_sim if collapsed else final.cos_sim,
            weight=heaviest_alignment(asked),
        )
    )


def _rates(asked: dict[str, Any]) -> str:
    """The learning rates that there are."""
    known = {"mercator_weight": 1.0, **asked}  # a record that does not tell is of a run that aligns
    return "learning_rate and projector_learning_rate" if is_projected(known) else "learning_rate"


def _towards_alignment(summary: Summary) -> str:
    """What to do about a low CosSim that is no collapse."""
    if is_early(summary.global_step):
        return (
            f"{too_early(summary.global_step)}: train longer (max_steps or num_train_epochs, into another output_dir)."
        )
    if below_start(summary.alignment) is not None:
        rates = _rates(summary.arguments)
        return f"The training undid the start of the alignment: lower {rates}, or raise warmup_steps."
    return (
        "If CosSim was still rising at the end, train longer (max_steps or num_train_epochs, into another "
        f"output_dir); if it was flat, raise {heaviest_alignment(summary.arguments)} or align other layers "
        "(layer_mapping)."
    )


def _towards_language(summary: Summary) -> Iterator[str]:
    """What keeps the teacher's language, where much of it was lost."""
    if not Language.of(summary).is_lost:
        return
    if not summary.arguments.get("kd_weight"):
        yield f"Set kd_weight to 1 with kd_tokens all: {_ON_ALL_TOKENS}"
    elif summary.arguments.get("kd_tokens", "answers") != "all":
        yield f"Write kd_tokens all: {_ON_ALL_TOKENS}"
    elif Language.of(summary).was_forgotten:
        yield "Raise kd_weight, or lower learning_rate: the student lost language that it had."


def _is_low(cos_sim: int | float | None) -> bool:
    return cos_sim is not None and not cos_sim >= STATUSES[0][0]


def _more(value: int | float | None, than: int | float | None) -> bool:
    return value is not None and than is not None and value > than


def _towards_evidence(summary: Summary, taught: bool, wanted: int | None) -> Iterator[str]:
    """What would make the figures tell more."""
    control, after = summary.evaluation.control_sft, summary.evaluation.student_after
    if after is None:
        yield NOTHING_HELD_OUT
        return
    if wanted is not None:
        yield (
            f"Hold out {wanted} examples or more: in a test file of your own, out of more rows, or with a larger "
            "max_eval_samples where that is what limits them."
        )
    if not taught:
        return
    if control is None:
        yield WITHOUT_CONTROL
    elif not _more(control.cross_entropy, after.cross_entropy):
        yield _without_gain(summary)


def _without_gain(summary: Summary) -> str:
    """What to do where the control's answers are as good."""
    init = summary.arguments.get("student_init")
    if init == "random":
        return FROM_RANDOM
    if is_early(summary.global_step):
        return f"{too_early(summary.global_step)} whether the teacher helps: train longer, with several seeds."
    if init == "teacher_layers":
        if summary.arguments.get("kd_weight") and summary.arguments.get("kd_tokens") == "all":
            return "Several seeds, and more steps, would tell how much of the difference is chance."
        return (
            "A student cut out of its teacher gains most from the teacher's predictions: set kd_weight to 1 with "
            "kd_tokens all; several seeds would tell how much of the difference is chance."
        )
    return (
        "A student that was trained before rarely gains from a teacher over the same steps of next-token loss; "
        "several seeds, or a harder task, would tell."
    )
