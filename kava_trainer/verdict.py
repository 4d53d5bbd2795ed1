"""Whether a run succeeded, and why, in plain sentences, from the figures of its summary."""

from typing import Any

from .alignment import STATUSES

REQUIRED_COS_SIM = STATUSES[0][0]
"""CosSim of a successful run; the lower edge of the best status."""

CONTROL_FAILED = "control_failed"
"""Kind of problem: the control broke off. It says nothing about the run itself."""

_UNSTABLE = {"nan"}
"""Kinds of problems that say something about the student; the others cost time or a file."""

TIE = 0.02
"""Cross-entropies that differ by a smaller share count as equal."""


def judge(summary: dict[str, Any], collapse: str | None, supervised: bool, broken: list[str]) -> dict[str, Any]:
    """The verdict on a run that ended.

    Success needs a CosSim of at least 0.95 without collapse, a language head that some term supervised, no problem
    during training, whole checkpoints, and an answer perplexity no higher than before.

    Args:
        summary: the content of `run_summary.json`, final figures and evaluation filled in.
        collapse: why the alignment counts as collapsed; None if it does not.
        supervised: whether a term trained the student's next-token predictions.
        broken: checkpoints that are not whole.

    Returns:
        `success` (None where the run measured too little to tell), `collapsed` and `reasons`.
    """
    cos_sim, evaluation = summary["final"]["cos_sim"], summary["evaluation"]
    measured = summary["final"]["margin"] is not None and evaluation["student_after"] is not None
    failures = _alignment_failures(cos_sim, collapse) + _training_failures(summary, supervised, broken)
    failures += _perplexity_failures(evaluation)
    reasons = failures or (_achievements(summary) if measured else [])
    if not measured:
        reasons = [*reasons, _missing(cos_sim, evaluation)]
    return {
        "success": False if failures else (True if measured else None),
        "collapsed": None if summary["final"]["margin"] is None else collapse is not None,
        "reasons": [*reasons, *_comparison(summary)],
    }


def _missing(cos_sim: float | None, evaluation: dict[str, Any]) -> str:
    if evaluation["student_after"] is None:
        return "There were no held-out examples, so the student was not measured."
    if cos_sim is None:
        return "No hidden states were aligned, so there is no CosSim to judge the run by."
    return "There was no probe, so CosSim may mean nothing."


def _alignment_failures(cos_sim: float | None, collapse: str | None) -> list[str]:
    if collapse is not None:
        return [f"The alignment collapsed, so CosSim means nothing. {collapse}"]
    if cos_sim is not None and not cos_sim >= REQUIRED_COS_SIM:  # so that NaN is no success either
        return [f"CosSim is {cos_sim:.4f}, below {REQUIRED_COS_SIM}."]
    return []


def _training_failures(summary: dict[str, Any], supervised: bool, broken: list[str]) -> list[str]:
    found = []
    if not supervised:
        found.append(
            "The student's language head was never supervised: lm_weight and kd_weight are 0, so nothing taught it "
            "to answer."
        )
    kinds = sorted({problem["kind"] for problem in summary["problems"]} & _UNSTABLE)
    if kinds:
        found.append(f"Training was not stable: {', '.join(kinds)} (see problems).")
    if broken:
        found.append(f"These checkpoints are not whole: {', '.join(broken)}.")
    return found


def _perplexity_failures(evaluation: dict[str, Any]) -> list[str]:
    before, after = evaluation["student_before"], evaluation["student_after"]
    if before is None or after is None or after["cross_entropy"] <= before["cross_entropy"]:
        return []
    return [f"The student's answer perplexity rose from {before['perplexity']:.4g} to {after['perplexity']:.4g}."]


def _achievements(summary: dict[str, Any]) -> list[str]:
    final, evaluation = summary["final"], summary["evaluation"]
    found = [
        f"CosSim on held-out examples is {final['cos_sim']:.4f}, and on the probe it is {final['margin']:.2f} above "
        "that with other tokens' targets."
    ]
    if evaluation["student_before"] is not None:
        before, after = (evaluation[name]["perplexity"] for name in ("student_before", "student_after"))
        found.append(f"The student's answer perplexity went from {before:.4g} to {after:.4g}.")
    return found


def _comparison(summary: dict[str, Any]) -> list[str]:
    """What the control shows; nothing where none was asked for."""
    if any(problem["kind"] == CONTROL_FAILED for problem in summary["problems"]):
        return ["The control broke off, so there is nothing to compare with."]
    control, after = summary["evaluation"]["control_sft"], summary["evaluation"]["student_after"]
    if control is None or after is None:
        return []
    ratio = after["cross_entropy"] / max(control["cross_entropy"], 1e-12)
    figures = f"{after['cross_entropy']:.4f} against {control['cross_entropy']:.4f} nats"
    if abs(ratio - 1) < TIE:
        found = f"KAVA did not beat the control at equal steps: both have the same answer cross-entropy ({figures})"
    else:
        word = "beat" if ratio < 1 else "did not beat"
        found = (
            f"KAVA {word} the control at equal steps: its answer cross-entropy is {ratio:.2f} times the control's "
            f"({figures})"
        )
    if after["exact_match"] is not None and control["exact_match"] is not None:
        points = 100 * (after["exact_match"] - control["exact_match"])
        found += f", its exact match {abs(points):.1f} points {'higher' if points >= 0 else 'lower'}"
    return [f"{found}. One pair of runs shows large differences only."]
