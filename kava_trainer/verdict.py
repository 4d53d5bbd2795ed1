"""Whether a run succeeded, and why, in plain sentences, from the figures of its summary."""

from typing import Any

from .alignment import STATUSES

REQUIRED_COS_SIM = STATUSES[0][0]
"""CosSim of a successful run; the lower edge of the best status."""


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
    measured = cos_sim is not None and evaluation["student_after"] is not None
    failures = _alignment_failures(cos_sim, collapse) + _training_failures(summary, supervised, broken)
    failures += _perplexity_failures(evaluation)
    reasons = failures or (_achievements(summary) if measured else [])
    if not measured:
        reasons = [*reasons, _missing(cos_sim)]
    return {
        "success": False if failures else (True if measured else None),
        "collapsed": None if summary["final"]["margin"] is None else collapse is not None,
        "reasons": [*reasons, *_comparison(evaluation)],
    }


def _missing(cos_sim: float | None) -> str:
    if cos_sim is None:
        return "No hidden states were aligned, so there is no CosSim to judge the run by."
    return "There were no held-out examples, so the student was not measured."


def _alignment_failures(cos_sim: float | None, collapse: str | None) -> list[str]:
    if collapse is not None:
        return [f"The alignment collapsed, so CosSim means nothing. {collapse}"]
    if cos_sim is not None and cos_sim < REQUIRED_COS_SIM:
        return [f"CosSim is {cos_sim:.4f}, below {REQUIRED_COS_SIM}."]
    return []


def _training_failures(summary: dict[str, Any], supervised: bool, broken: list[str]) -> list[str]:
    found = []
    if not supervised:
        found.append(
            "The student's language head was never supervised: lm_weight and kd_weight are 0, so nothing taught it "
            "to answer."
        )
    kinds = sorted({problem["kind"] for problem in summary["problems"]})
    if kinds:
        found.append(f"Training was not stable: {', '.join(kinds)} (see problems).")
    if broken:
        found.append(f"These checkpoints are not whole: {', '.join(broken)}.")
    return found


def _perplexity_failures(evaluation: dict[str, Any]) -> list[str]:
    before, after = evaluation["student_before"], evaluation["student_after"]
    if before is None or after is None or after["perplexity"] <= before["perplexity"]:
        return []
    return [f"The student's answer perplexity rose from {before['perplexity']:.4g} to {after['perplexity']:.4g}."]


def _achievements(summary: dict[str, Any]) -> list[str]:
    final, evaluation = summary["final"], summary["evaluation"]
    margin = f", {final['margin']:.2f} above that of shuffled tokens" if final["margin"] is not None else ""
    found = [f"CosSim on held-out examples is {final['cos_sim']:.4f}{margin}."]
    if evaluation["student_before"] is not None:
        before, after = (evaluation[name]["perplexity"] for name in ("student_before", "student_after"))
        found.append(f"The student's answer perplexity went from {before:.4g} to {after:.4g}.")
    return found


def _comparison(evaluation: dict[str, Any]) -> list[str]:
    """What the control shows; nothing where none ran."""
    control, after = evaluation["control_sft"], evaluation["student_after"]
    if control is None or after is None:
        return []
    figures = f"({after['cross_entropy']:.4f} against {control['cross_entropy']:.4f} nats)"
    ratio = after["cross_entropy"] / max(control["cross_entropy"], 1e-12)
    if ratio < 1:
        sentence = f"KAVA beat the control at equal steps: its answer cross-entropy is {ratio:.2f} times the control's"
    else:
        sentence = f"KAVA did not beat the control: its answer cross-entropy is {ratio:.2f} times the control's"
    if after["exact_match"] is None or control["exact_match"] is None:
        return [f"{sentence} {figures}."]
    points = 100 * (after["exact_match"] - control["exact_match"])
    return [f"{sentence} {figures}, its exact match {abs(points):.1f} points {'higher' if points >= 0 else 'lower'}."]
