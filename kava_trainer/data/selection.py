"""Some of the examples there are: the first ones, by their number or by their tokens."""

from itertools import islice
from typing import Any

from datasets import Dataset

from .formats import IGNORED
from .streaming import ExampleStream


def first_examples(examples: Dataset | ExampleStream, number: int) -> Dataset:
    """The first examples of a data set, or of the first pass over a stream; fewer where it holds fewer."""
    if isinstance(examples, ExampleStream):
        return Dataset.from_list(list(islice(examples.one_pass(), number)))
    return examples.select(range(min(number, len(examples))))


def learned_tokens(examples: Any) -> int | None:
    """How many tokens of a data set have labels that a model predicts; None of anything but a data set with labels."""
    if not isinstance(examples, Dataset) or "labels" not in examples.column_names:
        return None
    return sum(label != IGNORED for labels in examples["labels"] for label in labels[1:])


SAMPLE = 256
"""Examples whose mean length stands for that of all."""


def mean_length(examples: Dataset | ExampleStream) -> float:
    """Tokens of an example, by the first ones."""
    lengths = [len(ids) for ids in first_examples(examples, SAMPLE)["input_ids"]]
    return sum(lengths) / max(len(lengths), 1)


def draw_examples(dataset: Any, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Some examples of a data set that together hold at least `tokens` tokens, or all there are.

    They are drawn where it can be shuffled; of a stream, or of anything else, the first ones are taken.
    """
    if isinstance(dataset, ExampleStream):
        dataset = dataset.one_pass()
    elif hasattr(dataset, "shuffle"):
        dataset = dataset.shuffle(seed=seed)
    return choose_examples(dataset, tokens)


def choose_examples(dataset: Any, tokens: int) -> list[dict[str, Any]]:
    """The first examples of a data set that together hold at least `tokens` tokens."""
    chosen, count = [], 0
    for example in dataset:
        chosen.append(example)
        count += len(example["input_ids"])
        if count >= tokens:
            break
    return chosen
