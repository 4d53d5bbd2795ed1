"""Whether a student's own answers are likely to pay in a run, by what was measured: docs/on-policy.md."""

from ...config.arguments import KavaArguments, KavaTrainingArguments
from ...data.formats import IGNORED
from ...utils.errors import Problem
from ..advice import examples_read
from .data import Examples
from .findings import Checkup
from .machine import expected_processes

OFTEN = 15
"""From so many readings of each example on, more of the next-token loss did not help, and own answers did."""

SELDOM = 2
"""At so few readings the written answers had more to teach in every measurement."""


def own_answers_advice(training: KavaTrainingArguments, times: float) -> Problem | None:
    """What to write where a run samples answers that do not pay, or would gain from some; None elsewhere.

    Args:
        training: the arguments of a run whose rows have written answers.
        times: how often the run reads each example.
    """
    if training.samples and training.on_policy_fraction < 1 and times <= SELDOM:
        return Problem(
            "on_policy_fraction",
            f"Each example is read {times:.2g} times, and on_policy_fraction is {training.on_policy_fraction:g}: with "
            "so many written answers the student's own taught it less in all that was measured (docs/on-policy.md), "
            "and they take time;",
            "write on_policy_fraction 0, or compare with run_control.",
        )
    if training.on_policy_fraction == 0 and training.reads_teacher and times >= OFTEN:
        return Problem(
            "on_policy_fraction",
            f"Each example is read {times:.0f} times: where more of the next-token loss no longer helped, the "
            "student's own answers did (docs/on-policy.md);",
            "try on_policy_fraction 0.5 with on_policy_temperature 1.5 and kd_weight 3.",
        )
    return None


def check_own_answers(checkup: Checkup, arguments: KavaArguments, examples: Examples) -> None:
    """Say whether they are likely to pay; nothing of rows without prompts or without written answers."""
    training = arguments.training
    first = examples.sample[0] if examples.sample else None
    if first is None or not first["prompt_length"] or all(label == IGNORED for label in first["labels"]):
        return
    times = examples_read(training, examples.count, expected_processes(training)) / max(examples.count, 1)
    if problem := own_answers_advice(training, times):
        checkup.warn_of(problem)
