"""How long a run will take, told before its first step.

Nothing is guessed from sizes: a few passes over real examples are timed with the models of the run, on its device, and
scaled by the tokens that each stage reads. They change no weight, no gradient and no random state.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import release_memory
from transformers import TrainerState

from ..config.arguments import KavaTrainingArguments
from ..data.selection import mean_length
from ..data.streaming import ExampleStream
from ..distillation.loss_terms import STAGE_ENDS
from ..evaluation.answers import longest_answer
from ..evaluation.probe import GRADIENT_EXAMPLES, PROBE_TOKENS
from ..trainer.checkpoint import TRAINER_STATE_FILE
from ..utils.progress_bar import working
from .advice import planned_steps, steps_per_epoch
from .fill_cache import examples_at_hand
from .resources import recomputes
from .setup import Run
from .timing.passes import Rates, Stopwatch, generates


@dataclass(frozen=True)
class Plan:
    """What one device of a run has to do."""

    steps: int
    """Optimizer steps that are left."""
    step_tokens: float
    """Of one optimizer step."""
    without_divergence: int = 0
    """Of the steps those in which `kd_schedule` holds the divergence back."""
    held_out: float = 0.0
    """Tokens of the held-out examples; 0 where there are none."""
    retained: float = 0.0
    """Tokens of the text that tells what is kept of the teacher's language."""
    evaluations: int = 0
    """While it trains."""
    saves: int = 0
    """While it trains, without those that come with an evaluation or at the end."""
    calibration: float = 0.0
    """Tokens that the projectors are fitted to."""
    cached: float | None = None
    """Tokens that a teacher cache lacks; None where there is no cache."""
    sampled: float = 0.0
    """Share of the examples that the student answers itself, of whose states there is no cache."""
    probe: float = 0.0
    """Tokens of the probe; 0 where nothing is aligned."""
    gradient: float = 0.0
    """Of them those that the gradients of the terms are measured on, for all terms together."""
    gradients_at_the_start_alone: bool = False
    control: bool = False
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which was not timed."""
    batches: int = 0
    """Batches whose answers are generated; 0 where none are."""
    answer: float = 0.0
    """Tokens of a batch's longest answer, of a model that knows when to stop."""
    longest: float = 0.0
    """Most tokens of an answer."""
    rollouts: float = 0.0
    """Tokens of the longest answers of all batches that the student answers while it trains."""


