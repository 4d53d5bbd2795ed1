"""What a run was, what it measured and how it ended: `run_summary.json`, and its log lines in `log_history.json`.

A figure that was not measured is null.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..trainer.callbacks import ALWAYS_LOGGED_STEPS
from ..utils.atomic_files import write_atomically
from ..utils.redaction import without_secrets
from .findings.alignment import AlignmentCourse, Measured, PairFigures, course_of
from .findings.rollouts import RolloutPair

SUMMARY_FILE = "run_summary.json"

HISTORY_FILE = "log_history.json"
"""The list of all log lines of the training, as in `TrainerState.log_history`."""

REPORT_PAGE, REPORT_PICTURE = "report.html", "report.png"
"""What `page.write_report` makes of the two."""

SCHEMA_VERSION = 1

MOST_SAMPLES = 10
"""Held-out problems whose answers the summary shows."""


@strict
@dataclass
class FinalFigures:
    """The metrics of the finished student, named as Trainer logs them."""

    loss: Measured = None
    mercator_loss: Measured = None
    cos_sim: Measured = None
    centred_cos_sim: Measured = None
    shuffled_cos_sim: Measured = None
    margin: Measured = None
    cka: Measured = None
    student_effective_rank: Measured = None
    target_effective_rank: Measured = None
    teacher_effective_rank: Measured = None
    pairs: list[PairFigures] | None = None
    """Of each pair of layers, of which the figures above are the weighted means."""


@strict
@dataclass(kw_only=True)
class ModelFigures:
    """What one model is worth on the held-out problems; see `answers.Evaluation`."""

    retention_cross_entropy: Measured = None

    cross_entropy: Measured = None
    perplexity: Measured
    exact_match: Measured


@strict
@dataclass
class Evaluations:
    """The models that a run measures; None for one that it did not."""

    teacher: ModelFigures | None = None
    student_before: ModelFigures | None = None
    student_after: ModelFigures | None = None
    control_sft: ModelFigures | None = None

    def measured(self) -> dict[str, ModelFigures]:
        """Those that were measured, by their names."""
        return {who: figures for who, figures in vars(self).items() if figures is not None}


@strict
@dataclass
class Sample:
    """A held-out problem with what each model answered, and whether that is right, by the names in `Evaluations`."""

    prompt: str
    reference: str
    answers: dict[str, str | None]
    matches: dict[str, bool | None] = field(default_factory=dict)


@strict
@dataclass
class Verdict:
    """Whether the run succeeded."""

    success: bool | None = None
    """None where it measured too little to tell."""
    collapsed: bool | None = None
    reasons: list[str] = field(default_factory=list)
    """All sentences: why, then the caveats, then what the control shows."""
    caveats: list[str] = field(default_factory=list)
    """Those of the reasons that say how little the figures may tell."""
    control: list[str] = field(default_factory=list)
    """Those that compare the student with the control."""
    next_steps: list[str] = field(default_factory=list)
    """What to try next. These are not among the reasons."""

    def why(self) -> list[str]:
        """The reasons that are neither caveats nor about the control."""
        return [reason for reason in self.reasons if reason not in (*self.caveats, *self.control)]

    def in_parts(self) -> "Verdict":
        """This verdict, or that of an older summary with its one list of reasons taken apart."""
        if self.caveats or self.control:
            return self
        caveats, control = (
            [reason for reason in self.reasons if reason.startswith(beginnings)]
            for beginnings in (_CAVEATS_BEGIN, _CONTROL_BEGINS)
        )
        return replace(self, caveats=caveats, control=control)


_CAVEATS_BEGIN = ("Only ", "The teacher's own answers matched none")

_CONTROL_BEGINS = ("KAVA beat the control", "KAVA did not beat the control", "The control broke off")


@strict
@dataclass
class Throughput:
    """How fast the training was, and what it took."""

    tokens_per_second: Measured = None
    samples_per_second: Measured = None
    padding_fraction: Measured = None
    peak_memory_bytes: Measured = None
    teacher_seconds: Measured = None
    student_seconds: Measured = None
    generation_seconds: Measured = None
    train_seconds: Measured = None
    control_train_seconds: Measured = None
    estimated_memory_bytes: Measured = None


def _check_problems(problems: list[dict[str, Any]]) -> None:
    if not all(problem.keys() >= {"step", "kind", "action"} for problem in problems):
        raise ValueError("a problem has a step, a kind and an action")


@strict
@dataclass
class Summary:
    """The content of `run_summary.json`, in its order. Whatever is assigned to a field has to be of its type."""

    schema_version: int = SCHEMA_VERSION
    status: str = "failed"
    started_at: str | None = None
    finished_at: str | None = None
    duration_seconds: Measured = None
    environment: dict[str, Any] = field(default_factory=dict)
    """See `describe_environment`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Every argument with its value, secrets masked."""
    command: str | None = None
    """What started the run, tokens masked; None where that is not known."""
    global_step: int = 0
    cos_sim_at: dict[str, Measured] = field(default_factory=lambda: {str(step): None for step in ALWAYS_LOGGED_STEPS})
    final: FinalFigures = field(default_factory=FinalFigures)
    alignment: AlignmentCourse = field(default_factory=AlignmentCourse)
    evaluation: Evaluations = field(default_factory=Evaluations)
    retention: dict[str, Any] | None = None
    """On what `retention_cross_entropy` is measured: `source`, `texts`, `tokens`, and `chance` in nats."""
    samples: list[Sample] = field(default_factory=list)
    rollouts: list[RolloutPair] | None = None
    """Of the student's own answers the first, beside its last ones; None where it wrote none."""
    teacher_fidelity: dict[str, Any] | None = None
    cut: dict[str, Any] | None = None
    """Which layers of the teacher the student was made of, and how important each was; None where it was not."""
    token_alignment: dict[str, Any] | None = None
    """Shares of the student's tokens that are aligned `one_to_one`, `merged` and `left_out`, and of how many `tokens`;
    None where teacher and student read the same ones."""
    other_token_alignments: dict[str, dict[str, Any]] | None = None
    """The same of the other teachers that read other tokens, as `teacher 2` and so on; None where there are none."""
    prompt_kind: str | None = None
    held_out_examples: int | None = None
    held_out_tokens: int | None = None
    """Tokens of the student that their answers have, over which `cross_entropy` is a mean."""
    student_parameters: int | None = None
    final_checksums: dict[str, str] | None = None
    verdict: Verdict = field(default_factory=Verdict)
    throughput: Throughput = field(default_factory=Throughput)
    problems: list[dict[str, Any]] = field(default_factory=list, metadata={"validator": _check_problems})
    """As the trainer notes them: `step`, `kind` and `action`."""
    checkpoints: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Summary":
        """The summary that a file holds. What an older one lacks has its default; what is not known here is left out.

        Raises:
            ValueError: naming the entries that are not of their type.
        """
        summary, wrong = cls(), []
        for entry in (entry for entry in fields(cls) if entry.name in content):
            try:
                value = _typed(entry.type, content[entry.name])
                default = getattr(summary, entry.name)
                setattr(summary, entry.name, default | value if isinstance(default, dict) else value)
            except (TypeError, StrictDataclassError):
                wrong.append(entry.name)
        if wrong:
            raise ValueError(", ".join(wrong))
        return summary


