"""The figures of a run as a report words them: what each is called, how it is written, and what the verdict says."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ..config.alignment.teachers import teacher_names
from ..evaluation.diagnostics import COLLAPSED, MINIMUM_MARGIN
from ..utils.console import size_text
from .charts import number_text
from .findings.alignment import Measured, told_of_pairs
from .findings.language import TIE
from .run_reader import CUT_OFF, ENDED, RunRecord
from .summary import Summary
from .verdict import REQUIRED_COS_SIM

NOT_MEASURED = "not measured"

WHO = {
    "teacher": "Teacher",
    "student_before": "Student before",
    "student_after": "Student after",
    "control_sft": "Control",
}
"""The models that a run evaluates, by their names in the summary, as they are called where there is little room."""

LONG_NAMES = {**WHO, "student": "Student", "control_sft": "Control (next-token loss alone)"}
"""How the models are called that are evaluated: by their names in the summary, and `student` outside of a run."""

EVALUATED = {
    "perplexity": "Answer perplexity",
    "cross_entropy": "Cross-entropy (nats)",
    "exact_match": "Exact match",
    "retention_cross_entropy": "Retained language (nats)",
}

FINAL = {
    "loss": "Loss",
    "mercator_loss": "Mercator term",
    "cos_sim": "CosSim",
    "centred_cos_sim": "CosSim, centred",
    "shuffled_cos_sim": "CosSim, shuffled",
    "margin": "Margin",
    "cka": "CKA to the teacher",
    "student_effective_rank": "Effective rank, student (dimensions)",
    "target_effective_rank": "Effective rank, targets (dimensions)",
    "teacher_effective_rank": "Effective rank, teacher (dimensions)",
}

_COST = {
    "tokens_per_second": "Tokens a second",
    "samples_per_second": "Examples a second",
    "padding_fraction": "Padding",
    "peak_memory_bytes": "Peak memory, measured (on a CPU: the whole process)",
    "estimated_memory_bytes": "Peak memory, estimated before the run",
    "teacher_seconds": "Time in the teacher",
    "student_seconds": "Time in the student",
    "generation_seconds": "Time in which the student wrote answers",
    "train_seconds": "Time of the training",
    "control_train_seconds": "Time of the control's training",
}

_SHARES = {"exact_match", "padding_fraction"}

_FIXED = {"cos_sim", "centred_cos_sim", "shuffled_cos_sim", "margin", "cka"}

_STATUS = {"interrupted": "Interrupted", "failed": "Failed", CUT_OFF: "Cut off", ENDED: "Not judged"}


def seconds_text(seconds: float) -> str:
    """A duration for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def figure_text(name: str, value: Measured) -> str:
    """A figure for people, named by the last part of its place in the summary; None where it was not measured."""
    if value is None:
        return NOT_MEASURED
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    if name.endswith("_bytes"):
        return size_text(int(value))
    if name.endswith("_seconds"):
        return seconds_text(value)
    if name in _FIXED or name.isdigit():  # CosSim at a step
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 or isinstance(value, int) else number_text(value)


@dataclass(frozen=True)
class Figure:
    """One figure of a summary."""

    place: str
    """Where it stands in the summary, such as `final.cos_sim`."""
    label: str
    value: Measured
    """As in the summary."""
    unit: str = ""
    """What stands behind the number; `text` has those of shares, sizes and durations already."""
    meaning: str = ""
    """The figure in one plain sentence."""

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rsplit(".", 1)[-1]

    @property
    def text(self) -> str:
        """For people."""
        return figure_text(self.name, self.value)

    @property
    def exact(self) -> str:
        """As in the summary's JSON."""
        return json.dumps(self.value)


def evaluation_rows(summary: Summary) -> list[tuple[str, list[Figure]]]:
    """For each model its name and its `EVALUATED` figures."""
    return [
        (
            label,
            [
                Figure(f"evaluation.{who}.{name}", title, getattr(getattr(summary.evaluation, who), name, None))
                for name, title in EVALUATED.items()
            ],
        )
        for who, label in WHO.items()
    ]