def estimate(plan: Plan, rates: Rates) -> dict[str, float]:
    """Seconds by stage: `teacher cache`, `calibration`, `evaluations`, `probe`, `steps`, `rollouts` and `control`.

    What the run does not have is not there.
    """
    teacher = 0.0 if plan.cached is None else rates.teacher  # what a step saves that reads it from the cache
    saved = teacher * (1 - plan.sampled)
    terms, again = rates.terms - teacher, (rates.terms - rates.teacher) if plan.checkpointing else 0.0
    step, plain = rates.step - saved + again, rates.plain_step + again
    beside = (plan.evaluations + plan.saves + 2) if plan.probe else 0  # at the start and at the end too
    measured = beside if not plan.gradients_at_the_start_alone else min(beside, 1)
    written = [rates.student_token * plan.batches * length for length in (plan.longest, plan.answer, plan.answer)]
    held_out = (plan.held_out + plan.retained) * rates.student_read
    by_teacher = (plan.held_out + plan.retained) * rates.teacher_read + rates.teacher_token * plan.batches * plan.answer
    once = plan.held_out * terms + by_teacher
    in_training = plan.evaluations * plan.held_out
    parts = {
        "teacher cache": (plan.cached or 0.0) * rates.teacher,
        "calibration": plan.calibration * terms,
        "evaluations": once + (2 + plan.control) * held_out + sum(written[: 2 + plan.control]) + in_training * terms,
        "probe": beside * (plan.probe * terms + rates.ranks) + measured * plan.gradient * step,
        "steps": plan.steps * (plan.step_tokens * step + rates.optimizer)
        - plan.without_divergence * plan.step_tokens * rates.divergence,
        "rollouts": plan.rollouts * rates.student_token,
        "control": 0.0,
    }
    if plan.control:
        in_control = plan.steps * (plan.step_tokens * plain + rates.optimizer)
        parts["control"] = in_control + in_training * rates.student_read
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def about(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(plan: Plan, parts: dict[str, float]) -> str:
    """The line that tells of an estimate."""
    models = "teacher, before, after" + (", control" if plan.control else "")
    words = {
        "evaluations": f"evaluations {{}} ({models})",
        "steps": f"{plan.steps} step{'' if plan.steps == 1 else 's'} {{}}",
    }
    shown = [words.get(name, f"{name} {{}}").format(clock(seconds)) for name, seconds in parts.items()]
    return f"Time estimate: {', '.join(shown)}; in all about {about(sum(parts.values()))}"


def _moments(strategy: Any, every: float | None, steps: int, epoch: int) -> range:
    """The steps after which something is done that a strategy asks for."""
    if strategy == "epoch":
        return range(epoch, steps + 1, epoch)
    if strategy != "steps" or not every:
        return range(0)
    number = math.ceil(steps * every) if every < 1 else int(every)
    return range(number, steps + 1, number)


def plan_of(run: Run) -> Plan:
    """What one device of a run has to do, by its arguments, examples and checkpoint."""
    training, data = run.training, run.data
    examples, ranks = 0 if isinstance(data.train, ExampleStream) else len(data.train), training.world_size
    steps, epoch = planned_steps(training, examples, ranks), steps_per_epoch(training, examples, ranks)
    done = 0
    if run.checkpoint is not None:
        done = TrainerState.load_from_json(str(run.checkpoint / TRAINER_STATE_FILE)).global_step
    length = mean_length(data.train)
    step_tokens = training.per_device_train_batch_size * training.gradient_accumulation_steps * length
    held_out, retained = (
        mean_length(examples) * len(examples) if examples is not None else 0.0
        for examples in (data.evaluation, data.retention)
    )
    evaluated = {n for n in _moments(training.eval_strategy, training.eval_steps, steps, epoch) if n > done}
    saved = {n for n in _moments(training.save_strategy, training.save_steps, steps, epoch) if done < n < steps}
    terms, probes = len(run.trainer.terms.full_weights), run.trainer.probe.fixed is not None
    sparing = run.trainer.probe.sparing
    calibrates = training.calibrates and run.checkpoint is None
    gradient_examples = min(GRADIENT_EXAMPLES, training.per_device_train_batch_size if sparing else math.inf)
    answer = longest_answer(data.evaluation) if data.evaluation is not None else 0
    per_round = training.per_device_eval_batch_size * ranks
    return Plan(
        steps=max(steps - done, 0),
        step_tokens=step_tokens,
        without_divergence=max(math.ceil(STAGE_ENDS * steps) - done, 0) if training.kd_schedule == "stage" else 0,
        held_out=held_out / ranks,
        retained=retained / ranks,
        evaluations=len(evaluated),
        saves=len(saved - evaluated),
        calibration=min(training.calibration_tokens, examples * length or math.inf) / ranks if calibrates else 0.0,
        cached=_missing(run, steps * step_tokens * ranks) / ranks if _all_cached(run) else None,
        sampled=training.on_policy_fraction if training.samples else 0.0,
        probe=min(PROBE_TOKENS, held_out) if probes else 0.0,
        gradient=terms * min(gradient_examples * length, PROBE_TOKENS, held_out) if probes else 0.0,
        gradients_at_the_start_alone=sparing,
        control=training.run_control,
        # Where weights are gathered the step was timed so.
        checkpointing=recomputes(training) and not run.trainer.terms.are_gathered_with(run.trainer.model),
        batches=math.ceil(len(data.evaluation) / per_round) if data.evaluation is not None and generates(run) else 0,
        answer=answer,
        longest=training.generation_max_new_tokens or 2 * answer,
        rollouts=_rollout_tokens(training, max(steps - done, 0), answer),
    )


def _rollout_tokens(training: KavaTrainingArguments, steps: int, answer: int) -> float:
    """What `Plan.rollouts` is for so many steps, where the longest reference answer has so many tokens, 0 for none."""
    if not training.samples:
        return 0.0
    prompts = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.on_policy_fraction
    batches = math.ceil(math.ceil(prompts) / training.per_device_eval_batch_size)
    longest = min(training.on_policy_max_new_tokens, answer or training.on_policy_max_new_tokens)
    return math.ceil(steps / training.rollouts_every) * batches * longest


def _all_cached(run: Run) -> bool:
    return len(run.caches) == len(run.models.teachers)


def _missing(run: Run, of_a_stream: float) -> float:
    """Tokens that the teacher caches of a run lack, each by its share; of a stream all that the training reads."""
    lacking = 0.0
    for number, cache in run.caches.items():
        examples = examples_at_hand(run.data, run.trainer, number)
        lacking += sum(len(examples[i]) for i in cache.missing(examples))
        lacking += of_a_stream if isinstance(run.data.train, ExampleStream) else 0.0
    return lacking / max(len(run.models.teachers), 1)  # the rate of the teacher is that of all of them together


def tell_time(run: Run) -> None:
    """Say how long the stages that are still to come will take."""
    try:
        with working("Timing a few passes"):
            rates = Stopwatch(run).rates()
    except torch.OutOfMemoryError:
        if run.trainer.terms.are_gathered_with(run.trainer.model):  # the other ranks may wait for this one
            raise
        release_memory()
        run.console.print("No time estimate: memory ran out in a pass that was to be timed.")
        return
    plan = plan_of(run)
    run.console.print(f"{describe(plan, estimate(plan, rates))}.")
