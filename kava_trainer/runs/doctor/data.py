"""Checks of the data: the rows, what becomes of the first of them, what is held out."""

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...config.arguments import KavaArguments
from ...config.data_arguments import DataArguments
from ...data.encoding import encode_dataset, encode_first, remarks_on
from ...data.formats import IGNORED, find_format
from ...data.retention import describe_retention, load_retention
from ...data.row_locations import empty_answers, empty_problem, source_rows
from ...data.rows.remarks import remark_problems
from ...data.splits import HELD_OUT_SHARE, has_test_split, load_splits
from ...data.stream_sources import open_rows
from ...data.streaming import ExampleStream, open_stream
from ...data.token_alignment.pair_encoder import COUNTS, Readings, make_encoder
from ...data.token_alignment.ranges import add_counts, seen_by
from ...distillation.rollouts.files import mixed_counts
from ...distillation.teachers.several import role_of
from ...reports.verdict import FEW_EXAMPLES, few_examples
from ..advice import check_evaluation, on_format
from ..identity import data_digest
from ..pair.tokenizers import alignment_shares, describe_shares, few_aligned, teacher_readings
from ..rollouts.examples import check_prompts, describe_rollouts, load_rollouts, with_rollouts
from .findings import Checkup

SAMPLE = 1000
"""Rows of each split that are tokenised; where there are no more, doctor sees exactly what the run will."""

MOST_SHOWN, MOST_PARTS = 400, 12
"""Characters of each part of the example that is shown, and how many parts."""

MANY = 0.1
"""Share of cut or dropped examples from which on it is worth a warning."""


@dataclass
class Examples:
    """What is known of the data without tokenising all of it."""

    train: Dataset | ExampleStream
    """Rows as they are, or the stream of examples."""
    sample: list[dict[str, Any]]
    """The first training rows as examples that are `answered`."""
    count: int
    """Training examples; of a stream those that the run will take."""
    held_out: int
    columns: list[str]
    """All of them, also those that are not read."""
    rollouts: Dataset | None = None
    """What is trained on of a file of rollouts."""
    written: int = 0
    """Training examples of the data, each counted once."""
    readings: Readings = field(default_factory=dict)
    """How those teachers read them whose tokens are others."""

    def tokens(self) -> int:
        """About how many tokens all training examples hold, each counted once, by the mean of the sample."""
        lengths = [len(example["input_ids"]) for example in self.sample]
        written = round(self.written * sum(lengths) / len(lengths)) if lengths else 0
        return written + (0 if self.rollouts is None else sum(map(len, self.rollouts["input_ids"])))

    def digest(self, tokenizer: PreTrainedTokenizerBase, arguments: KavaArguments) -> str:
        """What tells the examples of the run from others; all of them are tokenised for it, as the run does."""
        if isinstance(self.train, ExampleStream):
            return self.train.digest
        told, asked = "Tokenizing the training data", arguments.data
        turns = asked.assistant_turns
        encoded = encode_dataset(
            self.train,
            tokenizer,
            asked.max_length,
            told,
            assistant_turns=turns,
            accepts_prompts=asked.accepts_prompts,
            readings=self.readings,
        ).dataset
        return data_digest(encoded if self.rollouts is None else with_rollouts(arguments, encoded, self.rollouts))