def alignment_figures(summary: Summary) -> list[Figure]:
    """The final figures, and CosSim at the named steps."""
    return final_figures(summary) + step_figures(summary)


def final_figures(summary: Summary) -> list[Figure]:
    """The final figures of the alignment."""
    return [Figure(f"final.{name}", label, getattr(summary.final, name)) for name, label in FINAL.items()]


def step_figures(summary: Summary) -> list[Figure]:
    """CosSim at the named steps."""
    return [Figure(f"cos_sim_at.{step}", f"CosSim at step {step}", x) for step, x in summary.cos_sim_at.items()]


def cost_figures(summary: Summary) -> list[Figure]:
    """Steps, time, speed and memory."""
    return [
        Figure("global_step", "Optimizer steps", summary.global_step),
        Figure("duration_seconds", "Duration", summary.duration_seconds),
        *(Figure(f"throughput.{name}", label, getattr(summary.throughput, name)) for name, label in _COST.items()),
    ]


_HEADLINE = (
    (
        "final.cos_sim",
        "CosSim",
        "from -1 to 1",
        f"How well the student's states point where their targets do; success needs {REQUIRED_COS_SIM}.",
    ),
    (
        "final.margin",
        "Margin",
        "of CosSim",
        f"By how much CosSim is above that with other tokens' targets; below {MINIMUM_MARGIN} it means nothing.",
    ),
    (
        "final.cka",
        "CKA to the teacher",
        "from 0 to 1",
        "How alike the student's and the teacher's own states are, which no projector can change.",
    ),
    (
        "evaluation.student_after.perplexity",
        "Student's perplexity",
        "tokens",
        "Among how many tokens the student hesitates at each token of the held-out answers; 1 is certainty.",
    ),
    (
        "evaluation.student_after.exact_match",
        "Student's exact match",
        "of the problems",
        "How many held-out problems the student's own answer solves.",
    ),
    ("duration_seconds", "Duration", "", "Of the whole run, with its evaluations and its control."),
)
"""Place, label, unit and meaning of the figures at the top."""


def headline_figures(summary: Summary) -> list[Figure]:
    """The few that stand at the top, each with its unit and a sentence on what it is."""
    found = [
        Figure(place, label, figure_at(summary, place), unit, meaning) for place, label, unit, meaning in _HEADLINE
    ]
    told = told_of_pairs(summary.final.pairs or [])
    return [replace(it, meaning=f"{it.meaning} {told}") if it.name == "margin" and told else it for it in found]


def figure_at(summary: Summary, place: str) -> Measured:
    """The figure at a place of a summary; None also where a part on the way to it is missing."""
    found: Any = summary
    for name in place.split("."):
        found = getattr(found, name, None)
    return found


_BETTER = {
    **dict.fromkeys(("cos_sim", "centred_cos_sim", "margin", "cka", "exact_match"), 1),
    **dict.fromkeys(("tokens_per_second", "samples_per_second"), 1),
    **dict.fromkeys(("perplexity", "cross_entropy", "retention_cross_entropy"), -1),
    **dict.fromkeys(("padding_fraction", "peak_memory_bytes", "duration_seconds"), -1),
}
"""1 for figures of which more is better, and -1 for those of which less is; of all others neither is."""

_NOT_OF_THE_RUN = ("evaluation.teacher.", "evaluation.student_before.", "evaluation.control_sft.")
"""Where figures stand that say nothing of how well a run did."""


def best_of(figures: Sequence[Figure]) -> int | None:
    """Which of the figures, one of each run, is the best.

    Returns:
        Its number. None where fewer than two were measured, there is no better and worse, or nothing stands out: two
        are equal, or cross-entropies are within 2 % of each other.
    """
    direction = _BETTER.get(figures[0].name, 0)
    order = sorted(
        (n for n in range(len(figures)) if figures[n].value is not None),
        key=lambda n: -direction * cast(float, figures[n].value),
    )
    if len(order) < 2 or not direction or figures[0].place.startswith(_NOT_OF_THE_RUN):
        return None
    best, second = (cast(float, figures[n].value) for n in order[:2])
    is_tie = best == second or (figures[0].name.endswith("cross_entropy") and best > (1 - TIE) * second)
    return None if is_tie else order[0]


