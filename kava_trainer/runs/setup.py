"""What a run needs before its first step: tokenizer, data, models and trainer, and what the user sees of them."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.data_arguments import DataArguments
from ..data.collators import DistillationCollator
from ..data.encoding import Encoded, encode_dataset
from ..data.formats import IGNORED, find_format, prompt_kind
from ..data.retention import load_retention
from ..data.rows.remarks import remark_problems
from ..data.selection import first_examples
from ..data.splits import load_splits
from ..data.stream_sources import open_rows
from ..data.streaming import ExampleStream, open_stream
from ..data.token_alignment.pair_encoder import NO_READINGS, Readings
from ..data.token_alignment.ranges import as_the_teacher_reads
from ..distillation.pairing import pair_up
from ..distillation.teacher_cache import TeacherCache
from ..evaluation.answers import answer_cross_entropy
from ..reports.summary import RunSummary
from ..reports.verdict import TEACHER_AT_CHANCE, few_examples
from ..trainer.callbacks.trackers import tracker_problem
from ..trainer.checkpoint import Resumption
from ..trainer.trainer import KavaTrainer
from ..utils.console import Console, size_text
from ..utils.errors import BadRequest
from ..utils.hub import hub_reason
from ..utils.progress_bar import working
from .advice import (
    check_evaluation,
    check_processes,
    held_out_of_a_small_stream,
    long_warmup,
    loose_projector,
    memory_shortage,
    on_format,
    planned_steps,
    precision_problems,
)
from .display import tell_encoding, tell_retention
from .pair.layers import with_chosen_layers
from .pair.models import Models
from .pair.tokenizers import check_teacher_answers, teacher_readings, tell_tokenizers, weights_that_stand
from .resources import check_space, describe_estimate, estimate_memory, try_to_estimate
from .rollouts.examples import check_prompts, check_rollouts_fit, describe_rollouts, load_rollouts, with_rollouts
from .tracking import RunTracking


@dataclass
class Data:
    """Tokenised examples and what pads them."""

    train: datasets.Dataset | ExampleStream
    evaluation: datasets.Dataset | None
    collator: DistillationCollator
    prompt_kind: str = "prompt"
    """See `formats.prompt_kind`."""
    retention: datasets.Dataset | None = None
    """See `retention.load_retention`."""
    of_the_data: datasets.Dataset | None = None
    """The training examples of the data set alone, where `train` holds rollouts from a file too."""
    token_alignment: dict[int, dict[str, float]] = field(default_factory=dict)
    """See `tokenizers.alignment_shares`, of each teacher that reads other tokens than the student."""

    @property
    def written(self) -> datasets.Dataset | ExampleStream:
        """The training examples of the data set alone."""
        return self.train if self.of_the_data is None else self.of_the_data


@dataclass
class Run:
    """What the stages of one run hand on; the later parts are there once their stage is over."""

    console: Console
    arguments: KavaArguments
    argv: list[str] = field(default_factory=list)
    """The command line without the program."""
    resumption: Resumption = field(init=False)
    summary: RunSummary = field(init=False)
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    data: Data = field(init=False)
    identity: dict[str, Any] = field(init=False)
    models: Models = field(init=False)
    trainer: KavaTrainer = field(init=False)
    tracking: RunTracking = field(init=False)
    caches: dict[int, TeacherCache] = field(init=False)

    @property
    def training(self) -> KavaTrainingArguments:
        """What was asked of the training."""
        return self.arguments.training

    @property
    def checkpoint(self) -> Path | None:
        """What it goes on from; None too for what is never resumed, as the filling of a cache."""
        return self.resumption.checkpoint if hasattr(self, "resumption") else None


def load_data(console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Both splits, tokenised, with what pads them. Raises `BadRequest` where the data cannot be used."""
    console.stage("Data")
    asked, readings = arguments.data, teacher_readings(arguments, tokenizer)
    if asked.streaming:
        return _load_stream(console, arguments, tokenizer, readings)
    with arguments.training.main_process_first(desc="loading the data"):
        rollouts = load_rollouts(arguments, tokenizer)
        train, test, total = load_splits(asked)
        check_prompts(arguments, train)
        console.print(f"Dataset loaded: {total} samples")
        encoded = encode_rows(asked, tokenizer, "training", train, readings)
        examples = encoded.dataset if rollouts is None else with_rollouts(arguments, encoded.dataset, rollouts)
        held_out = encode_rows(asked, tokenizer, "held-out", test, readings) if test else None
        retention = load_retention(asked, test, tokenizer, readings.get(0))
    tell_encoding(console, "training", encoded, len(train), asked)
    if rollouts is not None:
        console.print(describe_rollouts(arguments, rollouts, len(examples)))
    if test and held_out:
        tell_encoding(console, "held-out", held_out, len(test), asked)
        tell_retention(console, asked, retention)
    else:
        answered = " that have an answer" if asked.accepts_prompts else ""
        console.warn(f"There are no held-out examples{answered}, so nothing will be evaluated.")
    if few := few_examples(len(held_out.dataset) if held_out else None):
        console.warn(few)
    kind = _tell_format(console, arguments, tokenizer, train.column_names, train[0])
    shares = tell_tokenizers(console, encoded.token_alignment, weights_that_stand(arguments), arguments.data.is_causal)
    batches = math.ceil(len(examples) / arguments.training.per_device_train_batch_size)
    console.print(f"{batches} batches prepared")
    evaluation, written = held_out.dataset if held_out else None, None if rollouts is None else encoded.dataset
    return Data(examples, evaluation, DistillationCollator(tokenizer), kind, retention, written, shares)