def check_data(checkup: Checkup, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Load the data, tokenise the first rows of both splits, and show one of them."""
    readings = teacher_readings(arguments, tokenizer)
    examples, train, held_out = _open(arguments, tokenizer, readings)
    names = find_format(train.column_names)
    columns = " + ".join(names)
    streamed = isinstance(examples.train, ExampleStream)
    rows = "a stream of rows" if streamed else f"{examples.count} rows"
    checkup.ok(f"{rows} with {columns}; held out: {examples.held_out}.")
    notes, problems = on_format(arguments, tokenizer, examples.columns, train[0])
    for note in notes:
        checkup.ok(f"{note[0].lower()}{note[1:]}")
    for problem in problems:
        checkup.warn_of(problem)
    answered = _check_sample(checkup, train, "training", arguments, tokenizer, readings)
    for number in readings if answered else ():
        shares = alignment_shares(add_counts(seen_by(example, number)[COUNTS] for example in answered))
        which = "" if len(readings) == 1 else f"{role_of(number)}: "
        checkup.ok(f"{which}{describe_shares(shares)}.")
        if (scarce := few_aligned(shares, arguments.data.is_causal)) is not None:
            checkup.warn_of(scarce)
    if not streamed:
        examples.count = round(examples.count * len(answered) / min(len(train), SAMPLE))
    examples.written = examples.count
    if (rollouts := load_rollouts(arguments, tokenizer)) is not None:
        counts = mixed_counts(examples.count, len(rollouts), arguments.training.on_policy_fraction)
        examples.rollouts, examples.count = rollouts, sum(counts)
        examples.written = examples.written if counts[0] else 0
        checkup.ok(describe_rollouts(arguments, rollouts, sum(counts)))
        _show(checkup, rollouts[0], tokenizer)
    if answered and examples.written:
        _show(checkup, answered[0], tokenizer)
    if held_out:
        _check_sample(checkup, held_out, "held-out", arguments, tokenizer, readings)
    if of := describe_retention(arguments.data, load_retention(arguments.data, held_out, tokenizer, readings.get(0))):
        checkup.ok(f"retained language is measured on {of['tokens']} tokens of {of['texts']} texts ({of['source']}).")
    check_evaluation(arguments.training, examples.held_out > 0)
    if not held_out:
        checkup.warn(
            "There are no held-out examples, so nothing will be evaluated.",
            "Name a dataset_test_split, or a data set of more than one example.",
        )
    if few := few_examples(examples.held_out):
        checkup.warn(few, _more_held_out(arguments.data, examples.held_out))
    examples.sample = answered
    return examples


def _more_held_out(asked: DataArguments, held_out: int) -> str:
    """What to change where few examples are held out.

    Args:
        asked: where they come from.
        held_out: how many there are.
    """
    if asked.max_eval_samples is not None and held_out == asked.max_eval_samples:
        return f"Raise max_eval_samples, which is {held_out}, to {FEW_EXAMPLES} or more, or leave it out."
    if asked.streaming or has_test_split(asked):
        return f"Put {FEW_EXAMPLES} examples or more into the split to evaluate on, which has {held_out}."
    needed = math.ceil(FEW_EXAMPLES / HELD_OUT_SHARE)
    return (
        f"Give {needed} rows or more, for without a test split {100 * HELD_OUT_SHARE:.0f} % of them are held out; or "
        "give a test file of your own, beside train.jsonl as test.jsonl in a folder that dataset_name names."
    )


def _open(
    arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase, readings: Readings
) -> tuple[Examples, Dataset, Dataset | None]:
    """What is known so far, the rows to train on (of a stream the first ones), and those held out."""
    asked, training = arguments.data, arguments.training
    if not asked.streaming:
        train, held_out, _ = load_splits(asked)
        check_prompts(arguments, train)
        found = Examples(train, [], len(train), len(held_out or []), train.column_names, readings=readings)
        return found, train, held_out
    rows, held_out = open_rows(asked)
    check_prompts(arguments, rows.first(1))
    turns = asked.assistant_turns
    stream = open_stream(rows, tokenizer, asked.max_length, asked.shuffle_buffer, training.seed, turns, readings)
    steps = training.max_steps * training.gradient_accumulation_steps * training.world_size
    count = stream.count_rows(steps * training.per_device_train_batch_size)
    return (
        Examples(stream, [], count, len(held_out), rows.column_names, readings=readings),
        rows.first(SAMPLE),
        held_out,
    )


def _check_sample(
    checkup: Checkup,
    rows: Dataset,
    which: str,
    arguments: KavaArguments,
    tokenizer: PreTrainedTokenizerBase,
    readings: Readings,
) -> list[dict[str, Any]]:
    """The first rows that have an answer, tokenised; how many were cut and dropped."""
    length = arguments.data.max_length
    name = cast(str, arguments.data.dataset_name)
    turns = arguments.data.assistant_turns
    prompts = arguments.data.accepts_prompts and which == "training"
    encoder = make_encoder(find_format(rows.column_names), tokenizer, length, turns, rows.features, prompts, readings)
    sample = encode_first(rows, SAMPLE, encoder, name)
    answered = [example for example in sample if example["answered"]]
    empty = [] if prompts else source_rows(rows, empty_answers(sample))
    cut, dropped = sum(example["truncated"] for example in sample), len(sample) - len(answered)
    lacking = "without room for an answer" if prompts else "without an answer"
    text = f"of {len(sample)} {which} examples {cut} are cut to {length} tokens, {dropped} dropped {lacking}."
    if not answered:
        found = "a prompt that leaves room for an answer" if prompts else "an answer"
        checkup.warn(f"none of the first {len(sample)} {which} examples has {found}.", "Look at the data's columns.")
    elif cut > MANY * len(sample):
        checkup.warn(text, "Raise max_length (and lower per_device_train_batch_size), if whole answers matter.")
    elif dropped - len(empty) > MANY * len(sample):
        checkup.warn(text, "Raise max_length where prompts are as long as that.")
    else:
        checkup.ok(text)
    if empty:
        checkup.warn(empty_problem(name, which, empty), "Write an answer there, or leave these rows out.")
    for problem in remark_problems(remarks_on(sample, rows), name, which, len(sample)):
        checkup.warn_of(problem)
    return answered


def _show(checkup: Checkup, example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """One example as the models will see it."""
    learned = sum(label != IGNORED for label in example["labels"])
    text = marked_text(example["input_ids"], example["labels"], tokenizer)
    shown = "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)
    checkup.ok(
        f"the first example as the models will see it, {len(example['input_ids'])} tokens; the {learned} in [[ ]] are "
        "learned:"
    )
    checkup.show(shown.split("\n"))


def marked_text(input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example with `[[` and `]]` around the tokens that are learned; of long parts both ends."""
    pairs = zip(input_ids, labels, strict=True)
    runs = [(learned, [token for token, _ in run]) for learned, run in groupby(pairs, lambda pair: pair[1] != IGNORED)]
    parts = [(learned, _ends(str(tokenizer.decode(tokens)), MOST_SHOWN)) for learned, tokens in runs]
    text = [f"[[{part}]]" if learned else part for learned, part in parts]
    if len(text) > MOST_PARTS:
        half = MOST_PARTS // 2
        text[half:-half] = [f"\n... ({len(text) - 2 * half} more parts) ...\n"]
    return "".join(text)


def _ends(text: str, most: int) -> str:
    """A text, or both its ends where it is longer than so many characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} more characters) ... {text[-half:]}"
