"""Whether rows suit a student's own answers, and such answers from a file as examples of a run."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config.arguments import KavaArguments
from ...data.formats import find_format, prompt_kind
from ...data.rows.prompts import have_answers
from ...distillation.rollouts.files import as_dataset, mixed, read_rollouts
from ...models.layers import context_length
from ...utils.errors import BadRequest


def check_prompts(arguments: KavaArguments, rows: Dataset) -> None:
    """Make sure that the student's own answers have prompts, and a control answers. Raises `BadRequest` if not."""
    training = arguments.training
    if training.samples and has_no_prompts(rows):
        raise BadRequest(
            f"on_policy_fraction is {training.on_policy_fraction:g}, but the rows are plain text, which has no prompt "
            "that a student could answer;",
            "write on_policy_fraction 0, or name a data set of prompts.",
        )
    if training.run_control and arguments.data.accepts_prompts and not have_answers(rows):
        raise BadRequest(
            "run_control is true, but the training rows are prompts alone, from which the next-token loss learns "
            "nothing;",
            "write run_control false.",
        )


def has_no_prompts(rows: Dataset) -> bool:
    """Whether rows are plain text."""
    return prompt_kind(rows[0], find_format(rows.column_names)) == "text"


def load_rollouts(arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The rollouts that `rollouts_from` names, as examples; None where it names none.

    Raises:
        BadRequest: as `read_rollouts`; an example may be as long as one that is answered in a training.
    """
    training, asked = arguments.training, arguments.data
    if training.rollouts_from is None:
        return None
    longest = asked.max_length + training.on_policy_max_new_tokens
    found = read_rollouts(training.rollouts_from, tokenizer, longest, asked.max_train_samples)
    return as_dataset(found, tokenizer)


def with_rollouts(arguments: KavaArguments, written: Dataset, rollouts: Dataset) -> Dataset:
    """The examples of a run: those of the data and rollouts, as `on_policy_fraction` asks. Raises as `mixed`."""
    training = arguments.training
    return mixed(written, rollouts, training.on_policy_fraction, training.seed)


def describe_rollouts(arguments: KavaArguments, rollouts: Dataset, examples: int) -> str:
    """How many of so many training examples are rollouts from the file, as a sentence."""
    share = arguments.training.on_policy_fraction
    there = f"{len(rollouts)} answers of a student from {arguments.training.rollouts_from}"
    if share == 1:
        return f"Trained on: the {there}, and nothing of the data set."
    return f"Trained on: {examples} examples, {100 * share:g} % of them the {there}."


def check_rollouts_fit(examples: Dataset, models: Mapping[str, PreTrainedModel]) -> None:
    """Make sure that models can read examples with rollouts, which may be longer than `max_length`.

    Args:
        examples: of the run.
        models: by role.

    Raises:
        BadRequest: if not.
    """
    longest = max(map(len, examples["input_ids"]))
    for role, model in models.items():
        limit = context_length(model) or longest
        if longest > limit:
            raise BadRequest(
                f"rollouts_from holds an example of {longest} tokens, but the {role} reads {limit} at most;",
                "let the student write shorter answers: lower max_length or on_policy_max_new_tokens.",
            )
