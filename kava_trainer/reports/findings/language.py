"""What a student keeps of its teacher's language, by the cross-entropy of all three on a text that is no answer."""

from dataclasses import dataclass, field
from typing import Any

from ...utils.console import apart, fixed
from .alignment import Measured

TIE = 0.02
"""A difference between two cross-entropies counts as none below this share."""

NO_BETTER = 0.95
"""A teacher with more than this share of the nats of chance does not know the text."""

FAR_BEHIND = 0.25
"""A student this share of nats above its teacher has lost much of its language."""


@dataclass(frozen=True)
class Language:
    """The cross-entropies in nats on the text, by the names in `Evaluations`; None where they were not measured."""

    teacher: Measured
    before: Measured
    after: Measured
    control: Measured
    chance: Measured
    source: str
    learns: bool
    """Whether the student began with random weights, which have no language that could be kept."""
    same_tokens: bool = True
    """Whether teacher and student read the same tokens; else their cross-entropies cannot be compared."""

    @classmethod
    def of(cls, summary: Any) -> "Language":
        """As a `Summary` has them."""
        measured, of = summary.evaluation.measured(), summary.retention or {}
        figures = {who: model.retention_cross_entropy for who, model in measured.items()}
        return cls(
            teacher=figures.get("teacher"),
            before=figures.get("student_before"),
            after=figures.get("student_after"),
            control=figures.get("control_sft"),
            chance=of.get("chance"),
            source=of.get("source", "the text"),
            learns=summary.arguments.get("student_init") == "random",
            same_tokens=summary.token_alignment is None,
        )

    @property
    def is_foreign(self) -> bool:
        """Whether the teacher knows no more of the text than chance, so that there was nothing to keep."""
        return self.teacher is not None and self.chance is not None and not self.teacher < NO_BETTER * self.chance

    @property
    def was_forgotten(self) -> bool:
        """Whether the training cost the student language that it had."""
        return self.after is not None and self.before is not None and self.after > (1 + TIE) * self.before

    def against_control(self) -> int | None:
        """1 where the student has more of the language than the control, -1 where it has less, 0 for a tie."""
        if self.after is None or self.control is None:
            return None
        if abs(self.after - self.control) <= TIE * self.control:
            return 0
        return 1 if self.after < self.control else -1

    @property
    def is_lost(self) -> bool:
        """Whether much less of the teacher's language is there than could be."""
        if self.after is None or self.is_foreign:
            return False
        compared = self.teacher if self.same_tokens else None
        behind = compared is not None and self.after > (1 + FAR_BEHIND) * compared
        return self.was_forgotten or self.against_control() == -1 or (behind and not self.learns)


@dataclass(frozen=True)
class LanguageFindings:
    """Sentences for a verdict."""

    why: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    control: list[str] = field(default_factory=list)


def judge_language(summary: Any, won: bool = False) -> LanguageFindings:
    """What was kept of the teacher's language, in sentences; none where it was not measured.

    Args:
        summary: of the run.
        won: whether the student beat its control on the answers.
    """
    language = Language.of(summary)
    if language.after is None:
        return LanguageFindings()
    if language.is_foreign:
        known, chance = apart(language.teacher or 0.0, language.chance or 0.0, 2, fixed)
        return LanguageFindings(
            caveats=[
                f"The teacher does not know {language.source}: it has {known} nats there, where chance has {chance}, "
                "so nothing tells what was kept of its language. Name a retention_dataset_name that it knows, or none."
            ]
        )
    lost = []
    if language.was_forgotten:
        lost.append("The training cost the student language that it had before.")
    told = _figures(language)
    if language.control is None:
        return LanguageFindings(why=[f"{told}.", *lost])
    return LanguageFindings(why=lost, control=[f"{told}: {_against_control(language, won)}."])


def _figures(language: Language) -> str:
    after, control = _two(language.after, language.control)
    parts = [f"the student has {after} nats"]
    if language.before is not None:
        parts[0] += f" ({language.before:.2f} before the training)"
    if language.teacher is not None:
        own = "" if language.same_tokens else " a token of its own"
        parts.append(f"the teacher {language.teacher:.2f}{own}")
    if language.control is not None:
        parts.append(f"the control {control}")
    return f"On text that the answers are not, {', '.join(parts)}"


def _two(after: Measured, control: Measured) -> tuple[str, str]:
    return apart(after or 0.0, (after if control is None else control) or 0.0, 2, fixed)


def _against_control(language: Language, won: bool) -> str:
    verb = "learned" if language.learns else "kept"
    compared = language.against_control()
    if compared == 0:
        return f"it {verb} as much of the teacher's language as the control, for under {100 * TIE:.0f} % counts as none"
    if compared == 1:
        return f"it {verb} more of the teacher's language than the control"
    return f"it {'is better at the answers and ' if won else ''}{verb} less of the teacher's language than the control"