def _typed(kind: Any, value: Any) -> Any:
    """A value of JSON as the dataclasses of a field's type; what does not fit stays for its validation.

    Raises:
        TypeError: if an entry of a dataclass is missing.
        StrictDataclassError: if one is of another type.
    """
    if isinstance(kind, UnionType):
        kind = next((part for part in get_args(kind) if is_dataclass(part) or get_origin(part) is list), kind)
    if is_dataclass(kind) and isinstance(value, dict):
        known = {entry.name: _typed(entry.type, value[entry.name]) for entry in fields(kind) if entry.name in value}
        return cast(Any, kind)(**known)
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], item) for item in value]
    return value


def now() -> datetime:
    """The current time with its zone."""
    return datetime.now(timezone.utc)


def finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None: JSON has no word for those."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunSummary:
    """Collects the figures of a run and writes them to `run_summary.json`.

    Args:
        arguments: every argument with its value, secrets masked.
        environment: see `describe_environment`.
        command: what started the run, tokens masked; None where that is not known.
    """

    def __init__(self, arguments: dict[str, Any], environment: dict[str, Any], command: str | None = None) -> None:
        self._started, self._earlier_seconds = now(), 0.0
        self.log_history: list[dict[str, float]] = []
        started_at = self._started.isoformat(timespec="seconds")
        self.content = Summary(started_at=started_at, environment=environment, arguments=arguments, command=command)

    def run_time(self) -> dict[str, Any]:
        """When the run began, and the seconds that it has taken so far, in all of its sessions."""
        seconds = self._earlier_seconds + (now() - self._started).total_seconds()
        return {"started_at": self.content.started_at, "seconds": seconds}

    def go_on_from(self, earlier: dict[str, Any]) -> None:
        """Add the `run_time` that a checkpoint holds: this session goes on from there."""
        self.content.started_at, self._earlier_seconds = earlier["started_at"], earlier["seconds"]

    def add_training(self, log_history: list[dict[str, float]], global_step: int) -> None:
        """Read the log lines of the training: CosSim at the named steps.

        The last loss and CosSim of the training stand in for final figures where no evaluation has set those.
        """
        self.log_history, self.content.global_step = log_history, global_step
        self.content.alignment = course_of(log_history)
        lines = [line for line in log_history if "loss" in line]
        for line in lines:
            if str(line["step"]) in self.content.cos_sim_at:
                self.content.cos_sim_at[str(line["step"])] = line.get("cos_sim")
        if lines and self.content.final.loss is None:
            last: dict[str, Any] = {name: lines[-1].get(name) for name in ("loss", "mercator_loss", "cos_sim")}
            self.content.final = replace(self.content.final, **last)

    def add_final(self, metrics: dict[str, float], pairs: Sequence[dict[str, Any]] = ()) -> None:
        """Set the final figures from the metrics of `Trainer.evaluate`; what it did not measure becomes null.

        Args:
            metrics: of the finished student.
            pairs: the figures of each pair of layers, see `ProbeResult.by_pair`.
        """
        names = [name for name in _names(FinalFigures) if name != "pairs"]
        figures = {name: metrics.get(f"eval_{name}") for name in names}
        self.content.final = FinalFigures(**figures, pairs=[PairFigures(**pair) for pair in pairs] or None)
        self.content.alignment = course_of(self.log_history)

    def add_evaluation(self, who: str, figures: dict[str, float | None]) -> None:
        """Set the figures of `teacher`, `student_before`, `student_after` or `control_sft`."""
        setattr(self.content.evaluation, who, ModelFigures(**figures))

    def add_answers(
        self, who: str, problems: list[dict[str, str]], answers: list[str], is_right: Callable[[str, str], bool]
    ) -> None:
        """Set what a model, named as in `add_evaluation`, answered to the first held-out problems.

        Args:
            who: see `add_evaluation`.
            problems: `prompt` and `reference` of at most `MOST_SAMPLES` problems, the same at every call.
            answers: one for each problem, or more; none where nothing was generated.
            is_right: takes an answer and its reference.
        """
        samples, models = self.content.samples, _names(Evaluations)
        if answers and not samples:
            samples += [Sample(**it, answers=dict.fromkeys(models), matches=dict.fromkeys(models)) for it in problems]
        for sample, answer in zip(samples, answers, strict=False):
            sample.answers[who], sample.matches[who] = answer, is_right(answer, sample.reference)

    def write(self, output_dir: str | Path, status: str) -> Path:
        """Finish the summary with `completed`, `interrupted` or `failed`, unless it is finished so.

        Returns:
            Where it was written, with the log lines beside it.
        """
        if self.content.finished_at is None or self.content.status != status:
            self.content.status, self.content.finished_at = status, now().isoformat(timespec="seconds")
            self.content.duration_seconds = round(self.run_time()["seconds"], 1)
        path = Path(output_dir) / SUMMARY_FILE
        write_text(path, self.to_json())
        write_text(Path(output_dir) / HISTORY_FILE, self.history_to_json())
        return path

    def as_written(self) -> Summary:
        """The summary as whoever reads the file finds it: of JSON's types, without secrets."""
        return Summary.from_dict(json.loads(self.to_json()))

    def to_json(self) -> str:
        """The summary as JSON text, without secrets."""
        content = finite(asdict(self.content))
        return without_secrets(json.dumps(content, indent=2, ensure_ascii=False, default=str)) + "\n"

    def history_to_json(self) -> str:
        """The log lines as JSON text, one a line, without secrets."""
        lines = [json.dumps(finite(line), ensure_ascii=False, default=str) for line in self.log_history]
        return without_secrets("[\n" + ",\n".join(lines) + "\n]\n")


def _names(group: Any) -> list[str]:
    """The fields of a dataclass."""
    return [entry.name for entry in fields(group)]


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
