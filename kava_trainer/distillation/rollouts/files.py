"""Rollouts in a file, a JSON object a line: token ids, so that nothing is tokenised anew, and text for people."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ...data.formats import WRITTEN
from ...utils.atomic_files import write_atomically
from ...utils.errors import BadRequest
from .choice import choose
from .examples import Rollout

_REMEDY = "name a file that python -m kava_trainer rollouts wrote for these models."

MOST_TIMES = 100
"""An example is no more often than this in a mixture of data and rollouts."""

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int64")),
        "prompt_length": Value("int64"),
        "answer_text": Value("string"),
        "origins": List(Value("int8")),
    }
)
"""Of rollouts as examples: those of `encoding`, and whose each token is."""


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells the token ids of a tokenizer from those of others: a hash of its tokens and their ids.

    Tokenizers that agree in these, such as those of a teacher and its student, have the same.
    """
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write rollouts to a file, whole or not at all.

    A line holds the `prompt` and the `answer` as text, the same as `prompt_ids` and `answer_ids`, whether the answer
    `ended`, with the end-of-text token that is its last one then, and the `tokenizer_digest` as `tokenizer`.

    Raises:
        OSError: if it cannot be written.
    """
    digest = tokenizer_digest(tokenizer)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for rollout in rollouts:
                file.write(json.dumps(_line(rollout, tokenizer, digest), ensure_ascii=False) + "\n")

    write_atomically(path, write)


def _line(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, digest: str) -> dict[str, Any]:
    return {
        "prompt": tokenizer.decode(rollout.prompt),
        "answer": tokenizer.decode(rollout.answer, skip_special_tokens=True),
        "ended": rollout.ended,
        "prompt_ids": rollout.prompt,
        "answer_ids": rollout.answer,
        "tokenizer": digest,
    }


def read_rollouts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, longest: int | None = None, most: int | None = None
) -> list[Rollout]:
    """The rollouts of a file that say something, in their order.

    Args:
        path: of the file.
        tokenizer: of the models that read them now.
        longest: tokens that prompt and answer may hold together; any number by default.
        most: only so many of them, the first ones; all by default.

    Raises:
        BadRequest: naming the line, if the file cannot be read, was written for another tokenizer, holds anything else
            or an example that is too long, or no answer says anything.
    """
    digest, known = tokenizer_digest(tokenizer), max(tokenizer.get_vocab().values()) + 1
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            lines = ((number, _rollout_of(number, line, digest, known)) for number, line in enumerate(file, start=1))
            told = ((number, rollout) for number, rollout in lines if rollout is not None and not rollout.is_empty)
            found = list(islice(told, most))
    except UnicodeDecodeError as error:
        raise BadRequest(f"The rollouts {path} cannot be read: they are not UTF-8 text;", _REMEDY) from error
    except OSError as error:
        raise BadRequest(f"The rollouts {path} cannot be read: {error.strerror};", _REMEDY) from error
    except ValueError as error:
        raise BadRequest(f"The rollouts {path} cannot be used: {error};", _REMEDY) from error
    if not found:
        raise BadRequest(f"The rollouts {path} hold no answer that says anything;", _REMEDY)
    for number, rollout in found:
        length = len(rollout.prompt) + len(rollout.answer)
        if longest is not None and length > longest:
            raise BadRequest(
                f"The rollouts {path} cannot be used: line {number} holds {length} tokens, more than the {longest} of "
                "max_length and on_policy_max_new_tokens together;",
                "raise one of them.",
            )
    return [rollout for _, rollout in found]


def _rollout_of(number: int, line: str, digest: str, known: int) -> Rollout | None:
    """The rollout of a numbered line; None where it is blank. Raises `ValueError` with what is wrong."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not valid JSON") from error
    if not isinstance(row, dict) or not isinstance(row.get("ended"), bool):
        raise ValueError(f"line {number} is no rollout")
    if row.get("tokenizer") != digest:
        raise ValueError(f"line {number} was written for another tokenizer")
    for name in ("prompt_ids", "answer_ids"):
        ids = row.get(name)
        if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token < known for token in ids):
            raise ValueError(f"{name} of line {number} is no list of this tokenizer's token ids")
    if not row["prompt_ids"]:
        raise ValueError(f"line {number} has no prompt")
    return Rollout(row["prompt_ids"], row["answer_ids"], row["ended"])


def as_dataset(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rollouts as examples that a trainer reads, with the `origins` of their tokens, see `Rollout.as_example`."""

    def rows() -> Iterable[dict[str, Any]]:
        for rollout in rollouts:
            example = {name: own.tolist() for name, own in rollout.as_example().items()}
            text = str(tokenizer.decode(rollout.answer, skip_special_tokens=True))
            yield {**example, "prompt_length": len(rollout.prompt), "answer_text": text}

    return Dataset.from_list(list(rows()), features=_FEATURES)


def mixed_counts(written: int, rollouts: int, fraction: float) -> tuple[int, int]:
    """How many examples of the data, and how many rollouts, `mixed` makes of so many.

    Raises:
        BadRequest: if an example would be there more than `MOST_TIMES` times.
    """
    if fraction == 1:
        return 0, rollouts
    share = Fraction(fraction).limit_denominator(10**6) or Fraction(1, 10**6)
    total = max(math.ceil(rollouts / share), math.ceil(written / (1 - share)))
    count = math.floor(total * share)
    if count > MOST_TIMES * rollouts or total - count > MOST_TIMES * written:
        raise BadRequest(
            f"on_policy_fraction {fraction:g} of {rollouts} rollouts and {written} examples of the data would repeat "
            f"some of them more than {MOST_TIMES} times;",
            "write a fraction that is nearer to their numbers.",
        )
    return total - count, count


def mixed(written: Dataset, rollouts: Dataset, fraction: float, seed: int) -> Dataset:
    """Examples of the data and rollouts in one data set, of which a fraction are rollouts.

    Each of both is there at least once, and those of the side that is short for its share several times, each as often
    as the others or once less. Which places rollouts have is drawn; on either side the order stays.

    Args:
        written: examples of the data, with the columns of `as_dataset` but for `origins`.
        rollouts: of `as_dataset`.
        fraction: from above 0 to 1, which leaves the data out.
        seed: of the draw.

    Raises:
        BadRequest: as `mixed_counts`.
    """
    if fraction == 1:
        return rollouts
    sizes = len(written), len(rollouts)
    counts = mixed_counts(*sizes, fraction)
    total, places = sum(counts), set(choose(sum(counts), counts[1], seed))
    rows = cycle(range(sizes[0])), cycle(range(sizes[0], sum(sizes)))
    both = concatenate_datasets([_as_of_the_data(written), rollouts])
    return both.select([next(rows[place in places]) for place in range(total)])


def _as_of_the_data(written: Dataset) -> Dataset:
    """The examples, each token of which is of the data."""
    return written.select_columns([name for name in _FEATURES if name != "origins"]).map(
        lambda row: {"origins": [WRITTEN] * len(row["input_ids"])},
        features=_FEATURES,
        keep_in_memory=True,
        desc="Mixing data and rollouts",
    )


def rollout_examples(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The answers that a student wrote to a file, as a data set that `KavaTrainer` trains on.

    `kd` and the alignment learn from the answers, and the next-token loss does not, for nobody wrote them.

    Args:
        path: of a file of `python -m kava_trainer rollouts`.
        tokenizer: of both models.

    Raises:
        BadRequest: as `read_rollouts`.
    """
    return as_dataset(read_rollouts(path, tokenizer), tokenizer)
