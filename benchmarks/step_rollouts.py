"""What the student's own answers cost, at the quickstart's size: `python benchmarks/step.py --terms on_policy`.

The student has learned from the quickstart's answers for 150 steps, so that its own answers end. All ways take turns.

The ways of writing answers to the same 32 prompts, sampled alike, each of 96 tokens (`full`) or as it ends (`ending`):

one at a time   `generate` of transformers in a loop over single prompts
8 together      KAVA, at its default of `per_device_eval_batch_size`: prompts padded on the left
all together    the same, 32 prompts at a time
continuous      continuous batching of transformers, with a cache that holds just these prompts and their answers

The ways of an optimizer step on these 32 examples, with the Mercator loss, the reverse KL divergence and the next-token
loss: `on_policy_fraction` 0, 0.5 and 1, with `rollouts_every` 1 and 3. A turn is three steps, so that it holds one
generation where it serves three; the optimizer, equal for all, is left out.
"""

import copy
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from benchmarks.step_sizes import SIZES, texts_of
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.formats import SAMPLED
from kava_trainer.distillation.rollouts.examples import prompt_of, rollout_of
from kava_trainer.distillation.rollouts.sampling import Sampling, sample_answers
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.quickstart.problems import generate_problems
from kava_trainer.trainer.trainer import KavaTrainer

COLUMNS = (
    "part", "way", "tokens", "seconds", "tokens_per_second", "ratio", "generation_share", "repeats", "device", "torch",
    "transformers",
)  # fmt: skip
NEW_TOKENS, LESSONS, STEPS, PAGE = 96, 150, 3, 32
SETTINGS = ((0.0, 1), (0.5, 1), (0.5, 3), (1.0, 1), (1.0, 3))
"""`on_policy_fraction` and `rollouts_every` of the steps that are measured."""

Way = Callable[[], tuple[int, float]]
"""Does the work once: the tokens of the student's answers, and the seconds of writing them where they are a part."""


@dataclass
class Measured:
    """What the repeats of one way gave."""

    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)


