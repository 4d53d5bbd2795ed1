"""Whether a run succeeded, and why, in plain sentences, from the figures of its summary."""

import math
from typing import cast

from ..evaluation.diagnostics import STATUSES
from ..utils.console import apart, fixed, significant
from .findings.alignment import Measured, below_start
from .findings.language import TIE, judge_language
from .next_steps import next_steps
from .summary import Evaluations, ModelFigures, Summary, Verdict

REQUIRED_COS_SIM = STATUSES[0][0]
"""CosSim of a successful run; the lower edge of the best status."""

CONTROL_FAILED = "control_failed"
"""Kind of problem: the control broke off. It says nothing about the run itself."""

_UNSTABLE = {"nan"}
"""Kinds of problems that say something about the student; the others cost time or a file."""

TEACHER_AT_CHANCE = "teacher_at_chance"
"""Kind of problem: the teacher knows no more about the answers than chance."""

FEW_EXAMPLES = 50
"""With fewer held-out examples the figures tell little: at 50 an exact match near one half has a standard error of 7
points."""


def few_examples(count: int | None) -> str | None:
    """The sentence for too few held-out examples; None where there are enough, or none at all."""
    if not count or count >= FEW_EXAMPLES:
        return None
    held_out = "Only 1 example is held out" if count == 1 else f"Only {count} examples are held out"
    error = 100 * math.sqrt(0.25 / count)
    return (
        f"{held_out}, fewer than {FEW_EXAMPLES}, so the figures tell little: an exact match near one half has a "
        f"standard error of {error:.0f} points."
    )


def judge(
    summary: Summary,
    collapse: str | None,
    supervised: bool,
    broken: list[str],
    examples: int | None = None,
    taught: bool = True,
) -> Verdict:
    """The verdict on a run that ended.

    Success needs a CosSim of at least 0.95 without collapse, a language head that some term supervised, no problem
    during training, whole checkpoints, an answer perplexity no higher than before, and a teacher better than chance
    where the run learned from it. Few held-out examples, and a teacher without a single exact match, are named and take
    no success away, nor do an alignment that ended below its start and language that was lost. The sentences on the
    former, and those on the control, are also apart from the others.

    Args:
        summary: of the run, final figures and evaluation filled in.
        collapse: why the alignment counts as collapsed; None if it does not.
        supervised: whether a term trained the student's next-token predictions.
        broken: checkpoints that are not whole.
        examples: how many were held out; None where that is not known.
        taught: whether a term read the teacher.
    """
    cos_sim, margin, evaluation = summary.final.cos_sim, summary.final.margin, summary.evaluation
    measured = margin is not None and evaluation.student_after is not None
    failures = _alignment_failures(summary, collapse) + _training_failures(summary, supervised, broken)
    failures += _perplexity_failures(evaluation)
    if taught and any(problem["kind"] == TEACHER_AT_CHANCE for problem in summary.problems):
        failures.append("The teacher was no better than chance on the answers, so there was nothing to learn from it.")
    reasons = failures or (_achievements(summary) if measured else [])
    if not measured:
        reasons = [*reasons, _missing(cos_sim, evaluation, examples)]
    language = judge_language(summary, _beat_the_control(evaluation))
    reasons = [*reasons, *filter(None, [below_start(summary.alignment)]), *language.why]
    notes = [few_examples(examples), _teacher_without_match(evaluation) if taught else None, _other_tokens(summary)]
    caveats = [*filter(None, notes), *language.caveats]
    control = [*_comparison(summary), *language.control]
    found = Verdict(
        success=False if failures else (True if measured else None),
        collapsed=None if margin is None else collapse is not None,
        reasons=[*reasons, *caveats, *control],
        caveats=caveats,
        control=control,
    )
    wanted = None if few_examples(examples) is None else FEW_EXAMPLES
    found.next_steps = next_steps(summary, found, supervised, bool(broken), taught, wanted)
    return found


def _teacher_without_match(evaluation: Evaluations) -> str | None:
    """The sentence for a teacher that answered no held-out problem as the data does; None for any other."""
    if evaluation.teacher is None or evaluation.teacher.exact_match != 0:
        return None
    return (
        "The teacher's own answers matched none of the held-out ones, so exact match does not tell what the student "
        "learned from it: its answers may be wrong, or only written in another form than those of the data."
    )


def _other_tokens(summary: Summary) -> str | None:
    """The sentence for a teacher whose figures are of other tokens than the student's; None where they are not."""
    if summary.token_alignment is None or summary.evaluation.teacher is None:
        return None
    return (
        "Teacher and student were each measured in their own tokens, so neither their perplexities nor their "
        "cross-entropies can be compared; those of the control can."
    )


def _missing(cos_sim: Measured, evaluation: Evaluations, examples: int | None) -> str:
    if evaluation.student_after is None and examples:
        return "What the student's answers are worth was not measured."
    if evaluation.student_after is None:
        return "There were no held-out examples, so the student was not measured."
    if cos_sim is None:
        return "No hidden states were aligned, so there is no CosSim to judge the run by."
    return "There was no probe, so CosSim may mean nothing."


def _alignment_failures(summary: Summary, collapse: str | None) -> list[str]:
    cos_sim, pairs = summary.final.cos_sim, summary.final.pairs or []
    if collapse is not None and any(pair.collapsed is False for pair in pairs):
        return [f"The alignment collapsed in part, so its mean CosSim means little. {collapse}"]
    if collapse is not None:
        return [f"The alignment collapsed, so CosSim means nothing. {collapse}"]
    if cos_sim is not None and not cos_sim >= REQUIRED_COS_SIM:  # so that NaN is no success either
        return [f"CosSim is {apart(cos_sim, REQUIRED_COS_SIM, 4, fixed)[0]}, below {REQUIRED_COS_SIM}."]
    return []


