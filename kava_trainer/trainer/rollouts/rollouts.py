"""The student's own answers in the place of some examples of an optimizer step."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from ...config.arguments import KavaTrainingArguments
from ...data.collators import DistillationCollator, JoiningCollator, separated
from ...distillation.model import DistillationModel
from ...distillation.rollouts.choice import choose, count_chosen, derived_seed, turn_of
from ...distillation.rollouts.examples import Example, Rollout, of_the_data, prompt_of, rollout_of, without_answer
from ...distillation.rollouts.sampling import Answers, RolloutFn, Sampling, sample_answers, sample_what_fits
from ...distillation.token_means import TokenMeans
from ...models.generation.generate import stop_tokens
from ...models.layers import evaluating
from ...models.sharding.passes import passes_in_step
from ...models.teacher import OnlineTeacher, in_step_reading
from ...utils.distributed import is_sharded
from ...utils.errors import RunFailed
from ..incidents import Incidents
from ..throughput import Throughput
from .figures import note_figures, warnings_of

MOST_SHOWN = 10
"""So many of a training's first answers are kept, to be shown beside the last ones."""


class Rollouts:
    """Has the student answer some of a step's prompts, and puts what it wrote in the place of their examples.

    Which ones, and all random numbers, follow from the seed, the step and the rank, so that a training that goes on
    from a checkpoint goes the same way, and one without rollouts draws the same numbers as ever.

    Args:
        args: of the run.
        incidents: is told of memory that ran out and of answers that go wrong.
        clock: measures the seconds.
        collator: of the trainer.
        model: gives the student as it is now, beside its projectors; where it is sharded, all ranks answer together.
        teacher: gives the teacher that runs; it is asked where a cache has the states on the examples of the data.
        tokenizer: whose end-of-text token ends an answer, beside what the student itself stops at.
        vocabulary: tokens from 0 that both models and the tokenizer know.
        means: gives the sums that figures of the log are noted in.
        autocast: makes the context that the student runs in.
        gather_together: tells whether a pass of a step gathers weights that are spread over the ranks.
        rollout_fn: writes the answers in place of `sample_answers`.

    Raises:
        ValueError: if the collator is not KAVA's, or reads states beside a teacher that does not run, or nothing could
            end an answer.
    """

    def __init__(
        self,
        args: KavaTrainingArguments,
        incidents: Incidents,
        clock: Throughput,
        collator: Any,
        model: Callable[[], DistillationModel],
        teacher: Callable[[], OnlineTeacher | None],
        tokenizer: PreTrainedTokenizerBase | None,
        vocabulary: int,
        means: Callable[[], TokenMeans],
        autocast: Callable[[], AbstractContextManager[Any]],
        gather_together: Callable[[], bool],
        rollout_fn: RolloutFn | None = None,
    ) -> None:
        if type(collator) is not DistillationCollator:
            raise ValueError("on_policy_fraction needs DistillationCollator as data_collator; leave yours out.")
        if collator.read_states is not None and teacher() is None:
            raise ValueError(
                "on_policy_fraction needs a teacher that runs: a cache has no states of what is sampled now."
            )
        self._args, self._incidents, self._clock, self._collator = args, incidents, clock, collator.reading(None)
        self._teacher, self._gather_together = teacher, gather_together
        self._model, self._means, self._autocast, self._rollout_fn = model, means, autocast, rollout_fn
        self._vocabulary = vocabulary
        self._end_tokens = tuple(stop_tokens(model().student, tokenizer))
        if not self._end_tokens:
            raise ValueError("Nothing could end a student's own answer; give a processing_class with an eos_token.")
        self._batch_size: int | None = None
        self._first_entropy: float | None = None
        self.forget()

    def forget(self) -> None:
        """Begin a training without the answers of an earlier one."""
        self._kept: list[Rollout] = []
        self._step = -1
        self._first: list[Rollout] | None = None

    def mix(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of an optimizer step with the student's answers in the place of some examples.

        An answer that says nothing is left out; a micro-batch of nothing else keeps a prompt, of which nothing is
        learned. Where the ranks gather weights together all prompts are kept, for they need as many passes.

        Args:
            batches: of `JoiningCollator`, or padded.
        """
        parts = [[of_the_data(example) for example in separated(batch)] for batch in batches]
        replaced = self._replaced([example for part in parts for example in part])
        joined, start, mixed = "lengths" in batches[0], 0, []
        gather_together = self._gather_together()
        for part in parts:
            places = range(start, start := start + len(part))
            found = [replaced.get(place, own) for place, own in zip(places, part, strict=True)]
            if gather_together:
                found = [without_answer(given) if own is None else own for own, given in zip(found, part, strict=True)]
            kept = [own for own in found if own is not None] or [without_answer(part[0])]
            mixed.append(JoiningCollator()(kept) if joined else self._collator.for_training()(kept))
        return mixed

    def _replaced(self, examples: list[Example]) -> dict[int, Example | None]:
        """What stands in the place of some of a step's examples: the student's answer; None where it says nothing.

        Where an earlier step, a short one, was answered less often than this one wants, examples of the data stay.
        """
        args, step = self._args, self._incidents.step
        turn = turn_of(step, args.process_index, args.world_size)
        count = count_chosen(len(examples), args.on_policy_fraction, turn)
        seed = derived_seed(args.seed, step, args.process_index)
        places = choose(len(examples), count, seed)
        if self._is_due(step):
            # Later steps may have one more in their share than this one.
            most = count if args.rollouts_every == 1 else math.ceil(len(examples) * args.on_policy_fraction)
            places = choose(len(examples), most, seed)
            self._kept, self._step = self._written([prompt_of(examples[place]) for place in places], seed), step
        found = _turned(self._kept, (step - self._step) * count)[:count]
        answers = [None if rollout.is_empty else rollout.as_example() for rollout in found]
        if "teacher_states" in examples[0]:
            self._add_states([own for own in answers if own is not None], examples[0]["teacher_states"])
        return dict(zip(places, answers, strict=False))

    @torch.no_grad()
    def _add_states(self, examples: list[Example], like: dict[int, torch.Tensor]) -> None:
        """Give examples the teacher's states, as those of the data bring them along: of these types, in that place.

        Args:
            examples: some answers.
            like: states of the data by layer.
        """
        size = self._batch_size or self._args.per_device_eval_batch_size
        teacher = cast(OnlineTeacher, self._teacher())
        with in_step_reading([teacher]):
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                batch = send_to_device(self._collator(part), self._args.device)
                with self._clock.stopwatch.measure("teacher"), self._autocast():
                    states = teacher.features(batch)
                for row, example in enumerate(part):
                    read = {layer: own[row, : len(example["input_ids"])] for layer, own in states.items()}
                    example["teacher_states"] = {layer: read[layer].to(own) for layer, own in like.items()}

    def _is_due(self, step: int) -> bool:
        every = self._args.rollouts_every
        return self._step < 0 or step % every == 0 or step - self._step >= every

    def _written(self, prompts: list[list[int]], seed: int) -> list[Rollout]:
        """An answer to each prompt; the figures of all are noted, and the first of all are kept."""
        with self._clock.stopwatch.measure("generation"):
            step = self._incidents.step + 1
            answers = self._sampled(prompts, seed, step)
        rollouts = self._rollouts_of(prompts, answers)
        note_figures(self._means(), rollouts, answers.entropies, self._args.device)
        if self._first is None and rollouts:
            self._first = rollouts[:MOST_SHOWN]
        return rollouts

    def _rollouts_of(self, prompts: list[list[int]], answers: Answers) -> list[Rollout]:
        pairs = zip(prompts, answers.tokens, strict=True)
        return [rollout_of(prompt, own, self._end_tokens) for prompt, own in pairs]

    def first_and_last(self) -> list[tuple[Rollout, Rollout]]:
        """The first answers of this rank's training, each beside what the student as it is now answers to its prompt.

        There are at most `MOST_SHOWN`, all of the first generation, and none where there was none. Nothing of a
        training is changed by it. Raises `RunFailed` if memory runs out with a single prompt.
        """
        first = self._first or []
        prompts = [own.prompt for own in first]
        seed = derived_seed(self._args.seed, self._incidents.step, self._args.process_index)
        last = self._rollouts_of(prompts, self._sampled(prompts, seed, None))
        return list(zip(first, last, strict=True))

    def _sampled(self, prompts: list[list[int]], seed: int, step: int | None) -> Answers:
        """The answers, of as many prompts at a time as fit. Raises `RunFailed` if not even one does.

        Sharded weights are gathered with the other ranks, which would wait for one that begins anew: there the run ends
        where so many do not fit.

        Args:
            prompts: token ids.
            seed: of the sampling.
            step: that they are for; None after the training.
        """
        when = "after the last step" if step is None else f"in step {step}"

        def sample(size: int) -> Answers:
            return self._sample(prompts, self._sampling(seed, size))

        def tell(tried: int, left: int) -> None:
            self._batch_size = left
            told = f"sampled the answers again, {left} at a time, which stay the most"
            self._incidents.console.warn(f"Out of memory {when} with answers to {tried} prompts; {told}.")
            self._incidents.note("oom", told, step)

        size = self._batch_size or self._args.per_device_eval_batch_size
        longest = f"lower on_policy_max_new_tokens (now {self._args.on_policy_max_new_tokens})"
        if is_sharded(self._model()):
            try:
                return sample(size)
            except torch.OutOfMemoryError as error:
                raise RunFailed(
                    f"Out of memory {when} while the student answered {min(size, len(prompts))} prompts at a time; "
                    f"lower per_device_eval_batch_size (now {size}), or {longest}. {self._incidents.advice()}"
                ) from error
        if (answers := sample_what_fits(sample, size, len(prompts), tell)) is None:
            what = f"Out of memory {when} while the student answered a single prompt; {longest}."
            raise RunFailed(f"{what} {self._incidents.advice()}")
        return answers

    def _sampling(self, seed: int, batch_size: int) -> Sampling:
        pad_token = self._collator.pad_token_id
        return Sampling.asked(self._args, self._end_tokens, pad_token, seed, batch_size, self._vocabulary)

    def _sample(self, prompts: list[list[int]], sampling: Sampling) -> Answers:
        model, device = self._model(), self._args.device
        student, devices = model.student, [device] if device.type == "cuda" else []

        def answer() -> Answers:
            with passes_in_step(student):
                if not prompts:
                    return Answers([], None if self._rollout_fn else [])
                if self._rollout_fn is None:
                    return sample_answers(prompts, student, sampling)
                given = self._rollout_fn([list(prompt) for prompt in prompts], student, sampling)
            return Answers(checked_answers(given, len(prompts), sampling.vocabulary))

        with torch.random.fork_rng(devices), evaluating(student), self._autocast():
            torch.manual_seed(sampling.seed)
            return model.read(answer)

    def judge(self, figures: dict[str, float]) -> None:
        """Warn once of each way in which the answers of a log line go wrong."""
        entropy = figures.get("rollout_entropy")
        self._first_entropy = entropy if self._first_entropy is None else self._first_entropy
        for kind, told in warnings_of(figures, self._first_entropy, self._args).items():
            if all(problem["kind"] != kind for problem in self._incidents.problems):
                self._incidents.console.warn(told)
                self._incidents.note(kind, "went on with such answers")

    def state_dict(self) -> dict[str, Any]:
        """The first answers, and those that later steps will use again with their step, for a checkpoint."""
        kept = self._kept if self._args.rollouts_every > 1 else []
        return {
            "rollouts": {
                "kept": _plain(kept),
                "first": None if self._first is None else _plain(self._first),
                "step": self._step,
                "batch_size": self._batch_size,
                "first_entropy": self._first_entropy,
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; with another number of ranks, or from a training without such answers, anew."""
        if (saved := state.get("rollouts")) is None:
            return
        self._batch_size, self._first_entropy = saved["batch_size"], saved["first_entropy"]
        first = saved.get("first", [])  # an older checkpoint has lost them, and those to come are not the first
        self._first = None if first is None else [Rollout(*own) for own in first]
        if state["same_ranks"] and saved["kept"]:
            self._kept, self._step = [Rollout(*own) for own in saved["kept"]], saved["step"]


def _plain(rollouts: list[Rollout]) -> list[tuple[list[int], list[int], bool]]:
    return [(rollout.prompt, rollout.answer, rollout.ended) for rollout in rollouts]


def _turned(rollouts: list[Rollout], by: int) -> list[Rollout]:
    """The same rollouts, beginning with another one."""
    first = by % len(rollouts) if rollouts else 0
    return [*rollouts[first:], *rollouts[:first]]


def checked_answers(given: Sequence[Sequence[int]], count: int, vocabulary: int) -> list[list[int]]:
    """What a user's function gave, as lists.

    Args:
        given: its answers.
        count: of the prompts.
        vocabulary: tokens that may be in them, from 0.

    Raises:
        ValueError: if that is not one list of such tokens for each prompt.
    """
    answers = [torch.as_tensor(answer).tolist() for answer in given]
    if len(answers) != count:
        raise ValueError(f"rollout_fn gave {len(answers)} answers to {count} prompts; give one for each, [] for none.")
    for answer in answers:
        if wrong := [token for token in answer if type(token) is not int or not 0 <= token < vocabulary]:
            raise ValueError(
                f"rollout_fn gave the token {wrong[0]!r}; give token ids, whole numbers from 0 to {vocabulary - 1}."
            )
    return answers
