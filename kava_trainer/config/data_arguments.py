"""The arguments that say what is learned from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..utils.errors import Problem
from ..utils.files import missing_path
from .model_arguments import argument

NO_RETENTION = "none"
"""The value of `retention_dataset_name` for which retained language is not measured."""


@dataclass
class DataArguments:
    """Which examples."""

    accepts_prompts = False
    """Whether a row may lack an answer, because the student writes all of them; see `KavaArguments`."""

    dataset_name: str | None = argument(
        None, "Hub id, a folder, a jsonl, json, csv, tsv, parquet or arrow file, a pattern of them, or 'quickstart'."
    )
    dataset_config_name: str | None = argument(None, "Configuration of a hub data set.")
    dataset_train_split: str = argument("train", "Split to train on.")
    dataset_test_split: str | None = argument(
        None, "Split to evaluate on; by default test, else validation, else a held-out part of the training split."
    )
    max_length: int = argument(512, "Longest example in tokens; longer ones are cut and counted.", unit="tokens")
    assistant_turns: Literal["last", "all"] = argument(
        "last", "Which answers of a conversation are learned: the last one, or each that the assistant gives."
    )
    token_alignment: Literal["overlap", "causal"] = argument(
        "overlap",
        "Of which states of a teacher with other tokens a student's token learns the mean: of all whose text overlaps "
        "its own (overlap), or of these only where their text ends with its own or before, so that the teacher has not "
        "read ahead; tokens inside a longer one of the teacher's are then left out (causal).",
    )
    max_train_samples: int | None = argument(None, "Use only the first so many examples.", unit="examples")
    max_eval_samples: int | None = argument(
        None,
        "Evaluate on only the first so many examples; by default on all of them, but in a run that trains on fewer "
        "examples than that on as many as it trains on, 64 at least.",
        unit="examples",
    )
    retention_dataset_name: str | None = argument(
        None,
        "Text to measure on what a student keeps of its teacher's language: as dataset_name, or a txt file of "
        "paragraphs; by default the prompts of the held-out rows, and 'none' for no such measurement.",
    )
    retention_dataset_config_name: str | None = argument(None, "Configuration of a hub data set for retention.")
    streaming: bool = argument(
        False, "Read and tokenise the examples while the model trains, in place of all of them before; needs max_steps."
    )
    shuffle_buffer: int = argument(
        10_000,
        "Rows of a stream that are mixed with each other, and so many that every process and data worker keeps in "
        "memory; 0 leaves their order as it is.",
        unit="rows",
    )

    @property
    def is_causal(self) -> bool:
        """Whether `token_alignment` is."""
        return self.token_alignment == "causal"

    def problems(self) -> Iterator[Problem]:
        """Every mistake."""
        if not self.dataset_name:
            remedy = "write a hub id, a local file or folder, or 'quickstart'."
            yield Problem("dataset_name", "dataset_name is missing;", remedy)
        for name in ("dataset_name", "retention_dataset_name"):
            if problem := missing_path(name, getattr(self, name)):
                yield problem
        if self.retention_dataset_config_name and self.retention_dataset_name in (None, NO_RETENTION):
            what = "retention_dataset_config_name is set, but retention_dataset_name names no data set;"
            yield Problem("retention_dataset_config_name", what, "name one, or leave it out.")
        if self.max_length < 2:
            yield Problem("max_length", f"max_length is {self.max_length}; an example needs at least 2 tokens.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem.of_value(name, value, "write a whole number above 0, or leave it out for all examples.")
        if self.shuffle_buffer < 0:
            yield Problem("shuffle_buffer", f"shuffle_buffer is {self.shuffle_buffer}; it cannot be negative.")

    def stream_problems(self, training: TrainingArguments) -> Iterator[Problem]:
        """Every training argument that a stream cannot do."""
        if not self.streaming:
            return
        if getattr(training, "rollouts_from", None) is not None:
            what = "rollouts_from is a file that is read before the training, but streaming is true;"
            yield Problem("streaming", what, "write streaming false, or leave rollouts_from out.")
        if training.max_steps <= 0:
            what = "max_steps is missing: with streaming nobody knows how many examples there are;"
            yield Problem("max_steps", what, "set it.")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(training, name) == "epoch":
                yield Problem(name, f"{name} is epoch, but a stream is read on without one;", "write steps.")
        if (name := training.train_sampling_strategy) in ("group_by_length", "batch_rebalance"):
            what = f"train_sampling_strategy {name} needs the lengths of all examples, which streaming does not know;"
            yield Problem("train_sampling_strategy", what, "leave one of them out.")
        if training.ignore_data_skip:
            what = "ignore_data_skip has no use with streaming, which goes on where it was;"
            yield Problem("ignore_data_skip", what, "leave it out.")
        if not training.dataloader_in_order:
            what = "dataloader_in_order is false, but a stream goes on where it was only in order;"
            yield Problem("dataloader_in_order", what, "write true.")
        if cast(AcceleratorConfig, training.accelerator_config).split_batches:
            what = "accelerator_config.split_batches is not supported with streaming;"
            yield Problem("accelerator_config", what, "leave it out.")