def _training_failures(summary: Summary, supervised: bool, broken: list[str]) -> list[str]:
    found = []
    if not supervised:
        alone = summary.arguments.get("on_policy_fraction") == 1
        zero = "kd_weight is 0 and all answers were its own" if alone else "lm_weight and kd_weight are 0"
        found.append(f"The student's language head was never supervised: {zero}, so nothing taught it to answer.")
    kinds = sorted({problem["kind"] for problem in summary.problems} & _UNSTABLE)
    if kinds:
        found.append(f"Training was not stable: {', '.join(kinds)} (see problems).")
    if broken:
        found.append(f"These checkpoints are not whole: {', '.join(broken)}.")
    return found


def _perplexity_failures(evaluation: Evaluations) -> list[str]:
    before, after = evaluation.student_before, evaluation.student_after
    if before is None or after is None or _cross_entropy(after) <= _cross_entropy(before):
        return []
    return [f"The student's answer {_change('rose', before, after)}."]


def _achievements(summary: Summary) -> list[str]:
    final, before, after = summary.final, summary.evaluation.student_before, summary.evaluation.student_after
    found = [
        f"CosSim on held-out examples is {final.cos_sim:.4f}, and on the probe it is {final.margin:.2f} above "
        "that with other tokens' targets."
    ]
    if before is not None and after is not None:
        found.append(f"The student's answer {_change('went', before, after)}.")
    return found


def _change(verb: str, before: ModelFigures, after: ModelFigures) -> str:
    """From which perplexity to which; from which cross-entropy where the perplexities do not tell the two apart."""
    figures = (before.perplexity, after.perplexity)
    losses = (_cross_entropy(before), _cross_entropy(after))
    if losses[0] == losses[1]:
        return f"perplexity stayed at {significant(cast(float, before.perplexity), 4)}"
    if None in figures or figures[0] == figures[1]:  # both beyond the largest float, or rounded to one
        first, last = apart(*losses, 4, fixed)
        return f"cross-entropy {verb} from {first} to {last} nats"
    first, last = apart(*cast(tuple[float, float], figures), 4)
    return f"perplexity {verb} from {first} to {last}"


def _comparison(summary: Summary) -> list[str]:
    """What the control shows; nothing where none was asked for."""
    if any(problem["kind"] == CONTROL_FAILED for problem in summary.problems):
        return ["The control broke off, so there is nothing to compare with."]
    control, after = summary.evaluation.control_sft, summary.evaluation.student_after
    if control is None or after is None:
        return []
    ours, theirs = _cross_entropy(after), _cross_entropy(control)
    ratio = _ratio(ours, theirs)
    shown = apart(ours, theirs, 4, fixed)
    word = "beat" if ratio <= 1 - TIE else "did not beat"
    found = (
        f"KAVA {word} the control at equal steps: its answer cross-entropy is {_times(ratio)} the control's "
        f"({shown[0]} against {shown[1]} nats)"
    )
    if abs(ratio - 1) < TIE:
        found += f", and a difference under {100 * TIE:.0f} % counts as none"
    seconds = _seconds_beside_the_control(summary)
    return [f"{found}{_matches(after, control)}.{seconds} One pair of runs shows large differences only."]


def _seconds_beside_the_control(summary: Summary) -> str:
    """How long the training took beside the control's, as a sentence that goes on, where the student wrote answers."""
    ours, theirs = summary.throughput.train_seconds, summary.throughput.control_train_seconds
    if ours is None or not theirs:
        return ""
    shown = apart(ours, theirs, 0, fixed)
    return f" Its steps took {ours / theirs:,.1f} times as long as the control's ({shown[0]} against {shown[1]} s)."


def _ratio(ours: float, theirs: float) -> float:
    return 1.0 if ours == theirs else ours / max(theirs, 1e-12)


def _beat_the_control(evaluation: Evaluations) -> bool:
    control, after = evaluation.control_sft, evaluation.student_after
    if control is None or after is None:
        return False
    return _ratio(_cross_entropy(after), _cross_entropy(control)) <= 1 - TIE


def _cross_entropy(figures: ModelFigures) -> float:
    """The answer cross-entropy of a model that this run has measured: only a summary read back may lack it."""
    assert figures.cross_entropy is not None
    return figures.cross_entropy


def _times(ratio: float) -> str:
    """How one cross-entropy stands to another, as the words before the other."""
    if abs(ratio - 1) >= TIE:
        return f"{significant(ratio, 2) if 0 < ratio < 0.095 else f'{ratio:,.2f}'} times"
    if ratio == 1:
        return "equal to"
    return f"{apart(100 * abs(ratio - 1), 0, 1, fixed)[0]} % {'below' if ratio < 1 else 'above'}"


def _matches(after: ModelFigures, control: ModelFigures) -> str:
    """How the exact matches compare, as words that go on; nothing where they were not measured."""
    ours, theirs = after.exact_match, control.exact_match
    if ours is None or theirs is None:
        return ""
    if ours == theirs:
        return f"; both have {100 * ours:.1f} % exact match"
    points = apart(100 * abs(ours - theirs), 0, 1, fixed)[0]
    return f", its exact match {points} points {'higher' if ours > theirs else 'lower'}"
