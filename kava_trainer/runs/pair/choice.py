"""Choosing what a student keeps of its teacher."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...config.arguments import KavaArguments
from ...data.collators import DistillationCollator
from ...data.selection import draw_examples
from ...models.layers import number_of_layers
from ...models.pruning.cut import Cut, CutRequest, choose_cut, planned_cut
from ...models.student import read_cut_request
from ...reports.cut.table import cut_lines, described
from ...reports.tables import seconds_text
from ...trainer.checkpoint import read_manifest
from ...utils.console import Console
from ...utils.distributed import from_main_process

CUT = "cut"
"""The entry of a run's identity that tells what its student was made of."""

SEARCH_TOKENS, INFLUENCE_TOKENS = 2048, 8192
"""Of the training examples that a search runs on, and one pass over the teacher."""

BATCHES = 8
"""That they make, where that is not more examples at once than in an evaluation."""


def earlier_cut(checkpoint: Path | None, arguments: KavaArguments) -> Cut | None:
    """What the student of the run that wrote a checkpoint was made of; None where that is to be chosen.

    A checkpoint that does not tell is one of before layers could be chosen, when they were evenly spaced.
    """
    if checkpoint is None or not arguments.model.is_cut:
        return None
    there = read_manifest(checkpoint)["run"]
    if there is None:
        return None
    if (content := there.get(CUT)) is not None:
        return Cut.from_dict(content)
    request, teacher = read_cut_request(arguments.model)
    return planned_cut(CutRequest(request.layers, "uniform"), teacher)


def find_cut(
    console: Console,
    arguments: KavaArguments,
    teacher: PreTrainedModel,
    train: Any,
    collator: DistillationCollator,
    earlier: Cut | None = None,
) -> Cut | None:
    """What the student keeps of its teacher, the same on every rank; None where it is not cut out of it.

    It is told, with the table of layers.

    Args:
        console: prints.
        arguments: of the run.
        teacher: as it is loaded, also quantised.
        train: the training examples, or a stream of them.
        collator: pads them.
        earlier: what an earlier session of the run has chosen.

    Raises:
        BadRequest: if the teacher has no such part, or cannot be cut.
    """
    if not arguments.model.is_cut:
        return None
    request, _ = read_cut_request(arguments.model)
    began = time.perf_counter()
    cut = earlier or from_main_process(lambda: _choose(arguments, teacher, request, train, collator))
    if not earlier and request.reads_text(cut.teacher_layers):
        console.print(f"The teacher's layers were tried out in {seconds_text(time.perf_counter() - began)}.")
    for line in cut_lines(described(cut)):
        console.print(line)
    if cut.is_whole:
        console.warn(
            f"Nothing of the teacher is left out: the student is as large as it is ({cut.teacher_layers} layers). "
            f"Write a student_num_layers below {cut.teacher_layers} for a smaller one."
        )
    return cut


def _choose(
    arguments: KavaArguments, teacher: PreTrainedModel, request: CutRequest, train: Any, collator: DistillationCollator
) -> Cut:
    training = arguments.training
    if not request.reads_text(number_of_layers(teacher)):
        return choose_cut(teacher, request, [])
    searches = request.choice == "importance" and request.importance == "search"
    tokens = SEARCH_TOKENS if searches else INFLUENCE_TOKENS
    batches = calibration_batches(train, collator, tokens, training.seed, training.per_device_eval_batch_size)
    return choose_cut(teacher, request, batches)


def calibration_batches(
    train: Any, collator: Callable[[list[Any]], dict[str, Any]], tokens: int, seed: int, batch_size: int
) -> list[dict[str, Any]]:
    """The text that importance is measured on, in small batches of examples of like length.

    Args:
        train: the training examples, see `draw_examples`.
        collator: pads them.
        tokens: they hold at least so many, or are all there are.
        seed: of the draw.
        batch_size: examples at a time at most.
    """
    examples = sorted(draw_examples(train, tokens, seed), key=lambda example: len(example["input_ids"]))
    size = min(math.ceil(len(examples) / BATCHES), batch_size)
    return [collator(examples[start : start + size]) for start in range(0, len(examples), size)]