def _load_stream(
    console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase, readings: Readings
) -> Data:
    """The stream of training examples, and the held-out ones, which are read now."""
    asked, training = arguments.data, arguments.training
    rows, held_out = open_rows(asked)
    check_prompts(arguments, rows.first(1))
    seed = training.seed if training.data_seed is None else training.data_seed
    turns = asked.assistant_turns
    stream = open_stream(rows, tokenizer, asked.max_length, asked.shuffle_buffer, seed, turns, readings)
    mixed = f"mixed within {asked.shuffle_buffer} rows" if asked.shuffle_buffer else "in the order they stand in"
    console.print(f"Data set streamed: examples are read while the model trains, {mixed}")
    encoded = encode_rows(asked, tokenizer, "held-out", held_out, readings)
    tell_encoding(console, "held-out", encoded, len(held_out), asked)
    retention = load_retention(asked, held_out, tokenizer, readings.get(0))
    tell_retention(console, asked, retention)
    if few := held_out_of_a_small_stream(len(held_out), rows.skipped, stream.checked):
        console.warn(few)
    for problem in remark_problems(stream.remarks, rows.name, "training", stream.checked):
        console.warn(str(problem))
    kind = _tell_format(console, arguments, tokenizer, rows.column_names, rows.first(1)[0])
    shares = tell_tokenizers(console, stream.token_alignment, weights_that_stand(arguments), arguments.data.is_causal)
    return Data(stream, encoded.dataset, DistillationCollator(tokenizer), kind, retention, None, shares)