def difference_text(figure: Figure, other: Figure) -> str:
    """By how much a figure is above another run's, with its sign and unit; empty where one was not measured."""
    if figure.value is None or other.value is None:
        return ""
    difference = figure.value - other.value
    if difference == 0:
        return "±0"
    sign = "+" if difference > 0 else "−"
    size = abs(difference)
    if figure.name in _SHARES:
        return f"{sign}{number_text(100 * size)} points"
    if figure.name.endswith(("_bytes", "_seconds")):
        return f"{sign}{figure_text(figure.name, size)}"
    return f"{sign}{size:,.0f}" if size >= 10_000 else f"{sign}{number_text(size)}"


def measured(figures: Iterable[Figure]) -> list[Figure]:
    """Those figures that were measured."""
    return [figure for figure in figures if figure.value is not None]


def not_measured(figures: Iterable[Figure]) -> list[str]:
    """The labels of those that were not."""
    return [figure.label for figure in figures if figure.value is None]


@dataclass(frozen=True)
class ShownVerdict:
    """What a report says first."""

    word: str
    kind: str
    """`good`, `bad` or `open`."""
    reasons: list[str]
    """Why; and how it ended, where it did not complete."""
    caveats: list[str] = field(default_factory=list)
    control: list[str] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, list[str]]:
        """The sentences below their headings; headings without any are left out."""
        found = {
            "Why": self.reasons,
            "Against the control": self.control,
            "Caveats": self.caveats,
            "What to try next": self.next_steps,
        }
        return {heading: sentences for heading, sentences in found.items() if sentences}


def verdict_of(record: RunRecord) -> ShownVerdict:
    """The verdict of a run; of one that did not complete, how it ended, and whether it was collapsed by then."""
    summary = record.summary
    judged, status, step = summary.verdict.in_parts(), summary.status, summary.global_step
    reasons, collapsed = judged.why(), judged.collapsed
    others = (judged.caveats, judged.control, judged.next_steps)
    if status != "completed":
        collapsed = collapsed or _collapsed_at_last(record.log_history)
        if status == "interrupted":
            what = "the student was finished, but not all that the verdict needs was measured"
            what = what if summary.final_checksums else "there was nothing to judge yet"
            reasons.append(f"A signal ended the run after step {step}: {what}.")
        if status == "failed":
            reasons.append(f"It broke off after step {step}.")
        if record.note:
            reasons.append(record.note)
        if collapsed:
            reasons.insert(0, "The alignment counted as collapsed when it was last measured, so CosSim means nothing.")
    ended = {True: "Success", False: "No success", None: "No verdict"}[judged.success]
    word = _STATUS.get(status, ended)
    if collapsed:
        return ShownVerdict(f"{COLLAPSED} \N{EN DASH} {word.lower()}", "bad", reasons, *others)
    bad = judged.success is False or status == "failed"
    return ShownVerdict(word, "bad" if bad else "good" if word == "Success" else "open", reasons, *others)


def _collapsed_at_last(history: list[dict[str, Any]]) -> bool:
    """Whether the last probe of a training calls it collapsed; an untrained pair is never called so."""
    names = ("eval_collapsed", "probe_collapsed")
    found = [line[name] for line in history if line.get("step") for name in names if line.get(name) is not None]
    return bool(found and found[-1])


def model_names(summary: Summary) -> tuple[str, str, str]:
    """Teacher, student and data set as they were asked for."""
    asked = summary.arguments
    student = asked.get("student_model_name_or_path") or asked.get("student_config_name")
    if student is None and (cut := summary.cut) is not None:
        student = f"{len(cut['kept'])} of its {cut['teacher_layers']} layers"
    names = (" + ".join(teacher_names(asked)) or None, student, asked.get("dataset_name"))
    teacher, student, data = ("unknown" if name is None else str(name) for name in names)
    return teacher, student, data
