"""What the passes of a run take, timed on real examples with its own models on its device."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig, PreTrainedModel

from ...data.collators import DistillationCollator, JoiningCollator
from ...data.packing import pack_step
from ...data.streaming import ExampleStream
from ...data.token_alignment.ranges import RANGES, read_by_the_teacher
from ...distillation.loss_terms import LossTerms
from ...distillation.model import DistillationModel
from ...distillation.token_alignment.states import is_compared
from ...evaluation.answers import answer_loss_sum, have_prompts
from ...evaluation.diagnostics import effective_rank
from ...evaluation.probe import PROBE_TOKENS
from ...models.attention.capture import Feature
from ...models.generation.generate import own_defaults_off
from ...models.hidden_states import run_decoder
from ...models.layers import evaluating, in_mode, keeping_gradients
from ...utils.distributed import give_up_whole_weights, is_sharded, largest_over_ranks
from ..resources import recomputes
from ..setup import Run

LONGEST_PASS, FORWARD = 2.5, 3
"""About so many seconds a timed step may take, where a micro-batch takes more, by fewer examples; and so many times as
many examples are read without learning in that time."""

QUICK, REPEATS = 0.3, 3
"""A pass that takes less seconds than the first is timed so often, and its shortest time counts."""

NEW_TOKENS = 8
"""Tokens that are generated to time one."""

PASSES_OF_OPTIMIZER = 8
"""An optimizer step reads and writes the trained weights, their gradients and two states, and norm and clipping read
the gradients: about as many times what a copy of the weights takes, which is timed."""


@dataclass(frozen=True)
class Rates:
    """Seconds that the passes of a run take on one of its devices. Those without another unit are for one token."""

    step: float
    """Teacher and student, forward and backward, with all terms."""
    teacher: float
    """The teacher's part of it, which a cache saves."""
    terms: float
    """Both models and all terms, forward alone."""
    teacher_read: float
    """The teacher's reading of held-out examples."""
    student_read: float
    """The student's."""
    plain_step: float
    """The student forward and backward with the next-token loss alone, as in a control."""
    optimizer: float
    """One step of the optimizer, in seconds."""
    divergence: float = 0.0
    """What a step saves in which the divergence is held back, beside the teacher's states."""
    ranks: float = 0.0
    """The effective ranks of one probe, in seconds."""
    teacher_token: float = 0.0
    """One more token in all answers of a batch, in seconds."""
    student_token: float = 0.0
    """Likewise."""


def generates(run: Run) -> bool:
    """Whether teacher and student will answer held-out problems."""
    held_out = run.data.evaluation
    return bool(held_out and run.training.evaluate_generation and have_prompts(run.tokenizer, held_out))


def _seconds(device: torch.device, work: Callable[[], Any], agree: Callable[[float], float] = float) -> float:
    """What some work takes on a device; quick work is done more often.

    Args:
        device: that is waited for.
        work: is timed.
        agree: makes one time of those of all ranks, where they work together.
    """
    best = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, agree(time.perf_counter() - began))
        if best > QUICK:
            break
    return best


@contextmanager
def _untouched(model: DistillationModel) -> Iterator[None]:
    """Within the `with` block the model trains, and afterwards gradients, modes and random numbers are as before."""
    device = model.student.device
    random_numbers = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with random_numbers, torch.enable_grad(), keeping_gradients(model), in_mode(model, training=True):
        yield


