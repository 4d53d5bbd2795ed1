"""From the name of a data set to the rows that are trained on and those that are held out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_from_disk

from ..config.data_arguments import DataArguments
from ..config.model_arguments import QUICKSTART
from ..quickstart import SPLIT_SIZES
from ..quickstart.problems import generate_problems
from ..utils.errors import BadRequest
from .files import find_builder, loading
from .formats import check_types
from .rows.prompts import have_answers, with_answer_column

HELD_OUT_SHARE, HELD_OUT_LIMIT = 0.05, 500
"""Where a data set has no test split, this share of the training split is held out, up to this many examples."""


def load_splits(arguments: DataArguments) -> tuple[Dataset, Dataset | None, int]:
    """Load the training split and the evaluation split.

    Where the data set has no `dataset_test_split`, a fixed part of the training split is held out instead; nothing is
    where rows may lack an answer and none of those would have one.

    Returns:
        Training examples, evaluation examples, and the number of examples that the training split holds in all.

    Raises:
        BadRequest: if the data cannot be found or read, a split does not exist, or there are no examples.
    """
    with loading(cast(str, arguments.dataset_name)):
        splits = read_splits(arguments)
        if arguments.accepts_prompts:
            splits = {name: with_answer_column(rows) for name, rows in splits.items()}
    train = find_train_split(splits, arguments)
    if len(train) == 0:
        raise BadRequest(
            f"The split {arguments.dataset_train_split!r} of {arguments.dataset_name!r} holds no examples."
        )
    total, test = len(train), find_test_split(splits, arguments)
    if arguments.accepts_prompts and test is not None and not have_answers(test):
        test = None  # there is nothing to measure an answer by
    elif test is None and total > 1 and (not arguments.accepts_prompts or have_answers(train)):
        held_out = max(1, min(HELD_OUT_LIMIT, int(HELD_OUT_SHARE * total)))
        train, test = train.train_test_split(test_size=held_out, seed=0).values()
    return _first(train, arguments.max_train_samples), _first(test, arguments.max_eval_samples), total


def has_test_split(arguments: DataArguments) -> bool:
    """Whether a data set, which is read again, has rows of its own to evaluate on."""
    return find_test_split(read_splits(arguments), arguments) is not None


def find_train_split(splits: Mapping[str, Any], arguments: DataArguments) -> Any:
    """The split to train on. Raises `BadRequest` if there is none of that name."""
    if arguments.dataset_train_split not in splits:
        raise BadRequest(
            f"The data set {arguments.dataset_name!r} has no split {arguments.dataset_train_split!r};",
            f"set dataset_train_split to one of {', '.join(splits)}.",
        )
    split = splits[arguments.dataset_train_split]
    check_types(split.features, cast(str, arguments.dataset_name))
    return split


def find_test_split(splits: Mapping[str, Any], arguments: DataArguments) -> Any:
    """The split to evaluate on, or None where a part of the training split has to be held out."""
    wanted, train = arguments.dataset_test_split, arguments.dataset_train_split
    if wanted is not None and wanted not in splits:
        raise BadRequest(
            f"The data set {arguments.dataset_name!r} has no split {wanted!r};",
            f"set dataset_test_split to one of {', '.join(splits)}, or leave it out.",
        )
    names = [wanted] if wanted is not None else ["test", "validation"]
    return next((splits[name] for name in names if name in splits and name != train), None)


def saved_splits(folder: Path, arguments: DataArguments) -> Mapping[str, Dataset] | None:
    """The splits of a folder that was written by `save_to_disk`; None for any other."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    saved = load_from_disk(str(folder))
    return saved if isinstance(saved, DatasetDict) else {arguments.dataset_train_split: saved}


def read_splits(arguments: DataArguments) -> Mapping[str, Dataset]:
    """The splits of the data set a name stands for."""
    name = cast(str, arguments.dataset_name)
    if name == QUICKSTART:
        return {split: Dataset.from_list(generate_problems(count, split)) for split, count in SPLIT_SIZES.items()}
    if (saved := saved_splits(Path(name).expanduser(), arguments)) is not None:
        return saved
    builder = find_builder(name, arguments.dataset_config_name)
    builder.download_and_prepare()
    return cast(Mapping[str, Dataset], builder.as_dataset())


def _first(dataset: Dataset | None, count: int | None) -> Dataset | None:
    return dataset if dataset is None or count is None else dataset.select(range(min(count, len(dataset))))