def load_held_out(
    console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The held-out examples, and the text for retained language, as `load_data` has them.

    Raises:
        BadRequest: where no examples are held out, or as `load_data`.
    """
    console.stage("Data")
    asked, readings = arguments.data, teacher_readings(arguments, tokenizer)
    with arguments.training.main_process_first(desc="loading the data"):
        test = open_rows(asked)[1] if asked.streaming else load_splits(asked)[1]
        if not test:
            raise BadRequest(
                f"The data set {asked.dataset_name!r} has no held-out examples to measure on;",
                "name a dataset_test_split, or a data set of more than one example.",
            )
        held_out = encode_rows(asked, tokenizer, "held-out", test, readings)
        retention = load_retention(asked, test, tokenizer, readings.get(0))
    tell_encoding(console, "held-out", held_out, len(test), asked)
    tell_retention(console, asked, retention)
    if few := few_examples(len(held_out.dataset)):
        console.warn(few)
    return held_out.dataset, retention


def encode_rows(
    asked: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    which: str,
    rows: datasets.Dataset,
    readings: Readings = NO_READINGS,
) -> Encoded:
    """The `training` or `held-out` rows, tokenised. Raises `BadRequest` as `encode_dataset`."""
    told, name = f"Tokenizing the {which} data", cast(str, asked.dataset_name)
    with working(f"Preparing the {which} data"):  # the bar of `datasets` shows nothing of the checks around it
        turns, prompts = asked.assistant_turns, asked.accepts_prompts and which == "training"
        encoded = encode_dataset(rows, tokenizer, asked.max_length, told, name, turns, prompts, readings)
    check_teacher_answers(encoded.dataset if which == "held-out" else None, readings.get(0))
    return encoded


def _tell_format(
    console: Console,
    arguments: KavaArguments,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    row: dict[str, Any],
) -> str:
    """Say what of the data is not read, and what of the tokenizer is not used; the `prompt_kind` of its first row."""
    notes, problems = on_format(arguments, tokenizer, columns, row)
    for note in notes:
        console.print(note)
    for problem in problems:
        console.warn(str(problem))
    return prompt_kind(row, find_format(columns))


def tell_memory(console: Console, arguments: KavaArguments) -> int | None:
    """Say what training will take of each device, before a weight is loaded; the sum in bytes.

    Raises:
        BadRequest: as `estimate_memory`, and where the disk of `output_dir` is too small for a checkpoint.
    """
    with working("Estimating the memory"):
        parts, reason = try_to_estimate(lambda: estimate_memory(arguments))
    if parts is None:
        console.print(f"No memory estimate: {reason}.")
        return None
    device = arguments.training.device
    total, shown = describe_estimate(parts, device)
    console.print(f"Memory estimate for training: {size_text(total)} ({shown})")
    if device.type == "cuda" and (problem := memory_shortage(total, arguments)):
        console.warn(str(problem))
    check_space(parts, arguments.training)
    return total


def make_trainer(training: KavaTrainingArguments, models: Models, data: Data) -> KavaTrainer:
    """The trainer of one student; its teacher runs only where a term reads it.

    Raises:
        BadRequest: if the models do not have what the arguments ask for, or Trainer refuses an argument.
    """
    teacher, target = pair_up(training, models.student, models.teachers, None, models.inherited_layers)
    try:
        trainer = KavaTrainer(
            student=models.student,
            teacher=teacher,
            target=target,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.collator,
            processing_class=models.tokenizer,
            teacher_tokenizer=models.teacher_tokenizers,
        )
        trainer.create_optimizer()
    except (ValueError, ImportError, KeyError, OSError, HTTPError) as error:
        raise BadRequest(f"Trainer cannot be set up with these arguments: {hub_reason(error)}.") from error
    except RuntimeError as error:
        if problem := tracker_problem(cast(list[str], training.report_to)):
            raise BadRequest.of(problem) from error
        raise
    return trainer


def build_trainer(run: Run) -> KavaTrainer:
    """The trainer of the run, and what the user sees of its loss.

    Raises:
        BadRequest: as `make_trainer`, and where the devices or the evaluation do not fit the arguments.
    """
    console, training, models, data = run.console, run.training, run.models, run.data
    check_processes(training)
    check_evaluation(training, data.evaluation is not None)
    if data.of_the_data is not None:
        check_rollouts_fit(cast(datasets.Dataset, data.train), models.by_role)
    models = run.models = with_chosen_layers(training, models, data.train, data.collator, run.checkpoint)
    with working("Trying out the models"):
        trainer = make_trainer(training, models, data)
    trained = {parameter.dtype for parameter in models.student.parameters() if parameter.requires_grad}
    # A stream has no length, and its training is one of max_steps.
    examples = 0 if isinstance(data.train, ExampleStream) else len(data.train)
    problems = (
        *precision_problems(run.arguments, models.teacher, models.student, trained),
        long_warmup(training, planned_steps(training, examples, training.world_size)),
    )
    for problem in filter(None, problems):
        console.warn(str(problem))
    if training.calibrates:
        trainer.calibration_examples()
    if training.aligns:
        _tell_alignment(console, training, trainer)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in trainer.terms.full_weights.items())
    console.print(f"Loss terms: {weights}{_describe_schedules(training)}")
    return trainer


def _describe_schedules(training: KavaTrainingArguments) -> str:
    """What becomes of the weights over the run, in brackets; nothing where all of them stay."""
    fades, rises = training.alignment_schedule, training.kd_schedule
    told = []
    if fades != "constant":
        told.append(f"alignment: {'the first half' if fades == 'stage' else f'{fades} to 0'}")
    if rises != "constant" and training.kd_weight > 0:
        told.append(f"kd: {'the second half' if rises == 'stage' else f'{rises} from 0'}")
    return f" ({', '.join(told)})" if told else ""


def _tell_alignment(console: Console, training: KavaTrainingArguments, trainer: KavaTrainer) -> None:
    target = trainer.target
    anchor = "" if training.projector_anchor == "none" else f", anchor {training.projector_anchor}"
    direction = "frozen bridge" if target.bridges else training.projector_direction.replace("_", " ")
    kind = f"{target.widths} ({direction}{anchor})"
    if target.name != "hidden":
        console.print(f"Alignment target: {target.name}")
    console.print(f"Projector: {kind if target.projectors else f'none, both sides are {target.widths}'}")
    console.print(f"Aligned layers (student, teacher): {target.told_layers}")
    if trainer.terms.full_weights.get("mercator"):
        console.print(f"Loss: Mercator (alpha={training.mercator_alpha}, beta={training.mercator_beta})")
    if problem := loose_projector(training):
        console.warn(str(problem))


def chance_of(model: PreTrainedModel) -> float:
    """The cross-entropy in nats of a guess among all of a model's tokens."""
    return math.log(cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings)


def measure_teacher(
    teacher: PreTrainedModel, examples: datasets.Dataset, collator: DistillationCollator
) -> tuple[float, float, bool]:
    """A teacher's cross-entropy on the answers of one batch and that of chance, in nats; whether they are alike."""
    loss = answer_cross_entropy(teacher, examples, collator, len(examples))
    chance = chance_of(teacher)
    return loss, chance, not loss < 0.95 * chance


def check_teacher(run: Run) -> None:
    """Warn of a teacher that knows no more about the answers than chance, and add it to the problems."""
    batch = first_examples(run.data.written, run.training.per_device_eval_batch_size)
    if all(label == IGNORED for labels in batch["labels"] for label in labels):  # they are prompts alone
        return
    collator = DistillationCollator(run.models.tokenizer_of("teacher"))
    loss, chance, at_chance = measure_teacher(run.models.teacher, as_the_teacher_reads(batch), collator)
    run.console.print(f"Teacher's cross-entropy on one batch: {loss:.2f} nats (chance: {chance:.2f})")
    if at_chance:
        run.console.warn(
            "The teacher is no better than chance on these answers. Look at its weights, its tokenizer and the data."
        )
        action = f"went on with a teacher of {loss:.2f} nats on the answers, where chance has {chance:.2f}"
        run.trainer.problems.append({"step": None, "kind": TEACHER_AT_CHANCE, "action": action})