class Stopwatch:
    """Times the passes of a run.

    Args:
        run: with its models, data and trainer.
    """

    def __init__(self, run: Run) -> None:
        trainer = run.trainer
        self._run, self._trainer = run, trainer
        self._device, self._model, self._terms = run.training.device, trainer.model, trainer.terms
        self._in_step = trainer.terms.are_gathered_with(trainer.model)
        first = run.data.train
        rows = first.one_pass() if isinstance(first, ExampleStream) else first
        self._sizes = (run.training.per_device_train_batch_size, run.training.per_device_eval_batch_size)
        self._examples = list(islice(rows, max(self._sizes)))

    def rates(self) -> Rates:
        """What the passes take."""
        training = self._run.training
        if not is_sharded(self._model) and not getattr(self._model.student, "is_quantized", False):
            self._model.to(training.device)
        try:
            with _untouched(self._model), self._in_memory():
                return self._rates()
        finally:
            give_up_whole_weights(self._model)

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        """Within the `with` block passes of a sharded model keep as little for the backward pass as the training asks.

        One rank that ran out of memory could not go on without the others, which would wait for it.
        """
        student: Any = self._model.student
        if not (self._in_step and recomputes(self._run.training)):
            yield
            return
        newer = hasattr(student, "activation_checkpointing_enable")
        name = "activation_checkpointing" if newer else "gradient_checkpointing"
        getattr(student, f"{name}_enable")()
        try:
            yield
        finally:
            getattr(student, f"{name}_disable")()

    def _seconds(self, work: Callable[[], Any]) -> float:
        """What some work takes, on all ranks the same where they gather weights for it: how often they do it counts."""
        return _seconds(self._device, work, _slowest if self._in_step else float)

    def _rates(self) -> Rates:
        weights, control = self._terms.full_weights, self._run.training.run_control
        one = self._row(1)
        self._pass(one, weights)  # the first pass of all takes longer
        taken = self._seconds(lambda: self._pass(one, weights))
        fitting = LONGEST_PASS / max(taken, 1e-6)
        row = self._row(max(1, min(self._sizes[0], int(fitting))))
        batch = self._padded(max(1, min(self._sizes[1], int(FORWARD * fitting))))  # as evaluations read them

        def each(rows: dict[str, Any], work: Callable[[], Any]) -> float:
            return self._seconds(work) / int(rows["attention_mask"].sum())

        step = each(row, lambda: self._pass(row, weights))
        teacher, student = self._run.models.teacher, self._run.models.student
        with torch.no_grad():
            states = each(row, lambda: self._terms.teacher_states(row)) if self._terms.teacher is not None else 0.0
            terms = each(batch, lambda: self._forward(batch, weights))
            theirs = self._padded(len(batch["input_ids"]), read_by_the_teacher)
            teacher_read = self._seconds(lambda: _read(teacher, theirs)) / int(batch["attention_mask"].sum())
            student_read = each(batch, lambda: self._model.read(lambda: _read(student, batch)))
        divergence = 0.0
        if "kd" in weights and self._run.training.kd_schedule == "stage":
            others = {name: weight for name, weight in weights.items() if name != "kd"}
            teacher_too = 0.0 if self._run.training.aligns else states  # its states are counted for every step
            divergence = max(step - each(row, lambda: self._pass(row, others)) - teacher_too, 0.0)
        plain = each(row, lambda: self._pass(row, {"lm": 1.0})) if control else 0.0
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        copy = self._seconds(lambda: [parameter.detach().clone() for parameter in trained])
        return Rates(
            step=step,
            teacher=states,
            terms=terms,
            teacher_read=teacher_read,
            student_read=student_read,
            plain_step=plain,
            optimizer=PASSES_OF_OPTIMIZER * copy,
            divergence=divergence,
            ranks=self._ranks(),
            teacher_token=self._token(teacher, read_by_the_teacher),
            student_token=self._token(student, list),
        )

    def _ranks(self) -> float:
        """Seconds that the effective ranks of one probe take: of student, target and teacher in each comparison."""
        if self._trainer.probe.fixed is None or not self._run.training.aligns:
            return 0.0
        widths = [(width, min(width, PROBE_TOKENS)) for width in self._probed_widths()]
        taken = {timed: self._rank(timed) for timed in {timed for _, timed in widths}}
        return sum(taken[timed] * width / timed for width, timed in widths)

    def _rank(self, width: int) -> float:
        """Seconds that the rank of states of this width takes; above the number of tokens they grow with it."""
        wave = torch.arange(PROBE_TOKENS * width, device=self._device).sin().view(-1, width)
        return self._seconds(partial(effective_rank, wave))

    @torch.no_grad()
    def _probed_widths(self) -> list[int]:
        """How wide student, target and teacher of each comparison are, as a probe measures them."""
        batch, terms, target = self._padded(1), self._terms, self._trainer.target
        states = cast(dict[Feature, torch.Tensor], terms.teacher_states(batch))
        with terms.autocast():
            output = terms.student_outputs(self._model, batch, states, None)
        mask = is_compared(batch, batch["attention_mask"].bool())
        found = []
        for index, pair in enumerate(output.pairs):
            sides = target.sides(index, pair, output.hidden_states, states, mask)
            found += [side.shape[1] for side in (sides.student, sides.target, sides.teacher)]
        return found

    def _row(self, count: int) -> dict[str, Any]:
        """The first examples as the training reads them."""
        examples, budget = self._examples[:count], self._run.training.max_tokens_per_batch
        if not self._trainer.batches.packs or not budget:
            return self._padded(count)
        return cast(dict[str, Any], send_to_device(pack_step([JoiningCollator()(examples)], budget)[0], self._device))

    def _padded(self, count: int, read: Callable[[Sequence[Any]], list[dict[str, Any]]] = list) -> dict[str, Any]:
        """The first examples as they are, or as the teacher reads them alone, padded."""
        collator = self._run.data.collator
        if read is read_by_the_teacher and RANGES in self._examples[0]:  # it has another padding token
            collator = DistillationCollator(self._run.models.tokenizer_of("teacher"))
        batch = collator(read(self._examples[:count]))
        return cast(dict[str, Any], send_to_device(batch, self._device))

    def _forward(self, row: dict[str, Any], weights: dict[str, float]) -> torch.Tensor:
        terms: LossTerms = self._terms
        states = terms.teacher_states(row) if weights.keys() - {"lm", "smoothing"} else None
        with terms.autocast():
            outputs = terms.student_outputs(self._model, row, states, weights)
        return terms.loss(outputs, row, weights)

    def _pass(self, row: dict[str, Any], weights: dict[str, float]) -> None:
        self._model.zero_grad()
        self._forward(row, weights).backward()

    def _token(self, model: PreTrainedModel, read: Callable[[Sequence[Any]], list[dict[str, Any]]]) -> float:
        """Seconds that one more token takes in all answers of a batch; 0 where none are written."""
        run = self._run
        if not generates(run) and not run.training.samples:
            return 0.0
        ids = self._padded(self._sizes[1], read)["input_ids"]
        prompts = ids.repeat(-(-self._sizes[1] // len(ids)), 1)[: self._sizes[1]]

        def write(tokens: int) -> None:
            greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
            with evaluating(model), torch.no_grad(), own_defaults_off(model):
                cast(Any, model).generate(
                    input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy
                )

        def taken(tokens: int) -> float:
            return self._seconds(lambda: self._model.read(lambda: write(tokens)))

        return max(taken(1 + NEW_TOKENS) - taken(1), 0.0) / NEW_TOKENS


def _read(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    with evaluating(model):
        states = run_decoder(model, batch["input_ids"], batch["attention_mask"])
        answer_loss_sum(model, states, batch)


def _slowest(seconds: float) -> float:
    """The longest time that any rank took. Every rank must ask."""
    return largest_over_ranks(round(seconds * 1e9)) / 1e9