def measure(part: str, ways: dict[str, Way], repeats: int) -> dict[str, Measured]:
    """Each way several times, all in turns, after one round to warm up."""
    found = {name: Measured() for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens, writing = way()
            seconds = time.perf_counter() - start
            print(f"{part}, round {repeat}, {name}: {tokens} tokens of answers in {seconds:.2f} s", flush=True)
            found[name].tokens = tokens
            if repeat > 0:
                found[name].seconds.append(seconds)
                found[name].writing.append(writing)
    return found


class RolloutBench:
    """The quickstart's pair, one step of its examples, and the ways of answering and of learning from them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        size = SIZES["quickstart"]
        self.tokenizer = AutoTokenizer.from_pretrained(size.tokenizer)
        self.pad = DistillationCollator(self.tokenizer)
        self.examples = self._encoded(texts_of(size))
        self.prompts = [prompt_of({k: torch.tensor(own[k]) for k in ("input_ids", "labels")}) for own in self.examples]
        self.teacher = AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER)
        self.student = AutoModelForCausalLM.from_config(size.student())
        self._teach(LESSONS)

    def _encoded(self, texts: Dataset) -> list[dict[str, Any]]:
        return list(encode_dataset(texts, self.tokenizer, SIZES["quickstart"].max_length, "Tokenizing").dataset)

    def _teach(self, lessons: int) -> None:
        count = len(self.examples)
        taught = self._encoded(Dataset.from_list(generate_problems(lessons * count, "train")))
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=2e-3)
        for lesson in range(lessons):
            self.student(**self.pad(taught[lesson * count : (lesson + 1) * count]), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.student.eval()

    def ways_of_writing(self, end: int) -> dict[str, Way]:
        """Each way of answering all prompts.

        Args:
            end: the token that ends an answer; where no model knows it, each answer has `NEW_TOKENS`.
        """
        # Continuous batching changes a model's attention, and a model's own defaults fill what a config leaves open.
        plain, paged = copy.deepcopy(self.student), copy.deepcopy(self.student)
        plain.generation_config, paged.generation_config = GenerationConfig(), GenerationConfig()
        pad, known = self.pad.pad_token_id, len(self.tokenizer)
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS,
            eos_token_id=end, pad_token_id=pad,
        )  # fmt: skip
        cache = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=sum(math.ceil((len(own) + NEW_TOKENS) / PAGE) for own in self.prompts),
            max_batch_tokens=sum(map(len, self.prompts)), max_requests_per_batch=len(self.prompts), seed=0,
        )  # fmt: skip

        def one_at_a_time() -> list[list[int]]:
            torch.manual_seed(0)
            answers = []
            for prompt in self.prompts:
                asked = torch.tensor([prompt])
                written = plain.generate(asked, attention_mask=torch.ones_like(asked), generation_config=config)
                answers.append(written[0, len(prompt) :].tolist())
            return answers

        def together(prompts: int) -> list[list[int]]:
            torch.manual_seed(0)
            sampling = Sampling(1.0, 1.0, NEW_TOKENS, (end,), pad, 0, prompts, known)
            return sample_answers(self.prompts, self.student, sampling).tokens

        def continuous() -> list[list[int]]:
            options = {"generation_config": config, "continuous_batching_config": cache, "warmup": False}
            return [own.generated_tokens for own in paged.generate_batch(self.prompts, **options).values()]

        def counted(write: Callable[[], list[list[int]]]) -> Way:
            def way() -> tuple[int, float]:
                return sum(len(rollout_of([], answer, (end,)).answer) for answer in write()), 0.0

            return way

        return {
            "one at a time": counted(one_at_a_time),
            "8 together": counted(lambda: together(8)),
            "all together": counted(lambda: together(len(self.prompts))),
            "continuous": counted(continuous),
        }

    def ways_of_a_step(self) -> dict[str, Way]:
        """`STEPS` optimizer steps in each of the `SETTINGS`."""
        return {f"{fraction:g}, every {every}": self._steps(fraction, every) for fraction, every in SETTINGS}

    def _steps(self, fraction: float, every: int) -> Way:
        args = KavaTrainingArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", plain_output=True, save_strategy="no",
            per_device_train_batch_size=len(self.examples), per_device_eval_batch_size=len(self.examples),
            mercator_weight=1.0, lm_weight=1.0, kd_weight=1.0, kd_beta=1.0, projector_init="random",
            on_policy_fraction=fraction, on_policy_max_new_tokens=NEW_TOKENS, rollouts_every=every,
        )  # fmt: skip
        trainer = KavaTrainer(
            self.student, self.teacher, args=args, train_dataset=Dataset.from_list(self.examples),
            data_collator=self.pad, processing_class=self.tokenizer,
        )  # fmt: skip
        joined = [JoiningCollator()(self.examples)]

        def way() -> tuple[int, float]:
            trainer.clock.reset()
            if trainer.rollouts is not None:
                trainer.rollouts.forget()
            sampled = 0
            for trainer.state.global_step in range(STEPS):
                batches, counts = trainer.get_batch_samples(iter(joined), len(joined), args.device)
                rows = [row for batch in batches for row in batch["rows"] if "origins" in row]
                sampled += sum(int((row["origins"] == SAMPLED).sum()) for row in rows)
                for batch in batches:
                    trainer.training_step(trainer.model, batch, counts)
                trainer.model.zero_grad()
            return sampled, trainer.clock.stopwatch.seconds().get("generation", 0.0)

        return way


def writing_rows(part: str, found: dict[str, Measured]) -> list[dict[str, Any]]:
    """What the ways of writing answers gave; `ratio` is the speed against one at a time."""
    rates = {name: own.tokens / statistics.median(own.seconds) for name, own in found.items()}
    return [
        {
            "part": part, "way": name, "tokens": own.tokens, "seconds": statistics.median(own.seconds),
            "tokens_per_second": rates[name], "ratio": rates[name] / rates["one at a time"],
        }
        for name, own in found.items()
    ]  # fmt: skip


def step_rows(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """What the ways of a step gave, for a step; `ratio` is the time against a step on the data alone."""
    seconds = {name: statistics.median(own.seconds) / STEPS for name, own in found.items()}
    return [
        {
            "part": "step", "way": name, "tokens": own.tokens / STEPS, "seconds": seconds[name],
            "ratio": seconds[name] / seconds[next(iter(found))],
            "generation_share": sum(own.writing) / sum(own.seconds),
        }
        for name, own in found.items()
    ]  # fmt: skip


def rows_of(bench: RolloutBench, repeats: int) -> list[dict[str, Any]]:
    """One row of the CSV file for each way."""
    shared = {
        "repeats": repeats, "device": f"cpu x {torch.get_num_threads()} ({platform.machine()})",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    unknown, known = bench.student.config.vocab_size, bench.tokenizer.eos_token_id
    full = writing_rows("full", measure("full", bench.ways_of_writing(unknown), repeats))
    ending = writing_rows("ending", measure("ending", bench.ways_of_writing(known), repeats))
    steps = step_rows(measure("step", bench.ways_of_a_step(), repeats))
    return [shared | row for row in [*full, *ending, *steps]]
